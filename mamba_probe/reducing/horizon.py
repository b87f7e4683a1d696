"""Memory horizons counted by class of the token that was written: the definitions and the core of memory_horizon."""

from collections.abc import Iterator

import numpy as np
import xarray as xr
from jaxtyping import Bool, Float, Int

from mamba_probe.analyses.common import Canonical, described
from mamba_probe.analyses.memory_horizon import core, survival
from mamba_probe.analyses.memory_horizon.asked import asked_levels
from mamba_probe.analyses.memory_horizon.channel import Channel
from mamba_probe.analyses.memory_horizon.layer import columns, state_slices
from mamba_probe.analyses.memory_horizon.options import QUANTILES
from mamba_probe.analyses.memory_horizon.path import Path
from mamba_probe.analyses.memory_horizon.summary import found_quantiles, share
from mamba_probe.reducing.reduction import ALL, Accumulating, Part, bounded, n_units, parts

__all__ = ["Horizon"]

KINDS = ("forward", "null_lti")
OF = {"forward": "forward horizon", "null_lti": "forward horizon with delta at its row's mean (null)"}


class Horizon(Accumulating):
    """See `horizon`."""

    variables = ("delta", "A")

    def __init__(
        self, level: float | str = "1/e", *, by_channel: bool = False, name: str | None = None, n_bootstrap: int = 200,
        seed: int = 0,
    ):  # fmt: skip
        super().__init__(n_bootstrap, seed)
        if not isinstance(level, float | str):
            raise ValueError(f"level is one retention, a number in (0, 1) or a name; got {level!r}")
        ((self.level_name, self.level),) = asked_levels(level).items()
        self.by_channel, self.prefix = by_channel, f"{name}_" if name else ""

    def __repr__(self) -> str:
        name = self.prefix.removesuffix("_")
        return f"Horizon({self.level:.17g}, by_channel={self.by_channel}, name={name!r}, {self.drawn})"

    def update(self, trace: xr.Dataset) -> None:
        """Fold in the next rows; padding within a row decays, so it needs `delta_cumsum`."""
        view = Canonical(trace, "delta", "A")
        threshold = np.stack([core.reach(self.level, view.decay(place)) for place in range(view.n_layers)])
        self.keep({"layer": view.layers, "head_dim": view.head_dim, "head": view.heads, "n_units": n_units(trace),
                   "size": trace.sizes["token"] + 3, "threshold": threshold})  # fmt: skip
        if int(self.constant("size")) != trace.sizes["token"] + 3:
            raise ValueError(
                f"pieces of a trace need one number of tokens; got {trace.sizes['token']} after"
                f" {int(self.constant('size')) - 3}"
            )
        units = int(self.constant("n_units"))
        for part in parts(trace):
            self.held(ALL, "tokens", (units,))[part.unit] += part.valid.sum()
            for place in range(view.n_layers):
                self._count(view, part, place, threshold[place])

    def _count(self, view: Canonical, part: Part, place: int, threshold: Float[np.ndarray, "head state"]) -> None:
        units, size = int(self.constant("n_units")), int(self.constant("size"))
        row = view.row(place, part.row)
        span, n_tokens = core.elapsed(row.delta, row.cumulative, row.position)
        self.held(ALL, "elapsed", (units, view.n_layers, view.n_heads))[part.unit, place] += span
        self.held(ALL, "spanned", (units, view.n_layers))[part.unit, place] += n_tokens
        for head, path in enumerate(columns(row.cumulative)):
            channel = Channel([row.position], [Path(path)], [], np.array([span[head] / n_tokens]))
            for kind, of, counts in _counted(channel, threshold[head], part.members, size):
                self.held(of, kind, (units, view.n_layers, 2, size), np.int64)[part.unit, place] += counts
                if self.by_channel and kind == "forward":
                    held = self.held(of, "by_channel", (view.n_layers, view.n_heads, 2, size), np.int64)
                    held[place, head] += counts

    def result(self) -> xr.Dataset:
        """Quantiles over tokens, channels and states by class and layer, with their null and intervals."""
        layers, head, pre = self.constant("layer"), str(self.constant("head_dim")), self.prefix
        at, entries = ("class", "layer", "quantile"), {}
        found = [[self._layer(of, place) for place in range(len(layers))] for of in self.classes]
        for name in found[0][0]:
            values = np.stack([np.stack([one[name] for one in by_layer]) for by_layer in found])
            entries[f"{pre}layer_{name}"] = (at[: values.ndim], values, self._text(name), _unit(name))
        lti = [self._lti(place) for place in range(len(layers))]
        for end in lti[0]:
            values = np.stack([one[end] for one in lti])
            entries[f"{pre}layer_lti_horizon{end}"] = (at[1:], values, self._text(f"lti_horizon{end}"), "token")
        entries[f"{pre}lti_horizon"] = (
            ("layer", head, "state"),
            self._equivalent(),
            self._text("lti_horizon"),
            "token",
        )
        if self.by_channel:
            exact, least = np.moveaxis(np.stack([self.arrays[of, "by_channel"] for of in self.classes]), -2, 0)
            over = ("class", "layer", head, "quantile")
            for end, counts in (("", exact), ("_at_least", least)):
                text = self._text(f"forward_horizon{end}")
                entries[f"{pre}forward_horizon{end}"] = (over, found_quantiles(counts), text, "token")
        coords = {"class": np.array(self.classes, dtype=object), "layer": layers, "quantile": list(QUANTILES)}
        return described(entries, coords | {head: self.constant("head")}, {})

    def _layer(self, of: str, place: int) -> dict[str, np.ndarray]:
        """Everything of one class and layer, by name."""
        counts = np.stack([self.arrays[of, kind][:, place] for kind in KINDS], axis=1)

        def statistic(draws: Int[np.ndarray, " unit"]) -> np.ndarray:
            exact, least = np.moveaxis(np.tensordot(draws, counts, 1), 1, 0)
            quantiles, survived = found_quantiles(exact), survival.curve(exact, least)
            gain = core.ratio(quantiles[0, 1:2], quantiles[1, 1:2])
            km = survival.curve_quantiles(survived[:1], QUANTILES)
            return np.concatenate([quantiles.ravel(), km.ravel(), gain])

        found, n = {}, len(QUANTILES)
        for end, values in bounded(statistic, len(counts), self.n_bootstrap, self.seed).items():
            forward, null, km, gain = np.split(values, [n, 2 * n, 3 * n])
            found |= {f"forward_horizon{end}": forward, f"null_lti_horizon{end}": null}
            found |= {f"forward_km_horizon{end}": km, f"selectivity_gain{end}": gain[0]}
        exact, least = np.moveaxis(counts.sum(axis=0), 1, 0)
        for i, kind in enumerate(KINDS):
            found[f"{kind}_horizon_at_least"] = found_quantiles(least[i])
            found[f"{kind}_censored_share"] = share(exact[i])
        return found

    def _lti(self, place: int) -> dict[str, np.ndarray]:
        """Quantiles over channels and states of the horizon with delta at its mean over all tokens."""
        elapsed, spanned = self.arrays[ALL, "elapsed"][:, place], self.arrays[ALL, "spanned"][:, place]
        threshold = self.constant("threshold")[place]

        def statistic(draws: Int[np.ndarray, " unit"]) -> np.ndarray:
            mean = (draws @ elapsed) / (draws @ spanned)
            return np.quantile(core.lti(threshold, mean[:, None]), QUANTILES, method="inverted_cdf")

        return bounded(statistic, len(spanned), self.n_bootstrap, self.seed)

    def _equivalent(self) -> Float[np.ndarray, "layer head state"]:
        mean = self.arrays[ALL, "elapsed"].sum(axis=0) / self.arrays[ALL, "spanned"].sum(axis=0)[:, None]
        return core.lti(self.constant("threshold"), mean[..., None])

    def _text(self, name: str) -> str:
        ends = {"_low": ", lower end", "_high": ", upper end", "_at_least": ", each censored one at its least"}
        end = next((end for end in ends if name.endswith(end)), "")
        texts = {f"{kind}_horizon": text for kind, text in OF.items()} | {
            f"{kind}_censored_share": f"share of censored among: {text}" for kind, text in OF.items()
        }
        texts |= {"forward_km_horizon": "forward horizon, Kaplan-Meier", "lti_horizon": "-ln(level) / (|A| mean delta)",
                  "selectivity_gain": "median forward horizon over that of its null"}  # fmt: skip
        return f"{texts[name.removesuffix(end)]} at level {self.level_name}{ends.get(end, '')}"


def _unit(name: str) -> str:
    return "1" if "share" in name or "gain" in name else "token"


def _counted(
    channel: Channel, threshold: Float[np.ndarray, " state"], members: dict[str, Bool[np.ndarray, " token"]], size: int
) -> Iterator[tuple[str, str, Int[np.ndarray, "exact_least=2 size"]]]:
    """Horizons of one channel of one row, counted over the states: by kind and class."""
    for states in state_slices(channel.positions, len(threshold)):
        for kind, ((steps, censored),) in channel.horizons(threshold[states], KINDS).items():
            for of, member in members.items():
                exact, least = core.counts(steps[:, member], censored[:, member], size)
                yield kind, of, np.stack([exact.sum(axis=0), least.sum(axis=0)])
