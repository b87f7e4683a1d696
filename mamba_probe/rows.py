"""What a recorder holds between and during model calls: rows that calls continue, and the call under way."""

from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from mamba_probe.generating import Ended
from mamba_probe.keeping import Kept
from mamba_probe.lineage import fingerprint, parents
from mamba_probe.mixers import Call

__all__ = ["OpenCall", "Rows"]


@dataclass
class Rows:
    """The rows that one fresh call began, and every whole call that continued them."""

    batch: int
    call: int
    first: int
    """The trace's number of its first row."""
    n_valid: np.ndarray
    length: int = 0
    calls: list[Kept] = field(default_factory=list)
    coords: dict[str, list[np.ndarray]] = field(default_factory=dict)
    sums: dict[int, Tensor] = field(default_factory=dict)
    """delta_cumsum at the last token, by layer."""
    states: dict[int, Tensor] = field(default_factory=dict)
    """What the last step left, by layer."""

    def let_go(self) -> None:
        """Of what a step needs to continue them: none will."""
        self.sums, self.states = {}, {}


@dataclass
class OpenCall:
    """The model call under way; it enters its rows once its last layer has come."""

    rows: Rows
    length: int
    keep: list[int] | slice
    kept: Kept
    mask: Tensor | None
    continues: bool
    valid: np.ndarray = field(default_factory=lambda: np.ones(0, bool))
    """(batch, token), read from the device once the call is whole."""
    start: int = 0
    seen: set[int] = field(default_factory=set)
    sums: dict[int, Tensor] = field(default_factory=dict)
    """Those that `rows` will have; of a step only what it adds, till it is known which rows it adds to."""
    states: dict[int, Tensor] = field(default_factory=dict)
    came: list[Tensor] = field(default_factory=list)
    """Fingerprints of the states carried in, by layer, and of those left by the call before."""
    left: list[Tensor] = field(default_factory=list)
    ids: np.ndarray = field(default_factory=lambda: np.ones(0, int))
    """(batch, token), -1 where the model was given none."""
    parents: np.ndarray = field(default_factory=lambda: np.arange(0))
    """(batch,), the row of the call before that each row continues."""

    def put(self, call: Call, tensors: dict[str, Tensor]) -> None:
        """Keep what a layer made, and by which states its rows and those of the call before can be matched."""
        before = self.rows.states.get(call.layer)
        if call.state_in is not None and before is not None:
            self.came.append(fingerprint(call.state_in))
            self.left.append(fingerprint(before.to(call.state_in.dtype)))  # as the cache keeps it
        if call.state_out is not None:
            self.states[call.layer] = call.state_out.detach()
        if "delta_cumsum" in tensors:
            sums = tensors.pop("delta_cumsum") if self.continues else tensors["delta_cumsum"][:, -1:].clone()
            self.sums[call.layer] = sums
        self.kept.put(call.layer, tensors)
        self.seen.add(call.layer)

    def complete(self, ids: Tensor | None, ended: Ended | None) -> None:
        """All layers have come: which rows were continued, with which ids, which of them tokens.

        Raises:
            ValueError: a row that continues none.
        """
        rows = self.rows
        shape = rows.batch, self.length
        self.parents = parents(self.came, self.left) if self.came else np.arange(rows.batch)
        known = ids is not None and tuple(ids.shape) == shape
        self.ids = ids.cpu().numpy() if ids is not None and known else np.full(shape, -1)
        self.valid = np.ones(shape, bool) if self.mask is None else self.mask.cpu().numpy()
        if ended is not None:
            self.valid = self.valid & ~ended.padding(self.ids, self.parents if self.continues else None)
        if self.continues:
            self._add_sums()

    def _add_sums(self) -> None:
        """To delta_cumsum of a step what the rows that it continues had."""
        earlier = self.rows.sums
        if (self.parents != np.arange(self.rows.batch)).any():
            earlier = {layer: sums[torch.from_numpy(self.parents)] for layer, sums in earlier.items()}
        for layer, added in self.sums.items():
            total = added + earlier[layer]
            self.kept.put(layer, {"delta_cumsum": total})
            self.sums[layer] = total[:, -1:].clone()

    def enter(self) -> None:
        """Take the call into its rows."""
        rows = self.rows
        rows.calls.append(self.kept)
        for name, value in self._coords().items():
            rows.coords.setdefault(name, []).append(value[:, self.keep])
        rows.n_valid = rows.n_valid[self.parents] + self.valid.sum(axis=1)
        rows.length += self.length
        rows.sums, rows.states = self.sums, self.states

    def _coords(self) -> dict[str, np.ndarray]:
        shape, valid = self.valid.shape, self.valid
        before = self.rows.n_valid[self.parents]
        parent_row = np.repeat(np.arange(shape[0])[:, None], self.length, axis=1)
        parent_row[:, 0] = self.parents
        return {
            "valid": valid,
            "phase": np.where(valid, "decode" if self.continues and self.length == 1 else "prefill", ""),
            "token_id": self.ids,
            "position": np.where(valid, before[:, None] + np.cumsum(valid, axis=1) - 1, -1),
            "prediction": np.full(shape, -1),
            "parent_row": self.rows.first + parent_row,
        }
