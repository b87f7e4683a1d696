"""The recorder: takes what the taps hand over while a model runs and makes one trace of it.

A call without a cached state begins new rows (`batch`); a call that carries a state in continues the rows before it,
so that `generate()` becomes one sequence a row: its prefill and every step.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
import xarray as xr
from torch import Tensor

from mamba_probe.kernels.emission import EMITTABLE, Emit
from mamba_probe.mixers import Call, Sizes
from mamba_probe.trace.schema import VARIABLES

__all__ = ["Plan", "Recorder"]


@dataclass(frozen=True)
class Plan:
    """What to record: checked names, layers, tokens and channels."""

    sizes: Sizes
    variables: tuple[str, ...]
    layers: tuple[int, ...]
    tokens: tuple[int, ...] | None = None
    channels: tuple[int, ...] | None = None

    @property
    def steps(self) -> tuple[str, ...]:
        """The variables with a token dimension."""
        return tuple(name for name in self.variables if not VARIABLES[name].static(self.sizes.family))


@dataclass
class _Rows:
    """The rows that one fresh call began, and every whole call that continued them."""

    batch: int
    call: int
    length: int = 0
    n_valid: np.ndarray | int = 0
    tensors: dict[tuple[int, str], list[np.ndarray]] = field(default_factory=dict)
    coords: dict[str, list[np.ndarray]] = field(default_factory=dict)
    state_out: Tensor | None = None


@dataclass
class _Open:
    """The model call under way; it enters its rows once its last layer has come."""

    rows: _Rows
    length: int
    keep: list[int] | slice
    valid: np.ndarray
    tensors: dict[tuple[int, str], np.ndarray] = field(default_factory=dict)
    coords: dict[str, np.ndarray] = field(default_factory=dict)
    start: int = 0
    seen: set[int] = field(default_factory=set)
    state_out: Tensor | None = None


class Recorder:
    """Listens to the taps; `dataset` holds the trace once the block it records is left."""

    def __init__(self, plan: Plan, statics: dict[str, np.ndarray], attrs: dict[str, Any]):
        self._plan, self._statics, self._attrs = plan, statics, attrs
        self._blocks: list[_Rows] = []
        self._open: _Open | None = None
        self._ids: Tensor | None = None
        self._kept_logits: int | Tensor = 0
        self._edits: dict[str, None] = {}
        self._calls = 0
        self._dataset: xr.Dataset | None = None

    def __repr__(self) -> str:
        plan = f"{', '.join(self._plan.variables)} of {len(self._plan.layers)} layer(s)"
        state = "whole" if self._dataset is not None else f"open, {self._calls} call(s) so far"
        return f"Recorder({plan}; {state})"

    @property
    def dataset(self) -> xr.Dataset:
        """The trace.

        Raises:
            ValueError: the block is still open, or no model call was recorded.
        """
        if self._dataset is None:
            raise ValueError("nothing recorded yet: run the model inside the `recording` block, and leave it")
        return self._dataset

    # -- from the probe ------------------------------------------------------------------------------------------

    def begin(self, input_ids: Tensor | None, kept_logits: int | Tensor = 0) -> None:
        """A model call starts, with these ids (None: hidden states, or unknown) and `logits_to_keep`."""
        self._open, self._ids, self._kept_logits = None, input_ids, kept_logits

    def end(self, logits: Tensor | None) -> None:
        """A model call is over, or broke off: note what it would answer where it gave logits.

        Raises:
            ValueError: logits of valid tokens that are NaN or infinite.
        """
        call, self._open, self._ids = self._open, None, None
        if call is None or logits is None or len(call.seen) < len(self._plan.layers):
            return
        where = np.arange(call.length)
        if isinstance(self._kept_logits, Tensor):
            where = where[self._kept_logits.cpu().numpy()]
        elif self._kept_logits:
            where = where[-self._kept_logits :]
        bad = ~torch.isfinite(logits).all(-1).cpu().numpy() & call.valid[:, where]
        if bad.any():
            row, at = map(int, np.argwhere(bad)[0])
            raise ValueError(f"the logits are NaN or infinite at token {call.start + where[at]} of row {row}")
        prediction = np.full((call.rows.batch, call.length), -1, dtype=np.int64)
        prediction[:, where] = logits.argmax(-1).cpu().numpy()
        call.rows.coords["prediction"][-1] = prediction[:, call.keep]

    def close(self) -> xr.Dataset | None:
        """Make the trace of every whole call; None where there was none."""
        if self._blocks:
            attrs = self._attrs | {"edits": "; ".join(self._edits)}
            self._dataset = _assemble(self._plan, self._blocks, self._statics, attrs)
            self._blocks = []
        return self._dataset

    # -- from the taps -------------------------------------------------------------------------------------------

    def wants(self, layer: int, continues: bool, length: int) -> Emit | None:
        """See `mamba_probe.mixers.tap.Listener`."""
        if layer not in self._plan.layers:
            return None
        start = self._blocks[-1].length if continues and self._blocks else 0
        names = tuple(name for name in self._plan.steps if name in EMITTABLE)
        return Emit(names, tokens=self._within(start, length), channels=self._plan.channels)

    def receive(self, call: Call) -> None:
        """See `mamba_probe.mixers.tap.Listener`."""
        if call.layer not in self._plan.layers:
            return
        if self._open is None or call.layer in self._open.seen:
            self._open = self._started(call)
        if any(edit.startswith("ablate(decay") for edit in call.edits):
            self._check_decay(call.layer)
        under_way = self._open
        self._edits |= dict.fromkeys(call.edits)
        if call.layer == self._plan.layers[0]:
            _check_continuity(call, under_way.rows.state_out)
            under_way.state_out = call.state_out
        for name in self._plan.steps:
            array = self._array(call, name, under_way)
            _check_finite(array, under_way.valid[:, under_way.keep], name, call.layer, under_way.rows.length)
            under_way.tensors[call.layer, name] = array
        under_way.seen.add(call.layer)
        if len(under_way.seen) == len(self._plan.layers):
            self._commit(under_way)

    def _check_decay(self, layer: int) -> None:
        """Refuse constants of the weights that an ablated decay contradicts."""
        constant = [name for name in ("A", "A_bar") if name in self._plan.variables and name not in self._plan.steps]
        if constant:
            other = "A_bar is 1 there, and constant" if "A_bar" in constant else "record A_bar in place of A"
            raise ValueError(
                f"layer {layer}: under ablate(decay) A_bar is 1 whatever A says, so {' and '.join(constant)} of the"
                f" weights would be wrong in the trace: {other}"
            )

    def _within(self, start: int, length: int) -> tuple[int, ...] | None:
        if self._plan.tokens is None:
            return None
        return tuple(token - start for token in self._plan.tokens if start <= token < start + length)

    def _started(self, call: Call) -> _Open:
        batch, length = call.tensors["out"].shape[:2]
        if call.continues and length > 1 and call.state_in is None:
            raise ValueError(
                f"layer {call.layer}: this call continues a cached sequence by {length} tokens, and transformers drops"
                " the cached state of a MambaMixer then (it starts from zero). Record the whole prompt in one call, or"
                " continue it token by token."
            )
        if call.continues and not self._blocks:
            raise ValueError(
                f"layer {call.layer}: this call continues a cached sequence whose beginning was not recorded, so its"
                " positions and sums are unknown. Open the recording before the prompt runs."
            )
        rows = self._blocks[-1] if call.continues else _Rows(batch, self._calls)
        if rows.batch != batch:
            raise ValueError(
                f"a call with {batch} rows continues a recording of {rows.batch}: rows were dropped or repeated"
                " between steps. Record each set of prompts in its own `recording` block."
            )
        selected = self._within(rows.length, length)
        keep = slice(None) if selected is None else list(selected)
        valid = np.ones((batch, length), bool) if call.valid is None else call.valid.cpu().numpy()
        ids = self._ids if self._ids is not None and tuple(self._ids.shape) == (batch, length) else None
        before = rows.n_valid if isinstance(rows.n_valid, np.ndarray) else np.zeros(batch, np.int64)
        coords = {
            "valid": valid,
            "phase": np.where(valid, "decode" if call.continues and length == 1 else "prefill", ""),
            "token_id": np.full((batch, length), -1) if ids is None else ids.cpu().numpy(),
            "position": np.where(valid, before[:, None] + np.cumsum(valid, axis=1) - 1, -1),
            "prediction": np.full((batch, length), -1),
        }
        kept = {name: value[:, keep] for name, value in coords.items()}
        return _Open(rows, length, keep, valid, coords=kept, start=rows.length)

    def _commit(self, call: _Open) -> None:
        rows = call.rows
        if not self._blocks or self._blocks[-1] is not rows:
            self._blocks.append(rows)
        for source, kept in ((call.tensors, rows.tensors), (call.coords, rows.coords)):
            for key, array in source.items():
                kept.setdefault(key, []).append(array)  # type: ignore[arg-type]
        call.tensors = {}
        rows.n_valid = rows.n_valid + call.valid.sum(axis=1)
        rows.length += call.length
        rows.state_out = call.state_out
        self._calls += 1

    def _array(self, call: Call, name: str, under_way: _Open) -> np.ndarray:
        tensor = call.tensors[name]
        if name not in EMITTABLE:  # x, z, u, out: not the scan's to select
            tensor = tensor[:, under_way.keep]
            if name not in ("u", "out") and self._plan.channels is not None:
                tensor = tensor[:, :, list(self._plan.channels)]
        array = _numpy(tensor)
        if self._plan.sizes.family != "mamba2" and name in ("x", "z", "y", "h"):
            array = array[:, :, :, 0]
        if name == "delta_cumsum" and (earlier := under_way.rows.tensors.get((call.layer, name))):
            array = array + earlier[-1][:, -1:]
        return array


def _check_continuity(call: Call, before: Tensor | None) -> None:
    """The state that comes in must be the one that went out: else rows are no sequences (beam search)."""
    if call.state_in is None or before is None:
        return
    if not torch.allclose(call.state_in.to(before.dtype), before, rtol=1e-2, atol=1e-6):
        raise ValueError(
            f"layer {call.layer}: the state of this step is not the one the last step left: rows were"
            " reordered (beam search?) or the cache was edited. Record with num_beams=1."
        )


def _numpy(tensor: Tensor) -> np.ndarray:
    """On the host, fp32 at least: bf16 and fp16 widen exactly."""
    tensor = tensor.detach()
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32)).cpu().numpy()


def _check_finite(array: np.ndarray, valid: np.ndarray, name: str, layer: int, start: int) -> None:
    if np.isfinite(array).all():
        return
    bad = ~np.isfinite(array).reshape(*array.shape[:2], -1).all(-1) & valid
    if bad.any():
        row, token = map(int, np.argwhere(bad)[0])
        raise ValueError(
            f"`{name}` of layer {layer} is NaN or infinite at token {start + token} of row {row}"
            f" ({int(bad.sum())} tokens in all): check the input and this layer's weights"
        )


def _joined(parts: Sequence[np.ndarray]) -> np.ndarray:
    return parts[0] if len(parts) == 1 else np.concatenate(parts, axis=1)


def _assemble(plan: Plan, blocks: list[_Rows], statics: dict[str, np.ndarray], attrs: dict[str, Any]) -> xr.Dataset:
    """One Dataset from all rows: shorter rows and padding are NaN, with `valid` False."""
    family = plan.sizes.family
    starts = np.cumsum([0, *(block.batch for block in blocks)])
    shape = (int(starts[-1]), max(_joined(block.coords["valid"]).shape[1] for block in blocks))
    coords = {name: _coord(name, blocks, starts, shape) for name in _ABSENT}
    data = {}
    for name in plan.variables:
        spec = VARIABLES[name]
        values = _steps(plan, name, blocks, starts, shape, coords["valid"]) if name in plan.steps else statics[name]
        text = {"long_name": spec.long_name, "units": spec.units, "symbol": spec.symbol}
        data[name] = (spec.dims(family), values, text)
    known = {name: value for name, value in coords.items() if name in ("valid", "phase") or (value != -1).any()}
    per_row = {"prompt_id": np.arange(shape[0]), "call": np.repeat([b.call for b in blocks], [b.batch for b in blocks])}
    index = {
        "layer": list(plan.layers),
        "token": list(range(shape[1]) if plan.tokens is None else plan.tokens),
        "head" if family == "mamba2" else "channel": list(
            range(plan.sizes.n_heads) if plan.channels is None else plan.channels
        ),
    }
    labelled = {name: (("batch", "token"), value) for name, value in known.items()}
    dataset = xr.Dataset(data, labelled | {name: ("batch", value) for name, value in per_row.items()}, attrs)
    return dataset.assign_coords({dim: value for dim, value in index.items() if dim in dataset.dims})


_ABSENT = {"valid": False, "phase": "", "token_id": -1, "position": -1, "prediction": -1}


def _coord(name: str, blocks: list[_Rows], starts: np.ndarray, shape: tuple[int, int]) -> np.ndarray:
    full = np.full(shape, _ABSENT[name], dtype={"valid": bool, "phase": "<U7"}.get(name, np.int64))
    for block, start in zip(blocks, starts, strict=False):
        joined = _joined(block.coords[name])
        full[start : start + block.batch, : joined.shape[1]] = joined
    return full.astype(object) if name == "phase" else full


def _steps(
    plan: Plan, name: str, blocks: list[_Rows], starts: np.ndarray, shape: tuple[int, int], valid: np.ndarray
) -> np.ndarray:
    first = blocks[0].tensors[plan.layers[0], name][0]
    full = np.full((len(plan.layers), *shape, *first.shape[2:]), np.nan, dtype=first.dtype)
    for i, layer in enumerate(plan.layers):
        for block, start in zip(blocks, starts, strict=False):
            joined = _joined(block.tensors.pop((layer, name)))
            full[i, start : start + block.batch, : joined.shape[1]] = joined
        full[i][~valid] = np.nan
    return full
