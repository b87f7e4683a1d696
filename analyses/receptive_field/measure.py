"""Trace in, receptive fields out: validation, nulls and intervals."""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import xarray as xr

from mamba_probe.analyses.common import Canonical, described, interval, refuse
from mamba_probe.analyses.receptive_field import core, live, rows
from mamba_probe.analyses.receptive_field.asked import FRACTIONS, Asked
from mamba_probe.analyses.receptive_field.words import attributes, coordinates, entry

__all__ = ["measure"]

Statistic = Callable[[np.ndarray], np.ndarray]
CLAMPED_TOP = 0.1
"""Smallest of the three shares in LongMamba's published code, which names none of them its default."""
PAIRED = 3
"""Rows from which neighbouring pairs differ: of two rows both values are the one distance, and have no interval."""


def measure(
    trace: xr.Dataset, *, train_length: int | None = None, jacobian: xr.Dataset | Sequence[xr.Dataset] | None = None,
    remembrance: xr.Dataset | None = None, query_tokens: Sequence[int] | np.ndarray | None = None,
    lags: tuple[int, int | None] = (4, None), theta: float = 5e-2, top: float = CLAMPED_TOP, n_bootstrap: int = 200,
    seed: int = 0, weights: object = None, interventions: object = None, baseline: xr.Dataset | None = None,
) -> xr.Dataset:  # fmt: skip
    r"""Measure how far a layer sees: by query, past the length trained on, and by what moves its output.

    $$\mathrm{MMD}_L = \frac{\sum_s (L - s)\, |\alpha_L[s]|}{\sum_s |\alpha_L[s]|}, \qquad
      e^{A \sum_{t \le L_{train}} \Delta_t} > \theta, \qquad S_k = \frac{|\partial y_L / \partial u_k|}{\sum_j \cdot}$$

    Sources: Mamba Mean Distance, DeciMamba, arXiv 2406.14528 (the mean distance of `hidden_attention`); global
    channels, LongMamba, arXiv 2504.16053; the relative gradient, "Block-Biased Mamba", arXiv 2505.09022; recency and
    over-smoothing, after arXiv 2501.00658; effective remembrance, arXiv 2507.02782. Collapse ratio, spread, nulls and
    intervals: ours. What is not given is left out, and named in attrs["left_out"].

    Args:
        trace: delta, A, B and C, with `valid` and `position`; token distance where `u` or `out` was recorded.
        train_length: tokens of the rows that the model was trained on, at least 8; never guessed.
        jacobian: what `probe.jacobian(query_tokens=..)` or `(source_tokens=..)` returned, or a list of that, one a
            layer; its rows may be some of the trace's. A few random read-outs of +1 and -1 stand for all features: the
            root of the sum of squares over them estimates the Frobenius norm, but for a scale, which drops out.
        remembrance: what `probe.remembrance` returned.
        query_tokens: positions that all rows have; default: 8, evenly spread over the shortest row. The last is the
            one whose sources are profiled.
        lags: first and last lag (None: the longest) of the slopes; by default past the usual convolution's 4 taps.
        theta: retention above which a head is global.
        top: share of the largest steps at whose smallest delta is clamped.
        n_bootstrap: replicates of the 95 % percentile intervals, over rows: too narrow with few; NaN with one row, and
            of spreads with two.
        seed: of the replicates and of the shuffle.
        weights, interventions: not used; refused.
        baseline: the trace of an untrained twin on the same rows, of the same layers: measured alike, without what
            needs the model: `baseline_layer_*`.

    Returns:
        By layer, with `_low`, `_high` and nulls: mean_distance (query_token); train_mean_distance and collapse_ratio
        (fraction of train_length: 1 keeps pace, 1/fraction stands still; at the asked token nearest to that length
        where a task asks there, else at that position: prefix_role, prefix_length); global_share; mixer_spread and
        mixer_slope, of the scan without its skip D;
        block_spread and block_slope; token_distance_u and _out. layer_mixer_profile (lag) and layer_block_profile
        (block_lag); by head: head_mean_distance, head_train_retention; n_rows_*: rows behind an interval;
        remembrance and null_other_row (start).

    Raises:
        ValueError: a missing variable, tokens with gaps, a query that a row lacks, a jacobian, remembrance or baseline
            that does not belong to the trace.

    >>> one = np.ones((1, 2, 16, 1))
    >>> trace = xr.Dataset(
    ...     {"delta": (("layer", "batch", "token", "channel"), one),
    ...      "B": (("layer", "batch", "token", "group", "state"), one[..., None]),
    ...      "C": (("layer", "batch", "token", "group", "state"), one[..., None]),
    ...      "A": (("layer", "channel", "state"), np.full((1, 1, 1), -np.log(2)))},
    ...     {"layer": [0], "valid": (("batch", "token"), np.ones((2, 16), bool)),
    ...      "position": (("batch", "token"), np.tile(np.arange(16), (2, 1)))},
    ...     {"schema_version": 1, "family": "mamba", "discretization": "euler"})
    >>> found = measure(trace, train_length=8)
    >>> round(found["layer_mixer_slope"].item(), 6), found["layer_mixer_spread"].item()
    (-0.693147, 0.0)
    >>> found["layer_collapse_ratio"].values.round(2).tolist()
    [[2.41, 1.77, 1.0, 0.48, nan]]
    """
    refuse("receptive_field", weights=weights, interventions=interventions)
    view = Canonical(trace, "delta", "A", "B", "C")
    asked = Asked.of(view, query_tokens, train_length, lags, theta, top)
    result = _Result(view, asked, n_bootstrap, seed)
    result.mixer()
    result.trained()
    result.tokens()
    result.block(jacobian)
    result.remember(remembrance)
    same = {"train_length": train_length, "lags": lags, "theta": theta, "top": top}
    result.beside(baseline, same | {"n_bootstrap": n_bootstrap, "seed": seed})
    entries = {name: entry(name, result.found[name], view.head_dim) for name in sorted(result.found)}
    coords = coordinates(view, asked, result.found, result.starts)
    return described(entries, coords, attributes(view, asked, result.left_out, result.live, n_bootstrap, seed))


