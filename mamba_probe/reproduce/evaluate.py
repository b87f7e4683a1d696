"""A construction evaluated in its own precision: float32 by the real module, float64 by our block of equal weights."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor, nn

from mamba_probe.blocks import LanguageModel, Mamba2Block, MambaBlock
from mamba_probe.constructions import Construction
from mamba_probe.probe import attach
from mamba_probe.tasks import Task

__all__ = ["MIXERS", "answered", "dtype_of", "estimator", "head", "last_output", "seconded", "sizes_of", "wanted"]

MIXERS = {"mamba1": "Mamba-1", "mamba2": "Mamba-2", "s4d": "S4D"}
NUMBERS_A_CALL = 2**24
"""Of the widest activation (row, token, feature) of one forward: the rows of a call are as many as that allows."""


def seconded(model: nn.Module) -> nn.Module:
    """Return the model with transformers' blocks replaced by ours, which compute in the precision of their weights.

    transformers rounds A, the biases of delta and norms to float32 whatever the weights are; our blocks do not.
    Ours, and anything else, are returned as they are.
    """
    kind = type(model).__name__
    if not type(model).__module__.startswith("transformers."):
        return model
    if kind.endswith("Mixer"):
        block = _block(model)
        block.load_state_dict(model.state_dict())
        return block.to(next(model.parameters()).dtype).eval()
    vocabulary, _ = model.get_parameter("lm_head.weight").shape
    whole = LanguageModel([_block(mixer) for mixer in _mixers(model)], vocabulary).to(next(model.parameters()).dtype)
    whole.load_state_dict(model.state_dict())
    return whole.eval()


def _block(mixer: Any) -> nn.Module:
    sizes = {"d_inner": mixer.intermediate_size, "d_state": mixer.ssm_state_size, "d_conv": mixer.conv_kernel_size}
    if type(mixer).__name__ == "MambaMixer":
        made: nn.Module = MambaBlock(mixer.hidden_size, dt_rank=mixer.time_step_rank, **sizes)
    else:
        made = Mamba2Block(mixer.hidden_size, n_heads=mixer.num_heads, n_groups=mixer.n_groups, **sizes)
    return made.to(next(mixer.parameters()).dtype)


def sizes_of(construction: Construction) -> dict[str, int]:
    """Return the model's sizes by name: channels of a layer, states a channel, layers if there are several."""
    mixers = _mixers(construction.model)
    first: Any = mixers[0]
    if _of_transformers(first):
        found = {"channels": first.intermediate_size, "states": first.ssm_state_size}
    else:
        found = {"channels": first.sizes["d_inner"], "states": first.sizes["d_state"]}
    return found | ({"layers": len(mixers)} if len(mixers) > 1 else {})


def dtype_of(construction: Construction) -> str:
    """Return "float32" or "float64"."""
    return str(construction.dtype).removeprefix("torch.")


def estimator(construction: Construction) -> str:
    """Say how `last_output` and `answered` evaluate this construction."""
    kind = type(construction.model).__name__
    if not _of_transformers(construction.model):
        return f"forward of our {kind}"
    if construction.dtype == torch.float64:
        return f"forward of our blocks with the weights of transformers' {kind}"
    bare = kind.endswith("Mixer") and construction.answer is None
    return f"forward of transformers' {kind}" + ("" if bare else ", its scan ours")


def last_output(construction: Construction, inputs: Any) -> Float[np.ndarray, "batch model"]:
    """Return what a bare block gives at the last token, widened to float64."""
    model = construction.model if construction.dtype == torch.float32 else seconded(construction.model)
    hidden = construction.inputs(inputs)
    with torch.no_grad():
        return torch.cat([model(piece)[:, -1] for piece in _pieces(construction, hidden)]).double().numpy()


def wanted(construction: Construction, inputs: Any) -> Float[np.ndarray, "batch model"]:
    """Return what `last_output` should be."""
    assert construction.expected is not None
    return construction.expected(inputs)


def answered(construction: Construction, task: Task) -> tuple[int, int]:
    """Return how many queries the construction answers, and how many there are."""
    pieces = _pieces(construction, construction.inputs(task.input_ids), task.vocab)
    with _running(construction) as model, torch.no_grad():
        return task.accuracy(np.concatenate([_predicted(construction, model(piece)) for piece in pieces]))


def _pieces(construction: Construction, inputs: Tensor, vocab: int = 0) -> tuple[Tensor, ...]:
    """Cut the rows so that a forward stays small; transformers' own Mamba-2 scan holds a chunk of channels a token."""
    model: Any = construction.model
    chunk = model.chunk_size if type(model).__name__ == "Mamba2Mixer" else 2
    widest = max(chunk * sizes_of(construction)["channels"], vocab)
    return inputs.split(max(1, NUMBERS_A_CALL // (inputs.shape[1] * widest)))


def head(task: Task, share: int = 4) -> Task:
    """Return the first rows of a task, one of `share` of them and at least one: enough to place a null."""
    rows = slice(0, max(1, len(task.input_ids) // share))
    names = ("input_ids", "role", "target", "source_token")
    return replace(task, **{name: getattr(task, name)[rows] for name in names})


@contextmanager
def _running(construction: Construction) -> Iterator[nn.Module]:
    """The model to run: in float32 transformers' own, its scan taken over by ours, which needs less memory."""
    if construction.dtype == torch.float64 or not _of_transformers(construction.model):
        yield seconded(construction.model)
    else:
        with attach(construction.model):
            yield construction.model


def _predicted(construction: Construction, output: Any) -> np.ndarray:
    return output.logits.argmax(-1).numpy() if construction.answer is None else construction.answer(output)


def _mixers(model: nn.Module) -> list[nn.Module]:
    backbone: Any = getattr(model, "backbone", None)
    return [model] if backbone is None else [layer.mixer for layer in backbone.layers]


def _of_transformers(model: nn.Module) -> bool:
    return type(model).__module__.startswith("transformers.")
