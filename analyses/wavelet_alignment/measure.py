"""Trace in, wavelet alignment out: labels, validation and what each number means."""

from collections.abc import Sequence
from dataclasses import dataclass
from difflib import get_close_matches

import numpy as np
import xarray as xr
from jaxtyping import Float, Int

from mamba_probe.analyses.common import Canonical, described, interval, refuse
from mamba_probe.analyses.common.result import Entry
from mamba_probe.analyses.wavelet_alignment import core, window

__all__ = ["measure"]

KERNELS = ("mixer",)
LATER = ("write", "block")
DEFAULT_LEVEL = 3
LAST = -1
"""Label of the one query of each row where none was asked for: its last valid token."""

SUMMARISED = ("best_cosine", "scaling_cosine", "capture", "wavelet_capture", "effective_rank")


@dataclass(frozen=True)
class Plan:
    """What is measured: a wavelet, a coarse space, and each row's queries and windows (by index among valid tokens)."""

    wavelet: str
    level: int
    at: Int[np.ndarray, "batch query_token"]
    window: Int[np.ndarray, "batch query_token"]
    read_out: Float[np.ndarray, "kernel head"] | None

    @property
    def depth(self) -> int:
        """log2 of the longest window."""
        return int(self.window.max()).bit_length() - 1


def measure(
    trace: xr.Dataset,
    *,
    query_tokens: Sequence[int] | Sequence[Sequence[int]] | np.ndarray | None = None,
    kernel: str = "mixer",
    wavelet: str = "haar",
    level: int | None = None,
    read_out: np.ndarray | xr.DataArray | None = None,
    n_bootstrap: int = 200,
    seed: int = 0,
    weights: xr.Dataset | None = None,
    interventions: xr.Dataset | None = None,
    baseline: xr.Dataset | None = None,
) -> xr.Dataset:
    r"""Measure how nearly the kernels a layer executed are wavelets.

    The `mixer` kernel of a channel at query t is
    $k_t[s] = \sum_n C_t[n] \exp(A_n \sum_{r=s+1}^{t} \Delta_r) \, \Delta_s B_s[n]$ (selection frozen at what was
    executed; estimators ours), over the last $2^{\lfloor \log_2 n \rfloor}$ of the n valid tokens up to t. Each kernel
    is scaled to unit energy; its coordinates in the periodised orthonormal basis give the numbers. The null, prefixed
    `null_`, is the same layer made time-invariant: delta, B and C frozen to their means over the row. A slow
    time-invariant layer has a constant kernel, which the *scaling function* matches: read `best_cosine` and
    `wavelet_capture`, which leave it out, before `capture`.

    Args:
        trace: delta, A, B and C, with `valid` and `position`; in memory or on dask.
        query_tokens: positions among a row's valid tokens: (query_token,) for every row, or (batch, query_token) one
            set a row; default: the last valid token of each.
        kernel: "mixer".
        wavelet: an orthonormal discrete wavelet of pywt.
        level: J of the coarse space, spanned by the scaling function and the 2^J - 1 coarsest wavelets;
            default 3, or less where the shortest window is below 16 tokens.
        read_out: (kernel, channel or head): then kernels are read_out @ (kernels of the channels), else the latter.
        n_bootstrap: replicates of the interval over rows (95 %, percentile); NaN where there is one row.
        seed: seed of the replicates.
        weights: not used; refused: pass a read-out.
        interventions: not used; refused.
        baseline: not used; refused: the null comes from the trace.

    Returns:
        Dataset over layer, batch, query_token and kernel; `layer_*` are means over the rest, live kernels only.

    Raises:
        ValueError: a missing variable, a window below 4 tokens, tokens with gaps, a wavelet that is unknown or not
            orthonormal, a kernel other than "mixer", a query that a row lacks, a read-out of another shape.

    >>> import numpy as np, xarray as xr
    >>> one = np.ones((1, 1, 8, 1, 1), "float32")
    >>> delta = np.where(np.arange(8) < 4, 1e-9, 1.0).astype("float32").reshape(1, 1, 8, 1)
    >>> trace = xr.Dataset(
    ...     {"delta": (("layer", "batch", "token", "channel"), delta),
    ...      "B": (("layer", "batch", "token", "group", "state"), one),
    ...      "C": (("layer", "batch", "token", "group", "state"), one),
    ...      "A": (("layer", "channel", "state"), np.full((1, 1, 1), -1e-9, "float32"))},
    ...     {"layer": [0], "valid": (("batch", "token"), np.ones((1, 8), bool)),
    ...      "position": (("batch", "token"), np.arange(8)[None])},
    ...     {"schema_version": 1, "family": "mamba", "discretization": "euler"})
    >>> result = measure(trace)
    >>> round(result.best_cosine.item(), 6), round(result.null_best_cosine.item(), 6)
    (0.707107, 0.0)
    """
    refuse("wavelet_alignment", weights=weights, interventions=interventions, baseline=baseline)
    _check_kernel(kernel)
    view = Canonical(trace, "delta", "A", "B", "C")
    _check_discretization(trace)
    plan = _plan(view, query_tokens, wavelet, level, read_out)
    names, found = _labels(view, read_out), _measured(view, plan)
    found |= _summaries(found, n_bootstrap, seed)
    found["spike_best_cosine"] = np.asarray(core.spike_cosine(int(plan.window.max()), plan.wavelet))
    return described(
        {name: _entry(name, found[name]) for name in sorted(found)},
        _coords(view, plan, query_tokens, names),
        _attrs(view, plan, read_out is not None, n_bootstrap, seed),
    )


