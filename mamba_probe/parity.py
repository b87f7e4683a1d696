"""Parity: the probe against the untouched model and against a float64 oracle, layer by layer."""

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch
import xarray as xr
from torch import Tensor, nn

from mamba_probe import provenance
from mamba_probe.inputs import ModelInput
from mamba_probe.kernels.emission import Emit
from mamba_probe.mixers import Call, Listener, MixerAdapter
from mamba_probe.mixers.offload import held

__all__ = ["BOUNDS", "error", "measure_parity", "parting"]

MEANING = "max|a - b| / max|b| over valid tokens, on the layer's own input"

BOUNDS = {torch.float64: 2e-6, torch.float32: 2e-6, torch.bfloat16: 3e-2, torch.float16: 3e-3}
"""What rounding alone may make of a mixer's output, by the dtype of its weights; transformers rounds A and delta's bias
to float32 in a float64 model too (ours)."""


def error(a: Tensor, b: Tensor, valid: Tensor | None = None) -> float:
    """max|a - b| / max|b| over valid positions, in float64; NaN where either holds NaN or infinity.

    >>> error(torch.tensor([1.0, 2.0]), torch.tensor([1.0, 4.0]))
    0.5
    """
    a, b = (tensor.detach().to(torch.promote_types(tensor.dtype, torch.float64)) for tensor in (a, b))
    if valid is not None:
        a, b = a[valid], b[valid]
    if not (torch.isfinite(a).all() and torch.isfinite(b).all()):
        return float("nan")
    scale = float(b.abs().max())
    difference = float((a - b).abs().max())
    return difference / scale if scale else difference


class _Emitted:
    """A listener that keeps what each layer executed."""

    def __init__(self) -> None:
        self.calls: dict[int, Call] = {}

    def wants(self, layer: int, continues: bool, length: int) -> Emit:
        return Emit(("delta", "B", "C"))

    def receive(self, call: Call) -> None:
        self.calls[call.layer] = call


def measure_parity(
    model: nn.Module, adapters: Sequence[MixerAdapter], given: ModelInput,
    listen: Callable[[Listener | None], None], suspended: Callable[[], AbstractContextManager[None]],
) -> xr.Dataset:  # fmt: skip
    """See `Probe.parity`."""
    emitted, rows = _Emitted(), {}
    handles = [
        adapter.mixer.register_forward_hook(_compare(adapter, emitted, rows), with_kwargs=True) for adapter in adapters
    ]
    (keywords,) = given.pieces(None)
    listen(emitted)
    try:
        with torch.no_grad():
            probed = model(**keywords)
    finally:
        listen(None)
        for handle in handles:
            handle.remove()
    names = tuple(next(iter(rows.values())))
    broken = [
        f"{name} of layer {layer}" for layer, row in rows.items() for name, value in row.items() if value != value
    ]
    if broken:
        raise ValueError(f"parity cannot be measured, tensors hold NaN or infinity: {', '.join(broken[:6])}")
    layers = [adapter.layer for adapter in adapters]
    data: dict[str, Any] = {name: ("layer", [rows[layer][name] for layer in layers]) for name in names}
    if hasattr(probed, "logits"):
        with suspended(), torch.no_grad():
            native = model(**keywords)
        mask = keywords.get("attention_mask")
        data["logits_vs_native"] = ((), error(probed.logits, native.logits, None if mask is None else mask.bool()))
    over = f"{MEANING}; {given.batch} row(s) of up to {given.length} tokens"
    bound = BOUNDS[next(adapters[0].mixer.parameters()).dtype]
    said = {"error": over, "bound": bound, "parting": parting(rows, bound)}
    return xr.Dataset(data, {"layer": layers}, provenance.of_model(model, "parity") | said)


def parting(rows: Mapping[int, Mapping[str, float]], bound: float) -> str:
    """Say in which layers and quantities probe, library and float64 oracle are further apart than `bound`.

    Arguments:
        rows: errors by layer, by the names of the parity's variables.
        bound: the largest error that says nothing.

    >>> parting({3: {"out_vs_native": 0.1, "out_vs_oracle": 1e-7, "native_vs_oracle": 0.1, "delta": 1e-8}}, 2e-6)
    'layer 3: out of the library is 0.1 from the float64 oracle, out of the probe 1e-07: the library is wrong here'
    >>> parting({3: {"out_vs_native": 1e-7, "out_vs_oracle": 1e-7, "native_vs_oracle": 1e-7, "delta": 1e-8}}, 2e-6)
    'nowhere: every error is at most 2e-06'
    """
    found = []
    for layer, row in rows.items():
        ours, theirs = row["out_vs_oracle"], row["native_vs_oracle"]
        if max(ours, theirs) > bound:
            blame = "the library is wrong" if ours <= bound else "the probe is wrong" if theirs <= bound else "both are"
            apart = f"out of the library is {theirs:.2g} from the float64 oracle, out of the probe {ours:.2g}"
            found.append(f"layer {layer}: {apart}: {blame} here")
        elif row["out_vs_native"] > bound:
            found.append(f"layer {layer}: out of the probe is {row['out_vs_native']:.2g} from the library's")
        inner = [name for name in ("delta", "B", "C") if row.get(name, 0.0) > bound]
        found += [f"layer {layer}: {name} of the probe is {row[name]:.2g} from the float64 oracle" for name in inner]
    return "; ".join(found) or f"nowhere: every error is at most {bound:g}"


def _check_A(adapter: MixerAdapter, call: Call) -> None:
    """Check that the A of a trace is the one that the scan was given: no output would show another.

    Raises:
        ValueError: it is not.
    """
    static = adapter.statics().get("A")
    if call.A is None or static is None:
        return
    said = static[1]
    bound = BOUNDS[torch.float32]
    if said.numel() != call.A.numel() or not error(said.reshape(-1), call.A.reshape(-1)) <= bound:
        raise ValueError(
            f"A of layer {adapter.layer}: {type(adapter).__name__}.statics() says another than its replacements give"
            f" tap.scan (shapes {tuple(said.shape)} and {tuple(call.A.shape)}): its traces' A_bar and horizons would be"
            " wrong, and no output shows it"
        )


def _compare(adapter: MixerAdapter, emitted: _Emitted, rows: dict[int, dict[str, float]]) -> Callable[..., None]:
    def after(_mixer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> None:
        hidden = args[0] if args else kwargs[adapter.takes]
        mask = kwargs.get("attention_mask")
        valid = None if mask is None else mask.bool()
        call = emitted.calls.pop(adapter.layer)
        executed = call.tensors
        with held(adapter.mixer):
            _check_A(adapter, call)
        with held(adapter.mixer):
            native = adapter.native(hidden, **adapter.masks(mask))
        with held(adapter.mixer):
            oracle = adapter.oracle(adapter.taken(hidden), valid)
        out, native = adapter.given(out), adapter.given(native)
        rows[adapter.layer] = {
            "out_vs_native": error(out, native, valid),
            "out_vs_oracle": error(out, oracle["out"], valid),
            "native_vs_oracle": error(native, oracle["out"], valid),
        } | {name: error(executed[name], oracle[name], valid) for name in ("delta", "B", "C")}

    return after