class _Result:
    """The variables of a result, measure by measure."""

    def __init__(self, view: Canonical, asked: Asked, n_bootstrap: int, seed: int):
        self.view, self.asked, self.n_bootstrap, self.seed = view, asked, n_bootstrap, seed
        self.found: dict[str, np.ndarray] = {}
        self.left_out: list[str] = []
        self.live: dict[str, str] = {}
        self.starts = np.zeros(0, dtype=int)

    def _keep(self, name: str, live: np.ndarray, executed: Statistic, **nulls: Statistic) -> None:
        """A statistic of how often each row is drawn, with its interval, and the nulls' without; live: rows it has."""
        ones = np.ones(len(live), dtype=int)
        self.found[name] = np.asarray(executed(ones))
        self.found[f"n_rows_{name.removeprefix('layer_')}"] = live.sum(axis=0)
        ends = self._ends(live, executed, PAIRED if name.endswith("_spread") else 1)
        self.found[f"{name}_low"], self.found[f"{name}_high"] = ends
        for kind, statistic in nulls.items():
            self.found[name.replace("layer_", f"layer_{kind}_")] = np.asarray(statistic(ones))

    def _ends(self, live: np.ndarray, executed: Statistic, fewest: int) -> np.ndarray:
        """Interval of each number over the rows (the first axis of live) that have it; NaN with fewer than `fewest`."""
        ends = np.full((2, *live.shape[1:]), np.nan)
        for known in np.unique(live.reshape(len(live), -1), axis=1).T:
            rows = np.flatnonzero(known)
            if len(rows) < fewest:
                continue

            def of_known(draws: np.ndarray, rows: np.ndarray = rows) -> np.ndarray:
                drawn = np.zeros(len(live), dtype=int)
                drawn[rows] = draws
                return executed(drawn)

            here = (np.moveaxis(live, 0, -1) == known).all(axis=-1)
            ends[:, here] = interval(of_known, len(rows), self.n_bootstrap, self.seed)[:, here]
        return ends

    def _means(self, name: str, executed: np.ndarray, **nulls: np.ndarray) -> None:
        """Means over rows, the first axis."""
        others = {kind: _mean_of(values) for kind, values in nulls.items()}
        self._keep(name, ~np.isnan(executed), _mean_of(executed), **others)

    def mixer(self) -> None:
        """Distances by query and by prefix, and what the last query reads: its profile, its spread and its slope."""
        asked, n_shown = self.asked, len(self.asked.shown)
        queries = np.concatenate([np.tile(asked.shown, (self.view.n_rows, 1)), asked.ends], axis=1)
        found = rows.mixer(self.view, queries, int(asked.shown[-1]), self.seed)
        by_row = {_prefix(kind): np.moveaxis(values, 1, 0) for kind, values in found.distance.items()}
        executed = by_row.pop("")
        others = {kind: values[..., :n_shown] for kind, values in by_row.items()}
        self._means("layer_mean_distance", executed[..., :n_shown], **others)
        self.found["head_mean_distance"] = found.head_distance[:, :n_shown]
        if asked.train_length is None:
            self.left_out.append("train_mean_distance and collapse_ratio: no train_length= given")
        else:
            self._prefixes({kind: values[..., n_shown:] for kind, values in {"": executed, **by_row}.items()})
        shares = {_prefix(kind): core.profile(size) for kind, size in found.size.items()}
        self.found["layer_mixer_profile"] = _profile(shares[""])
        spreads = {kind: _spreads(values) for kind, values in shares.items()}
        self._means("layer_mixer_spread", spreads.pop(""), **spreads)
        slopes = {_prefix(kind): self._slopes(size) for kind, size in found.size.items()}
        self.found["layer_mixer_slope_used"] = slopes[""][1].mean(axis=0)
        lines = {kind: values[0] for kind, values in slopes.items()}
        self._means("layer_mixer_slope", lines.pop(""), **lines)

    def _slopes(self, size: np.ndarray) -> np.ndarray:
        """Slope, and share of sources used (both, row, layer)."""
        lag = np.arange(size.shape[-1] - 1, -1, -1)
        found = np.apply_along_axis(lambda one: np.array(core.slope(one, lag, *self.asked.lags)), -1, size)
        return found.transpose(2, 1, 0)

    def _prefixes(self, distance: dict[str, np.ndarray]) -> None:
        ratios = {kind: _pace_of(values, self.asked.lengths - 1) for kind, values in distance.items()}
        live = _with_trained(distance[""])
        self._means("layer_train_mean_distance", distance.pop(""), **distance)
        self._keep("layer_collapse_ratio", live, ratios.pop(""), **ratios)

    def trained(self) -> None:
        """Heads that retain over the length trained on."""
        length, view = self.asked.train_length, self.view
        if length is None or not self.asked.trained:
            why = f"rows of {self.asked.shortest} tokens" if length else "no train_length= given"
            self.left_out.append(f"global_share and train_retention: {why}")
            return
        clamped, plain = (np.moveaxis(part, 1, 0) for part in rows.retentions(view, length, self.asked.top))

        def share(values: np.ndarray) -> Statistic:
            return lambda draws: np.mean(core.mean(values, draws) > self.asked.theta, axis=1)

        self.found["head_train_retention"] = clamped.mean(axis=0)
        self._keep("layer_global_share", np.ones(clamped.shape[:2], dtype=bool), share(clamped), null_lti=share(plain))

    def tokens(self) -> None:
        """How far a layer's tokens lie from one another."""
        for name in ("u", "out"):
            if name in self.view.trace:
                self._means(f"layer_token_distance_{name}", rows.distances(self.view, name))
            else:
                self.left_out.append(f"token_distance_{name}: {name} was not recorded")

    def block(self, jacobian: xr.Dataset | Sequence[xr.Dataset] | None) -> None:
        """Profile, spread and slope with the selection moving."""
        if jacobian is None:
            self.left_out.append("block_profile, block_spread and block_slope: no jacobian= given")
            return
        found = live.block(jacobian, self.view.layers, self.view.trace.attrs.get("model_hash"), self.asked.lags)
        self.live["jacobian"] = found.asked
        self.found["layer_block_slope_used"] = core.mean(found.used.T, np.ones(found.used.shape[1], dtype=int))
        self._means("layer_block_slope", found.slope.T)
        if found.size is None:
            self.left_out.append("block_profile and block_spread: jacobian= is of source_tokens, not of query_tokens")
            return
        shares = core.profile(found.size)
        self.found["layer_block_profile"] = _profile(shares)
        self._means("layer_block_spread", _spreads(shares))

    def remember(self, remembrance: xr.Dataset | None) -> None:
        """Predictions without the first tokens."""
        if remembrance is None:
            self.left_out.append("remembrance: no remembrance= given")
            return
        held = live.check_remembrance(remembrance, self.view.trace.attrs.get("model_hash"))
        self.starts = held["start"].values
        self.live["remembrance"] = f"{held.sizes['batch']} row(s): {held.attrs.get('estimator', 'not stated')}"
        self._means("remembrance", held["remembrance"].values)
        other = held["null_other_row"].values
        self.found["null_other_row"] = core.mean(other, np.ones(len(other), dtype=int))

    def beside(self, baseline: xr.Dataset | None, settings: dict[str, Any]) -> None:
        """The layers of an untrained twin, measured alike."""
        if baseline is None:
            self.left_out.append("baseline: none given")
            return
        other = Canonical(baseline, "delta", "A", "B", "C")
        if other.layers.tolist() != self.view.layers.tolist() or not np.array_equal(other.valid, self.view.valid):
            raise ValueError(
                f"baseline needs the trace's layers {self.view.layers.tolist()} and its rows and tokens; got layers "
                f"{other.layers.tolist()}, valid {other.valid.shape}: record it on the same inputs"
            )
        found = measure(_asked_as(self.view.trace, baseline), query_tokens=self.asked.shown, **settings)
        for name in [name for name in self.found if f"{name}_low" in found and name.startswith("layer_")]:
            for end in ("", "_low", "_high"):
                self.found[f"baseline_{name}{end}"] = found[f"{name}{end}"].values
        self.live["baseline"] = found.attrs["model"]