def _check_kernel(kernel: str) -> None:
    if kernel in LATER:
        raise ValueError(
            f"kernel {kernel!r} is not measured by this version; only 'mixer' is (from delta, A, B, C of a trace)"
        )
    if kernel not in KERNELS:
        close = get_close_matches(str(kernel), KERNELS)
        raise ValueError(
            f"unknown kernel {kernel!r}" + (f": did you mean {close[0]!r}?" if close else "; known is 'mixer'")
        )


def _check_discretization(trace: xr.Dataset) -> None:
    rule = trace.attrs.get("discretization")
    if rule != "euler":
        raise ValueError(f"wavelet_alignment writes delta B (discretization 'euler'); the trace says {rule!r}")


def _plan(
    view: Canonical,
    query_tokens: Sequence[int] | Sequence[Sequence[int]] | np.ndarray | None,
    wavelet: str,
    level: int | None,
    read_out: object,
) -> Plan:
    basis = core.orthonormal_wavelet(wavelet)
    asked = _asked(view, query_tokens)
    at = np.array([_queries(view, row, None if asked is None else asked[row]) for row in range(view.n_rows)])
    windows = np.array([[core.window_length(index + 1) for index in row] for row in at.tolist()])
    top = int(windows.min()).bit_length() - 2
    chosen = min(DEFAULT_LEVEL, top) if level is None else level
    if not 0 <= chosen <= top:
        raise ValueError(
            f"level must be 0 to {top} (2^level below the shortest window of {windows.min()} tokens); got {level}"
        )
    return Plan(basis, chosen, at, windows, _read_out(view, read_out))


def _asked(
    view: Canonical, query_tokens: Sequence[int] | Sequence[Sequence[int]] | np.ndarray | None
) -> Int[np.ndarray, "batch query_token"] | None:
    """The queries of each row, by position; None where the last valid tokens were asked for."""
    if query_tokens is None:
        return None
    asked = np.asarray(query_tokens)
    if asked.size == 0:
        raise ValueError("query_tokens is empty; leave it None for the last valid token of each row")
    if asked.dtype.kind not in "iu" or asked.ndim > 2 or (asked.ndim == 2 and len(asked) != view.n_rows):
        raise ValueError(
            f"query_tokens needs integers (query_token,) or (batch = {view.n_rows}, query_token); got {asked.dtype} of "
            f"shape {asked.shape}"
        )
    return np.broadcast_to(asked, (view.n_rows, asked.shape[-1]))


def _queries(view: Canonical, row: int, query_tokens: Int[np.ndarray, " query_token"] | None) -> list[int]:
    position = view.positions(row)
    if not view.contiguous(row):
        raise ValueError(
            f"the tokens of row {row} are not contiguous: a kernel needs every token of its window; record all"
        )
    if query_tokens is None:
        return [len(position) - 1]
    missing = sorted(set(query_tokens.tolist()) - set(position.tolist()))
    if missing:
        raise ValueError(
            f"query_tokens {missing} are not among the valid tokens of row {row}: {len(position)} tokens at positions "
            f"{position[0]} to {position[-1]}"
        )
    return [int(token) - int(position[0]) for token in query_tokens]


