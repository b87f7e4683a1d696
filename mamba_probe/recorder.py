"""The recorder: takes what the taps hand over while a model runs and makes one trace of it.

A call without a cached state begins new rows (`batch`); a call that carries a state in continues the rows before it,
so that `generate()` becomes one sequence a row: its prefill and every step. Which earlier row a row continues is told
by its state (`mamba_probe.lineage`), which of a step's tokens are padding by `mamba_probe.generating`.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import islice
from typing import Any, Protocol

import numpy as np
import torch
import xarray as xr
from torch import Tensor

from mamba_probe.generating import Ended
from mamba_probe.keeping import Courier, Kept
from mamba_probe.kernels.emission import EMITTABLE, Emit
from mamba_probe.mixers import Call, Sizes
from mamba_probe.rows import OpenCall, Rows
from mamba_probe.showing import recorder_html, recorder_text
from mamba_probe.trace.contract import DIRECTED
from mamba_probe.trace.schema import VARIABLES

__all__ = ["ABSENT", "Plan", "Recorder", "Sink", "assembled"]


@dataclass(frozen=True)
class Plan:
    """What to record: checked names, layers, tokens and channels."""

    sizes: Sizes
    variables: tuple[str, ...]
    layers: tuple[int, ...]
    tokens: tuple[int, ...] | None = None
    channels: tuple[int, ...] | None = None

    @cached_property
    def steps(self) -> tuple[str, ...]:
        """The variables with a token dimension."""
        return tuple(name for name in self.variables if not VARIABLES[name].static(self.sizes.family))


class Sink(Protocol):
    """Where blocks of rows go while a recording is under way: see `mamba_probe.streaming`."""

    def kept(self, courier: Courier, first: int, mask: Tensor | None) -> Kept:
        """Where the tensors of a call go that begins rows from `first` on."""
        ...

    def take(self, block: xr.Dataset, first: int) -> None:
        """Rows from `first` on, whole."""

    def close(self, whole: bool) -> None:
        """No more will come. `whole`: nothing was broken off."""

    def opened(self) -> xr.Dataset:
        """The trace, of a sink that is closed and took any rows."""
        ...


class Recorder:
    """Listens to the taps; `dataset` holds the trace once the block it records is left.

    With keep "host" a layer's tensors leave for the host at once, beside the next layers' work; with "device" they stay
    in `tensors`, and go to the host when `dataset` is first read. With a `sink` rows leave once they are whole.
    """

    def __init__(
        self, plan: Plan, statics: dict[str, np.ndarray], attrs: dict[str, Any], keep: str = "host",
        sink: Sink | None = None,
    ):  # fmt: skip
        self._plan, self._statics, self._attrs, self._keep, self._sink = plan, statics, attrs, keep, sink
        self._rows = 0
        names = tuple(name for name in plan.steps if name in EMITTABLE)
        self._emit = Emit(names, channels=plan.channels)
        self._courier = Courier()
        self._blocks: list[Rows] = []
        self._open: OpenCall | None = None
        self._ids: Tensor | None = None
        self._kept_logits: int | Tensor = 0
        self._ended: Ended | None = None
        self._edits: dict[str, None] = {}
        self._calls = 0
        self._dataset: xr.Dataset | None = None
        self._closed = False

    __repr__, _repr_html_ = recorder_text, recorder_html

    @property
    def n_calls(self) -> int:
        """Whole model calls recorded so far."""
        return self._calls

    @property
    def dataset(self) -> xr.Dataset:
        """The trace.

        Raises:
            ValueError: the block is still open, or no model call was recorded.
        """
        if not self._closed or not self._calls:
            raise ValueError("nothing recorded yet: run the model inside the `recording` block, and leave it")
        if self._dataset is None:
            self._dataset = self._assembled(self._blocks) if self._sink is None else self._sink.opened()
            if self._keep == "host":  # the trace has their memory now
                self._blocks = []
        return self._dataset

    def _assembled(self, blocks: list[Rows]) -> xr.Dataset:
        attrs = self._attrs | {"edits": "; ".join(self._edits)}
        trace = assembled(self._plan, blocks, self._statics, attrs, self._courier, every=self._sink is not None)
        if not all(call.posted for rows in blocks for call in rows.calls):
            self._courier.wait()
        return trace

    @property
    def tensors(self) -> tuple[Mapping[tuple[int, str], Tensor], ...]:
        """What each whole model call made, by (layer, variable), on its device and in its own dtype.

        Raises:
            ValueError: the recording keeps its tensors on the host.
        """
        if self._keep == "host":
            raise ValueError('the tensors went to the host, see `dataset`: open with probe.recording(keep="device")')
        return tuple(call.tensors for rows in self._blocks for call in rows.calls)

    # -- from the probe ------------------------------------------------------------------------------------------

    def begin(self, input_ids: Tensor | None, kept_logits: int | Tensor = 0) -> None:
        """A model call starts, with these ids (None: hidden states, or unknown) and `logits_to_keep`."""
        self._open, self._ids, self._kept_logits = None, input_ids, kept_logits

    def generating(self, ended: Ended | None) -> None:
        """A `generate()` begins, whose padding this tells from tokens (None: it knows no end), or is over (None)."""
        self._ended = ended

    def end(self, logits: Tensor | None, whole: bool) -> None:
        """A model call is over, `whole` or broken off: note what it would answer where it gave logits.

        Raises:
            ValueError: a recorded layer that did not run in a whole call; logits of valid tokens that are NaN or
                infinite.
        """
        call, self._open, self._ids = self._open, None, None
        missing = [] if call is None else [layer for layer in self._plan.layers if layer not in call.seen]
        if whole and missing:
            raise ValueError(
                f"layer(s) {', '.join(map(str, missing))} did not run in this call of the model, which is not kept:"
                " record those that do, layers=[...]"
            )
        if call is None or logits is None or missing:
            return
        where = np.arange(call.length)
        if isinstance(self._kept_logits, Tensor):
            where = where[self._kept_logits.cpu().numpy()]
        elif self._kept_logits:
            where = where[-self._kept_logits :]
        low, high = torch.aminmax(logits, dim=-1)  # NaN where one is
        bad = ~(low.isfinite() & high.isfinite()).cpu().numpy() & call.valid[:, where]
        if bad.any():
            row, at = map(int, np.argwhere(bad)[0])
            raise ValueError(f"the logits are NaN or infinite at token {call.start + where[at]} of row {row}")
        prediction = np.full((call.rows.batch, call.length), -1, dtype=np.int64)
        prediction[:, where] = logits.argmax(-1).cpu().numpy()
        call.rows.coords["prediction"][-1] = prediction[:, call.keep]

    def skip(self, rows: int) -> None:
        """Rows of one call that are recorded already."""
        self._rows, self._calls = self._rows + rows, self._calls + 1

    def flush(self) -> None:
        """Hand the sink, where there is one, every row: no call will continue them."""
        while self._sink is not None and self._blocks:
            rows = self._blocks.pop(0)
            self._sink.take(self._assembled([rows]), rows.first)

    def close(self, whole: bool = True) -> None:
        """The block is left: `dataset` is the trace of every whole call, where there was one."""
        self._closed, self._open = True, None
        if self._blocks:
            self._blocks[-1].let_go()
        try:
            self._courier.wait()
            self.flush()
        except BaseException:
            whole = False
            raise
        finally:
            if self._sink is not None:
                self._sink.close(whole)

    # -- from the taps -------------------------------------------------------------------------------------------

    def wants(self, layer: int, continues: bool, length: int) -> Emit | None:
        """See `mamba_probe.mixers.tap.Listener`."""
        if layer not in self._plan.layers:
            return None
        if self._plan.tokens is None:
            return self._emit
        start = self._blocks[-1].length if continues and self._blocks else 0
        return replace(self._emit, tokens=self._within(start, length))

    def receive(self, call: Call) -> None:
        """See `mamba_probe.mixers.tap.Listener`."""
        if call.layer not in self._plan.layers:
            return
        if self._open is None or call.layer in self._open.seen:
            self._open = self._started(call)
        for edit in call.edits:
            if edit.startswith("ablate(decay") or "(A_bar" in edit or edit.endswith("hook_A_bar)"):
                self._check_decay(call.layer, edit)
        under_way = self._open
        self._edits |= dict.fromkeys(call.edits)
        with torch.no_grad():
            under_way.put(call, {name: self._own(call, name, under_way) for name in self._plan.steps})
        if len(under_way.seen) == len(self._plan.layers):
            self._commit(under_way)

    def _check_decay(self, layer: int, edit: str) -> None:
        """Refuse constants of the weights that an edited decay contradicts."""
        constant = [name for name in ("A", "A_bar") if name in self._plan.variables and name not in self._plan.steps]
        if constant:
            gone = edit.startswith("ablate")
            other = "A_bar is 1 there, and constant" if "A_bar" in constant else "record A_bar in place of A"
            what = "A_bar is 1" if gone else "A_bar is another"
            raise ValueError(
                f"layer {layer}: under {edit.partition(', layer')[0].rstrip(')')}) {what} whatever A says, so"
                f" {' and '.join(constant)} of the weights would be wrong in the trace: {other}"
            )

    def _within(self, start: int, length: int) -> tuple[int, ...] | None:
        if self._plan.tokens is None:
            return None
        return tuple(token - start for token in self._plan.tokens if start <= token < start + length)

    def _started(self, call: Call) -> OpenCall:
        batch, length = call.tensors["out"].shape[:2]
        if call.continues and length > 1 and call.state_in is None:
            raise ValueError(
                f"layer {call.layer}: this call continues a cached sequence by {length} tokens, and transformers drops"
                " the cached state of a Mamba-1 mixer then (it starts from zero). Record the whole prompt in one call,"
                " or continue it token by token."
            )
        if call.continues and not self._blocks:
            raise ValueError(
                f"layer {call.layer}: this call continues a cached sequence whose beginning was not recorded, so its"
                " positions and sums are unknown. Open the recording before the prompt runs."
            )
        rows = self._blocks[-1] if call.continues else self._fresh(batch)
        if rows.batch != batch:
            raise ValueError(
                f"a call with {batch} rows continues a recording of {rows.batch}: rows were dropped or repeated"
                " between steps. Record each set of prompts in its own `recording` block."
            )
        selected = self._within(rows.length, length)
        keep = slice(None) if selected is None else list(selected)
        kept = (
            Kept(self._plan.layers, self._courier, self._keep) if self._sink is None
            else self._sink.kept(self._courier, rows.first, call.valid)
        )  # fmt: skip
        return OpenCall(rows, length, keep, kept, call.valid, call.continues, start=rows.length)

    def _fresh(self, batch: int) -> Rows:
        return Rows(batch, self._calls, self._rows, np.zeros(batch, np.int64))

    def _commit(self, call: OpenCall) -> None:
        """The call is whole: what it waits for from the device is waited for here, once."""
        rows = call.rows
        call.complete(self._ids, self._ended)
        for layer, name in call.kept.suspects():
            _check_finite(call.kept.array(layer, name), call.valid[:, call.keep], name, layer, rows.length)
        if not call.continues:
            if self._blocks:
                self._blocks[-1].let_go()
            self.flush()
            self._blocks.append(rows)
            self._rows += rows.batch
        call.enter()
        self._calls += 1

    def _own(self, call: Call, name: str, under_way: OpenCall) -> Tensor:
        """What was recorded of one variable: selected, and a tensor that nothing else writes to."""
        tensor = call.tensors[name].detach()
        if name not in EMITTABLE:  # x, z, u, out: the model's, not the scan's to select
            tensor = tensor[:, under_way.keep]
            if name not in ("u", "out") and self._plan.channels is not None:
                tensor = tensor[:, :, list(self._plan.channels)]
            tensor = tensor.clone()
        if self._plan.sizes.family != "mamba2" and name in ("x", "z", "y", "h"):
            tensor = tensor[:, :, :, 0]
        return tensor


def _check_finite(array: np.ndarray, valid: np.ndarray, name: str, layer: int, start: int) -> None:
    bad = ~np.isfinite(array).reshape(*array.shape[:2], -1).all(-1) & valid
    if bad.any():
        row, token = map(int, np.argwhere(bad)[0])
        raise ValueError(
            f"`{name}` of layer {layer} is NaN or infinite at token {start + token} of row {row}"
            f" ({int(bad.sum())} tokens in all): check the input and this layer's weights"
        )


def _joined(parts: Sequence[np.ndarray]) -> np.ndarray:
    return parts[0] if len(parts) == 1 else np.concatenate(parts, axis=1)


def assembled(
    plan: Plan, blocks: list[Rows], statics: dict[str, np.ndarray], attrs: dict[str, Any], courier: Courier,
    every: bool = False, steps: Mapping[str, np.ndarray] | None = None,
) -> xr.Dataset:  # fmt: skip
    """One Dataset from all rows: shorter rows and padding are NaN, with `valid` False.

    With `every` coordinates that are nowhere known are there, too. What calls have posted elsewhere is left out;
    `steps` stand in for what calls hold.
    """
    family = plan.sizes.family
    starts = np.cumsum([0, *(block.batch for block in blocks)])
    shape = (int(starts[-1]), max(_joined(block.coords["valid"]).shape[1] for block in blocks))
    coords = {name: _coord(name, blocks, starts, shape) for name in ABSENT}
    data = {}
    posted = plan.steps if any(call.posted for block in blocks for call in block.calls) else ()
    for name in plan.variables:
        if name in posted:
            continue
        spec = VARIABLES[name]
        if name not in plan.steps:
            values = statics[name]
        else:
            values = _steps(name, blocks, shape, coords["valid"], courier) if steps is None else steps[name]
        text = {"long_name": spec.long_name, "units": spec.units, "symbol": spec.symbol}
        data[name] = (plan.sizes.dims(name), values, text)
    known = {
        name: value for name, value in coords.items() if every or name in ("valid", "phase") or (value != -1).any()
    }
    prompts = np.arange(blocks[0].first, blocks[0].first + shape[0])
    per_row = {"prompt_id": prompts, "call": np.repeat([b.call for b in blocks], [b.batch for b in blocks])}
    index = {
        "layer": list(plan.layers),
        "token": list(range(shape[1]) if plan.tokens is None else plan.tokens),
        "head" if family == "mamba2" else "channel": list(
            range(plan.sizes.n_heads) if plan.channels is None else plan.channels
        ),
        "direction": np.array(plan.sizes.directions, dtype=object),
    }
    dims = {dim for name in plan.variables for dim in plan.sizes.dims(name)}
    if "direction" in dims:
        attrs = attrs | {DIRECTED: len(plan.sizes.directions)}
    labelled: dict[str, Any] = {name: (("batch", "token"), value) for name, value in known.items()}
    labelled |= {name: ("batch", value) for name, value in per_row.items()}
    return xr.Dataset(data, labelled | {dim: value for dim, value in index.items() if dim in dims}, attrs)


ABSENT: dict[str, Any] = {
    "valid": False,
    "phase": "",
    "token_id": -1,
    "position": -1,
    "prediction": -1,
    "parent_row": -1,
}


def _coord(name: str, blocks: list[Rows], starts: np.ndarray, shape: tuple[int, int]) -> np.ndarray:
    full = np.full(shape, ABSENT[name], dtype={"valid": bool, "phase": "<U7"}.get(name, np.int64))
    for block, start in zip(blocks, starts, strict=False):
        joined = _joined(block.coords[name])
        full[start : start + block.batch, : joined.shape[1]] = joined
    return full.astype(object) if name == "phase" else full


def _steps(name: str, blocks: list[Rows], shape: tuple[int, int], valid: np.ndarray, courier: Courier) -> np.ndarray:
    """(layer, batch, token, ...): of one call the array it was copied to, of more a new one."""
    calls = [call.take(name) for block in blocks for call in block.calls]
    if len(calls) > 1:
        courier.wait()
    full = calls[0] if len(calls) == 1 else _laid_out(calls, blocks, shape)
    if not valid.all():
        courier.wait()
        full[:, ~valid] = np.nan
    return full


def _laid_out(calls: list[np.ndarray], blocks: list[Rows], shape: tuple[int, int]) -> np.ndarray:
    """Rows under one another, the calls of a row side by side."""
    full = np.full((len(calls[0]), *shape, *calls[0].shape[3:]), np.nan, dtype=calls[0].dtype)
    parts, row = iter(calls), 0
    for block in blocks:
        token = 0
        for part in islice(parts, len(block.calls)):
            full[:, row : row + block.batch, token : token + part.shape[2]] = part
            token += part.shape[2]
        row += block.batch
    return full
