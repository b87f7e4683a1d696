"""What another run left of a quantity, for `mamba_probe.edits.swap`."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

__all__ = ["OtherRun"]


@dataclass(frozen=True)
class OtherRun:
    """A trace, or the cache of `run_with_cache`, as the place that `target` comes from."""

    target: str
    hook: str
    """The target's hook point, by which a cache has it."""
    run: Any

    def at(self, layer: int, like: Tensor, tokens: Sequence[int]) -> Tensor:
        """(batch, token, ...) with the axes of `like`, at these tokens of the sequence.

        Raises:
            ValueError: the run has not this quantity, layer or token, or of another size.
        """
        values, held = self._cached(layer) if self._is_cache else self._traced(layer)
        absent = sorted(set(tokens) - set(held))
        if absent:
            raise ValueError(f"{self}: the other run holds no token {absent[0]}, which this one has")
        chosen = values[:, [held.index(token) for token in tokens]]
        there, here = chosen.shape[2:], like.shape[2:]
        if there.numel() != here.numel():
            raise ValueError(f"{self}: the other run has {tuple(there)} a token, this one {tuple(here)}")
        return chosen.reshape(*chosen.shape[:2], *here)

    def __str__(self) -> str:
        return f"swap({self.target})"

    @property
    def _is_cache(self) -> bool:
        return isinstance(self.run, Mapping) and not hasattr(self.run, "data_vars")

    def _cached(self, layer: int) -> tuple[Tensor, list[int]]:
        name = f"blocks.{layer}.mixer.{self.hook}"
        if name not in self.run:
            raise ValueError(f"{self}: the cache holds no {name}: name it in names_filter")
        return self.run[name], list(range(self.run[name].shape[1]))

    def _traced(self, layer: int) -> tuple[Tensor, list[int]]:
        if self.target not in getattr(self.run, "data_vars", ()):
            raise ValueError(f"{self}: the trace holds no {self.target}: record it with variables=[...]")
        if layer not in self.run["layer"]:
            raise ValueError(f"{self}: the trace holds no layer {layer}: record it with layers=[...]")
        return torch.as_tensor(self.run[self.target].sel(layer=layer).values), self.run["token"].values.tolist()