def _read_out(view: Canonical, read_out: object) -> Float[np.ndarray, "kernel head"] | None:
    if read_out is None:
        return None
    if isinstance(read_out, xr.DataArray):
        if set(read_out.dims) != {"kernel", view.head_dim}:
            raise ValueError(
                f"read_out needs dims (kernel, {view.head_dim}); got ({', '.join(map(str, read_out.dims))})"
            )
        read_out = read_out.transpose("kernel", view.head_dim).values
    values = np.asarray(read_out, dtype=np.float64)
    if values.ndim != 2 or values.shape[1] != view.n_heads or not len(values):
        raise ValueError(f"read_out needs shape (kernel, {view.n_heads}) over `{view.head_dim}`; got {values.shape}")
    if not np.all(np.isfinite(values)):
        raise ValueError("read_out holds NaN or infinity")
    return values


def _measured(view: Canonical, plan: Plan) -> dict[str, np.ndarray]:
    """Statistics stacked over (layer, batch, query_token), one block loaded at a time."""
    groups = view.groups()
    layers = []
    for layer in range(view.n_layers):
        A = view.matrix(layer)
        layers.append(_stacked([_row(view, plan, layer, row, A, groups) for row in range(view.n_rows)]))
    return _stacked(layers)


def _row(view: Canonical, plan: Plan, layer: int, row: int, A: np.ndarray, groups: np.ndarray) -> dict[str, np.ndarray]:
    block, selection = view.row(layer, row), view.selection(layer, row)
    found = []
    for at, size in zip(plan.at[row].tolist(), plan.window[row].tolist(), strict=True):
        real = window.executed(block, selection, A, groups, at, size, view.zoh)
        null = window.frozen(block, selection, A, groups, size, view.zoh)
        if plan.read_out is not None:
            real, null = core.read(plan.read_out, real), core.read(plan.read_out, null)
        statistics = window.statistics(real, plan.wavelet, plan.level, plan.depth)
        nulls = window.statistics(null, plan.wavelet, plan.level, plan.depth)
        found.append(statistics | {f"null_{name}": value for name, value in nulls.items()})
    return _stacked(found)


def _stacked(parts: list[dict[str, np.ndarray]]) -> dict[str, np.ndarray]:
    return {name: np.stack([part[name] for part in parts]) for name in parts[0]}


def _summaries(found: dict[str, np.ndarray], n_bootstrap: int, seed: int) -> dict[str, np.ndarray]:
    """Means over (batch, query_token, live kernels) of each layer, with intervals."""
    summary = {}
    for null in ("", "null_"):
        live = np.sum(~np.isnan(found[f"{null}best_cosine"]), axis=(2, 3))
        totals = {name: np.nansum(found[f"{null}{name}"], axis=(2, 3)) for name in SUMMARISED}
        totals["compaction"] = found.pop(f"{null}compaction").sum(axis=2)
        for name, total in totals.items():
            for end, value in _mean(total, live, n_bootstrap, seed).items():
                summary[f"layer_{null}{name}{end}"] = value
    return summary


def _mean(
    total: Float[np.ndarray, "layer batch *rest"], live: Int[np.ndarray, "layer batch"], n_bootstrap: int, seed: int
) -> dict[str, np.ndarray]:
    count = live.reshape(*live.shape, *[1] * (total.ndim - 2)).astype(float)

    def statistic(draws: np.ndarray) -> np.ndarray:
        summed, counted = np.einsum("b,lb...->l...", draws, total), np.einsum("b,lb...->l...", draws, count)
        return summed / np.where(counted > 0, counted, np.nan)

    n_rows = live.shape[1]
    low, high = interval(statistic, n_rows, n_bootstrap, seed)
    return {"": statistic(np.ones(n_rows, dtype=int)), "_low": low, "_high": high}


def _labels(view: Canonical, read_out: object) -> np.ndarray:
    if read_out is None:
        return view.heads
    if isinstance(read_out, xr.DataArray):
        return read_out["kernel"].values
    return np.arange(len(np.asarray(read_out)))


