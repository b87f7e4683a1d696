"""Two runs of one model, what stands in each of them at a layer, and the metric that tells them apart."""

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch
import xarray as xr
from jaxtyping import Float
from torch import Tensor

from mamba_probe import provenance
from mamba_probe.arguments import texts, wholes
from mamba_probe.edits import HOOKS
from mamba_probe.hooks import HookPoint
from mamba_probe.inputs import ModelInput, checked_input
from mamba_probe.probe import Probe
from mamba_probe.trace.contract import unknown_name

__all__ = ["DEFAULT", "DIMS", "QUANTITIES", "Metric", "Pair", "paired", "recovered"]

Metric = Callable[[Tensor], Tensor]

QUANTITIES = {name: f"mixer.{hook}" for name, hook in HOOKS.items()} | {
    name: f"hook_{name}" for name in ("resid_pre", "mixer_in", "mixer_out", "resid_post")
}
"""What can be patched, and its hook point. An entry is all of it at one layer, row and token.

- delta: the step, with all that follows from it: that token's decay exp(delta A) and its write delta B x.
- A_bar: that token's decay alone. B, x: its write (x: the skip D x, too). C, z: what is read there, and its gate.
- y: what is read there, before the gate. h: the state after that token, read there and carried on.
- resid_pre, resid_post: the residual stream before and after the block; mixer_in, mixer_out: of the mixer alone.
"""

DEFAULT = ("delta", "A_bar", "B", "C", "x")
DIMS = ("quantity", "layer", "token", "batch")


@dataclass
class Pair:
    """Made by `paired`, which checks it."""

    probe: Probe
    base: ModelInput
    source: ModelInput
    metric: Metric
    quantities: tuple[str, ...]
    layers: tuple[int, ...]
    tokens: tuple[int, ...]

    @staticmethod
    def name(quantity: str, layer: int) -> str:
        """Hook point of a quantity."""
        return f"blocks.{layer}.{QUANTITIES[quantity]}"

    def names(self, quantity: str, layer: int, tokens: Sequence[int]) -> list[str]:
        """Hook points at which a quantity is patched at `tokens`: a state has one for each."""
        bare = self.name(quantity, layer)
        return [f"{bare}.{token}" for token in tokens] if quantity == "h" else [bare]

    def kept(self, layers: Sequence[int], quantities: Sequence[str], batch_size: int | None) -> dict[str, Tensor]:
        """What stands in the source's run, (batch, token, ...), by the name of the hook point."""
        found: dict[str, list[Tensor]] = {self.name(each, i): [] for i in layers for each in quantities}

        def keep(tensor: Tensor, hook: HookPoint) -> None:
            found[hook.name].append(tensor.detach().clone())

        with torch.no_grad(), self.probe.hooks([(list(found), keep)]):
            for piece in self.source.pieces(batch_size):
                self.probe.model(**piece)
        return {name: torch.cat(pieces) for name, pieces in found.items()}

    def score(self, logits: Tensor) -> Tensor:
        """The metric of one batch of logits, as it must be: (batch,), real and finite."""
        found = self.metric(logits)
        need = f"metric(logits) must give one real number a row, a tensor ({self.base.batch},)"
        if not isinstance(found, Tensor):
            raise ValueError(f"{need}; got {type(found).__name__}")
        if tuple(found.shape) != (self.base.batch,) or found.is_complex():
            raise ValueError(f"{need}; got shape {tuple(found.shape)}, {found.dtype}")
        if not torch.isfinite(found).all():
            raise ValueError(f"{need}; got {found[~torch.isfinite(found)][0].item()} at row {self._first(found)}")
        return found

    def _first(self, found: Tensor) -> int:
        return int((~torch.isfinite(found)).nonzero()[0])

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """Of a result: quantity, layer, token, batch."""
        return len(self.quantities), len(self.layers), len(self.tokens), self.base.batch

    @cached_property
    def valid(self) -> np.ndarray:
        """(batch, token) of the whole rows: where there is a token."""
        return _valid(self.base)

    def dataset(self, base: Float[np.ndarray, " batch"], source: Float[np.ndarray, " batch"]) -> xr.Dataset:
        """What every result has: the metric of both runs, labels, and where it comes from."""
        coords: dict[str, Any] = {
            "quantity": np.array(self.quantities, dtype=object),
            "layer": list(self.layers),
            "token": list(self.tokens),
            "valid": (("batch", "token"), self.valid[:, list(self.tokens)]),
        }
        for name, given in (("token_id", self.base), ("source_token_id", self.source)):
            if (ids := given.keywords.get("input_ids")) is not None:
                coords[name] = (("batch", "token"), ids.cpu().numpy()[:, list(self.tokens)])
        found = xr.Dataset({"base": ("batch", base), "source": ("batch", source)}, coords, self._attrs())
        return self.base.label(found)

    def _attrs(self) -> dict[str, Any]:
        return provenance.of_model(self.probe.model, "patching") | {
            "analysis": "patching",
            "metric": getattr(self.metric, "__qualname__", type(self.metric).__name__),
            "backend": self.probe.backend,
            "base_hash": _hash(self.base),
            "source_hash": _hash(self.source),
            "n_rows": self.base.batch,
        }


