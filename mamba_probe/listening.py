"""A recorder that listens while a model runs, and what becomes of its trace."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from os import PathLike
from typing import Any

import xarray as xr
from torch import Tensor, nn

from mamba_probe.generating import heard
from mamba_probe.mixers import Listener, Tap
from mamba_probe.recorder import Recorder
from mamba_probe.trace.store import save
from mamba_probe.untraced import UntracedListener, untraced

__all__ = ["check_silent", "kept", "listen", "listening"]


def listen(taps: Mapping[int, Tap], listener: Listener | None) -> None:
    """Hand what the taps see to `listener`; to nobody where it is None."""
    for tap in taps.values():
        tap.listener = listener


def check_silent(taps: Mapping[int, Tap]) -> None:
    """Check that nobody listens.

    Raises:
        ValueError: somebody does.
    """
    if any(tap.listener is not None for tap in taps.values()):
        raise ValueError("a recording is already open on this probe: leave it first")


@contextmanager
def listening(model: nn.Module, taps: Mapping[int, Tap], recorder: Recorder) -> Iterator[None]:
    """Record every call of the model inside the block.

    Raises:
        ValueError: somebody listens already.
    """
    check_silent(taps)

    def begin(_model: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        first = kwargs.get("input_ids", args[0] if args else None)
        ids = first if isinstance(first, Tensor) and not first.is_floating_point() else None
        recorder.begin(ids, kwargs.get("logits_to_keep", kwargs.get("num_last_tokens", 0)))  # mamba_ssm's name

    def end(_model: nn.Module, _args: Any, output: Any) -> None:
        recorder.end(getattr(output, "logits", None), whole=output is not None)

    handles = [
        model.register_forward_pre_hook(untraced(begin), with_kwargs=True),
        model.register_forward_hook(untraced(end), always_call=True),
    ]
    whole = False
    try:
        listen(taps, UntracedListener(recorder))
        with heard(model, recorder.generating):
            yield
        whole = True
    finally:
        listen(taps, None)
        for handle in handles:
            handle.remove()
        recorder.close(whole)


@contextmanager
def kept(
    recorder: Recorder, label: Callable[[xr.Dataset], xr.Dataset], store: str | PathLike[str] | None, overwrite: bool
) -> Iterator[None]:
    """Write the trace to `store` when the block is left, after a fault too: the calls that were whole."""
    try:
        yield
    finally:
        if recorder.n_calls and store is not None:
            save(label(recorder.dataset), store, overwrite=overwrite)