_TEXT = {
    "n_coefficients": ("coefficients that hold a share of the energy", "coefficient"),
    "coefficient_fraction": ("the same as a fraction of the window", "1"),
    "effective_rank": ("effective number of coefficients, exp of the entropy of their energy", "coefficient"),
    "best_cosine": ("|cosine| with the best single wavelet", "1"),
    "spike_best_cosine": ("|cosine| of a kernel of one single token with its best single wavelet (reference)", "1"),
    "best_level": ("level of that wavelet, log2 of its length in tokens", "level"),
    "best_shift": ("shift of that wavelet, in its own lengths from the window's start", "1"),
    "scaling_cosine": ("|cosine| with the scaling function (a constant, for Haar)", "1"),
    "capture": ("share of the energy in the coarse space, scaling function included", "1"),
    "wavelet_capture": ("share of the energy in the coarse space's wavelets, scaling function left out", "1"),
    "energy_by_level": ("share of the energy by level, 0 the scaling function", "1"),
    "principal_cosine": ("cosine of the principal angles between the kernels' span and the coarse space", "1"),
    "mean_squared_cosine": ("mean squared cosine of the principal angles", "1"),
    "random_mean_squared_cosine": ("the same expected of a random subspace of that rank (closed form)", "1"),
    "rank": ("numerical rank of the kernels", "1"),
    "n_dead": ("kernels without energy, left out", "kernel"),
    "compaction": ("share of the energy in the largest coefficients", "1"),
}

_PLACE = ("layer", "batch", "query_token")
_DIMS = {
    "n_coefficients": ("kernel", "energy_share"),
    "coefficient_fraction": ("kernel", "energy_share"),
    "energy_by_level": ("kernel", "level"),
    "principal_cosine": ("angle",),
    **dict.fromkeys(("mean_squared_cosine", "random_mean_squared_cosine", "rank", "n_dead"), ()),
}


def _entry(name: str, values: np.ndarray) -> Entry:
    base = name.removeprefix("layer_")
    end = next((end for end in ("_low", "_high") if base.endswith(end)), "")
    null = base.startswith("null_")
    base = base.removesuffix(end).removeprefix("null_")
    text, units = _TEXT[base]
    if name == "spike_best_cosine":
        return (), values, text, units
    text += {"": "", "_low": ", lower end of the interval", "_high": ", upper end of the interval"}[end]
    text += " (null: time-invariant layer)" if null else ""
    if name.startswith("layer_"):
        dims = ("layer", "coefficient")[: values.ndim]
        return dims, values, f"{text}, mean over rows, queries and kernels", units
    return (*_PLACE, *_DIMS.get(base, ("kernel",))), values, text, units


def _coords(
    view: Canonical,
    plan: Plan,
    query_tokens: Sequence[int] | Sequence[Sequence[int]] | np.ndarray | None,
    names: np.ndarray,
) -> dict[str, object]:
    one_set = query_tokens is not None and np.ndim(query_tokens) == 1
    labels = (
        np.asarray(query_tokens) if one_set else np.arange(plan.at.shape[1]) + (LAST if query_tokens is None else 0)
    )
    batch = view.coords()["batch"]
    position = np.stack([view.positions(row)[at] for row, at in enumerate(plan.at)])
    return {
        "layer": view.layers,
        "batch": batch,
        "query_token": labels,
        "kernel": names,
        "energy_share": list(window.SHARES),
        "level": np.arange(plan.depth + 1),
        "angle": np.arange(2**plan.level),
        "coefficient": 2 ** np.arange(plan.depth + 1),
        "query_position": (
            ("batch", "query_token"),
            position,
            {"long_name": "position of the query", "units": "token"},
        ),
        "window": (("batch", "query_token"), plan.window, {"long_name": "length of the window", "units": "token"}),
    }


def _attrs(view: Canonical, plan: Plan, read: bool, n_bootstrap: int, seed: int) -> dict[str, str]:
    return {
        "analysis": "wavelet_alignment",
        "estimator": "mixer kernels C_t exp(A Cum) delta_s B_s at unit energy, in a periodised wavelet basis (ours)",
        "kernel": "mixer" + (" after a read-out" if read else f", one a {view.head_dim}"),
        "wavelet": plan.wavelet,
        "coarse_level": str(plan.level),
        "window_rule": "the last 2^floor(log2 n) of the n valid tokens up to the query; nothing is padded",
        "null": "null_*: the layer made time-invariant, delta, B and C frozen to means over the row's valid tokens",
        "interval": "95 % percentile bootstrap over rows" if view.n_rows > 1 else "NaN: one row, nothing to resample",
        "reduces_over": "layer_*: batch, query_token, kernel (kernels with energy only)",
        "rank_tolerance": f"{core.RANK_TOLERANCE:g} of the largest pivot of a QR of the unit-energy kernels",
        "n_rows": str(view.n_rows),
        "n_bootstrap": str(n_bootstrap),
        "seed": str(seed),
    }
