"""Parity: the probe against the untouched model and against a float64 oracle, layer by layer."""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch
import xarray as xr
from torch import Tensor, nn

from mamba_probe import provenance
from mamba_probe.inputs import ModelInput
from mamba_probe.kernels.emission import Emit
from mamba_probe.mixers import Call, Listener, MixerAdapter

__all__ = ["error", "measure_parity"]

MEANING = "max|a - b| / max|b| over valid tokens, on the layer's own input"


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
    return xr.Dataset(data, {"layer": layers}, provenance.of_model(model, "parity") | {"error": over})


def _compare(adapter: MixerAdapter, emitted: _Emitted, rows: dict[int, dict[str, float]]) -> Callable[..., None]:
    def after(_mixer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], out: Tensor) -> None:
        hidden = args[0] if args else kwargs["hidden_states"]
        mask = kwargs.get("attention_mask")
        valid = None if mask is None else mask.bool()
        executed = emitted.calls.pop(adapter.layer).tensors
        native = type(adapter.mixer).forward(adapter.mixer, hidden, attention_mask=mask)
        oracle = adapter.oracle(hidden, valid)
        rows[adapter.layer] = {
            "out_vs_native": error(out, native, valid),
            "out_vs_oracle": error(out, oracle["out"], valid),
            "native_vs_oracle": error(native, oracle["out"], valid),
        } | {name: error(executed[name], oracle[name], valid) for name in ("delta", "B", "C")}

    return after