def _prefix(kind: str) -> str:
    return "" if kind == "executed" else kind


def _mean_of(values: np.ndarray) -> Statistic:
    return lambda draws: core.mean(values, draws)


def _asked_as(trace: xr.Dataset, baseline: xr.Dataset) -> xr.Dataset:
    """The baseline, asked at the tokens where the trace is."""
    bare = baseline.drop_vars("role", errors="ignore")
    return bare.assign_coords(role=trace["role"].variable) if "role" in trace.coords else bare


def _with_trained(distance: np.ndarray) -> np.ndarray:
    """Which of (row, layer, fraction) are known, and known at the length trained on."""
    whole = FRACTIONS.index(1.0)
    return ~np.isnan(distance) & ~np.isnan(distance[..., whole : whole + 1])


def _pace_of(distance: np.ndarray, alike: np.ndarray) -> Statistic:
    """Distance (row, layer, fraction) over that at the length trained on, over the same of reading all tokens alike."""
    whole, both = FRACTIONS.index(1.0), _with_trained(distance)

    def grown(values: np.ndarray, draws: np.ndarray) -> np.ndarray:
        here, trained = (np.where(both, of, np.nan) for of in (values, values[..., whole : whole + 1]))
        base = core.mean(trained, draws)
        return core.mean(here, draws) / np.where(base > 0, base, np.nan)

    return lambda draws: grown(distance, draws) / grown(alike[:, None], draws)


def _profile(shares: np.ndarray) -> np.ndarray:
    """Mean over rows (layer, lag) of shares (layer, row, source), the query's own first."""
    return core.mean(np.moveaxis(shares, 1, 0), np.ones(shares.shape[1], dtype=int))[:, ::-1]


def _spreads(shares: np.ndarray) -> np.ndarray:
    """(row, layer) of shares (layer, row, source)."""
    return np.stack([core.spread(one) for one in shares], axis=1)