def recovered(change: Any, base: Any, source: Any) -> Any:
    """`change` by source - base; NaN where that is 0."""
    span = source - base
    return np.where(span == 0, np.nan, change / np.where(span == 0, 1.0, span))


def paired(
    probe: Any, base: Any, source: Any, metric: Any, quantities: Sequence[str], layers: Sequence[int] | None,
    tokens: Sequence[int] | None,
) -> Pair:  # fmt: skip
    """Both runs, checked before anything runs.

    Raises:
        ValueError: no probe, an edited one; inputs that `record` refuses, or of two shapes or masks; an unknown or
            repeated quantity, layer or token; a quantity that a layer has not; a metric that cannot be called.
    """
    if not isinstance(probe, Probe):
        raise ValueError(f"patching takes the probe that mp.attach(model) gave; got {type(probe).__name__}")
    probe._check_unedited("patching")
    if not callable(metric):
        raise ValueError(f"metric is a function of logits (batch, token, vocab); got {type(metric).__name__}")
    width = probe._adapters[0].sizes.width
    given, other = (checked_input(probe.model, width, inputs, None, None, None) for inputs in (base, source))
    _check_alike(given, other)
    chosen = (
        tuple(probe.layers if layers is None else wholes("layers", layers)),
        tuple(range(given.length) if tokens is None else wholes("tokens", tokens)),
    )
    quantities = texts("quantities", quantities)
    for kind, asked, known in (
        ("quantity", tuple(quantities), tuple(QUANTITIES)),
        ("layer", chosen[0], probe.layers),
        ("token", chosen[1], range(given.length)),
    ):
        _check_known(kind, asked, known)
    _check_there(probe, tuple(quantities), chosen[0])
    if not _valid(given)[:, list(chosen[1])].any():
        raise ValueError(f"tokens {list(chosen[1])} are padding in every row: there is nothing to patch")
    measured: Any = metric
    return Pair(probe, given, other, measured, tuple(quantities), *chosen)


def _check_alike(base: ModelInput, source: ModelInput) -> None:
    shapes = [(given.batch, given.length) for given in (base, source)]
    if shapes[0] != shapes[1]:
        raise ValueError(
            f"base has (batch, token) = {shapes[0]} and source {shapes[1]}: a token's values go to the same row and"
            " token, so that prompts must be aligned, one for one"
        )
    if not np.array_equal(_valid(base), _valid(source)):
        raise ValueError("base and source are padded differently: a token's values would go to padding")


def _check_known(kind: str, asked: tuple[Any, ...], known: Sequence[Any]) -> None:
    if not asked or len(set(asked)) < len(asked):
        raise ValueError(f"name at least one {kind}, and none twice; got {list(asked)}")
    for each in asked:
        if each not in known:
            span = f"0 .. {len(known) - 1}"
            raise (
                ValueError(f"there is no token {each!r}: tokens are {span}")
                if kind == "token"
                else unknown_name(kind, each, [str(name) for name in known])
            )


def _check_there(probe: Probe, quantities: tuple[str, ...], layers: tuple[int, ...]) -> None:
    known = set(probe.hook_names())
    for layer in layers:
        here = [quantity for quantity in QUANTITIES if Pair.name(quantity, layer) in known]
        missing = [name for name in quantities if name not in here]
        if missing:
            has = ", ".join(here) or "none"
            raise ValueError(f"layer {layer} has no {', '.join(missing)} that can be patched; it has {has}")


def _valid(given: ModelInput) -> np.ndarray:
    mask = given.keywords.get("attention_mask")
    return np.ones((given.batch, given.length), bool) if mask is None else mask.bool().cpu().numpy()


def _hash(given: ModelInput) -> str:
    """sha256 of what a model is run on."""
    digest = hashlib.sha256()
    for name, value in sorted(given.keywords.items()):
        digest.update(f"{name}{getattr(value, 'dtype', '')}{tuple(getattr(value, 'shape', ()))}".encode())
        tensor = isinstance(value, Tensor)
        digest.update(value.cpu().contiguous().view(torch.uint8).numpy().tobytes() if tensor else repr(value).encode())
    return digest.hexdigest()
