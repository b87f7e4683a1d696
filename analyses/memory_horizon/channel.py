"""Horizons of one channel in every row, as executed and of its nulls: counted, and summed up by state."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Float, Int

from mamba_probe.analyses.memory_horizon import core, survival
from mamba_probe.analyses.memory_horizon.options import QUANTILES, Options
from mamba_probe.analyses.memory_horizon.path import TIE, Path
from mamba_probe.analyses.memory_horizon.summary import Counts, found_quantiles, share

__all__ = ["KINDS", "Channel", "at", "statistics", "tally"]

KINDS = ("forward", "backward", "null_shuffle", "null_lti")

Horizons = tuple[Int[np.ndarray, "state _"], Bool[np.ndarray, "state _"]]


@dataclass(frozen=True)
class Channel:
    """Cumulative delta of a channel in each row.

    Attributes:
        positions: of the tokens of each row.
        executed: as it was.
        shuffled: delta in another order; none where tokens are missing.
        means: mean delta of each row.
    """

    positions: list[Int[np.ndarray, " _"]]
    executed: list[Path]
    shuffled: list[Path]
    means: Float[np.ndarray, " row"]

    @property
    def contiguous(self) -> bool:
        """Whether no row has a gap between its tokens."""
        return all(np.ptp(position) + 1 == len(position) for position in self.positions)

    def horizons(
        self, threshold: Float[np.ndarray, " state"], kinds: Sequence[str] = KINDS
    ) -> dict[str, list[Horizons]]:
        """Horizons and whether each is censored, by kind and row."""
        reached, shuffled = ([path.reached(threshold) for path in paths] for paths in (self.executed, self.shuffled))
        equal = [core.lti(threshold * (1 - TIE), mean[None]) for mean in self.means]
        ways = {
            "forward": (core.forward, reached),
            "backward": (core.backward, reached),
            "null_shuffle": (core.forward, shuffled),
            "null_lti": (core.frozen, equal),
        }
        return {
            kind: list(map(horizon, by_row, self.positions))
            for kind, (horizon, by_row) in ways.items()
            if kind in kinds
        }


def tally(horizons: list[Horizons], n_states: int, options: Options) -> Counts:
    """Horizons counted by unit of resampling, in bins that end above the longest, where every curve has ended too."""
    size = 3 + max((int(steps.max()) for steps, _ in horizons), default=0)
    counted = Counts(*np.zeros((2, len(options.units), n_states, size), dtype=np.int64))
    for unit, (row, part) in enumerate(options.units if horizons else ()):
        steps, censored = horizons[row]
        counted.exact[unit], counted.least[unit] = core.counts(steps[:, part], censored[:, part], size)
    return counted


def statistics(tallies: dict[str, Counts], within: int) -> dict[str, np.ndarray]:
    """Statistics of each state, state last; a restricted mean counts up to `within` tokens."""
    parts = {}
    for kind, counts in tallies.items():
        exact, least = counts.exact.sum(axis=0), counts.least.sum(axis=0)
        parts[f"{kind}_horizon"] = found_quantiles(exact).T
        parts[f"{kind}_horizon_at_least"] = found_quantiles(least).T
        parts[f"{kind}_censored_share"] = share(exact)
        if kind in ("forward", "backward"):
            survived = survival.curve(exact, least)
            parts[f"{kind}_km_horizon"] = survival.curve_quantiles(survived, QUANTILES).T
            parts[f"{kind}_restricted_mean"] = survival.restricted_mean(survived, within)
    return parts


def at(horizons: dict[str, list[Horizons]], indices: list[list[int]]) -> dict[str, np.ndarray]:
    """Horizons of the requested tokens, given by index in each row: (batch, query_token, state)."""
    parts = {}
    for kind in ("forward", "backward"):
        steps, censored = (
            np.stack([of[:, asked].T for of, asked in zip(by_row, indices, strict=True)])
            for by_row in zip(*horizons[kind], strict=True)
        )
        parts[f"token_{kind}_horizon"] = np.where(censored, np.inf, steps)
        parts[f"token_{kind}_horizon_at_least"] = steps.astype(float)
    return parts
