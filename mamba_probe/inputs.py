"""What a model is run on, checked before it runs: ids, hidden states, keywords, text or a task."""

import inspect
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import numpy as np
import torch
import xarray as xr
from torch import Tensor, nn

from mamba_probe.mixers.offload import place
from mamba_probe.tasks import Task

__all__ = ["ModelInput", "checked_input"]


@dataclass
class ModelInput:
    """Keywords of one forward, whole, and the labels that the trace gets."""

    keywords: dict[str, Any]
    batch: int
    length: int
    labels: dict[str, np.ndarray] = field(default_factory=dict)
    """Coordinates over (batch, token)."""
    attrs: dict[str, Any] = field(default_factory=dict)

    def pieces(self, batch_size: int | None) -> Iterator[dict[str, Any]]:
        """The keywords, `batch_size` rows at a time."""
        if batch_size is not None and batch_size < 1:
            raise ValueError(f"batch_size is at least 1; got {batch_size}")
        step = batch_size or self.batch
        for start in range(0, self.batch, step):
            rows = slice(start, start + step)
            yield {key: value[rows] if isinstance(value, Tensor) else value for key, value in self.keywords.items()}

    def label(self, trace: xr.Dataset) -> xr.Dataset:
        """The trace with the labels of its input."""
        tokens = trace["token"].values if "token" in trace.coords else np.arange(self.length)
        rows = slice(trace.sizes["batch"])  # fewer than asked for after a fault
        coords = {name: (("batch", "token"), values[rows][:, tokens]) for name, values in self.labels.items()}
        return trace.assign_coords(coords).assign_attrs(self.attrs)


def checked_input(
    model: nn.Module, width: int, inputs: Any, attention_mask: Any, text: Sequence[str] | None, tokenizer: Any
) -> ModelInput:
    """Keywords for `model`, with every mistake answered before anything runs.

    Raises:
        ValueError: no input or two; an empty sequence; ids out of range; a mask of another shape; wrong dims or dtype.
    """
    if (inputs is None) == (text is None):
        raise ValueError("pass either inputs (ids, hidden states, a dict or a Task) or text=[...], and not both")
    if text is not None:
        given = _from_text(text, tokenizer)
        if attention_mask is not None:
            raise ValueError("text brings its own attention mask: pass ids to use a mask of your own")
    elif isinstance(inputs, Task):
        given = _from_task(inputs, attention_mask)
    elif isinstance(inputs, Mapping):
        given = _from_mapping(inputs, attention_mask)
    else:
        given = _from_array(inputs, attention_mask)
    _check(model, width, given)
    _fit(model, given)
    device = place(model)
    given.keywords = {k: v.to(device) if isinstance(v, Tensor) else v for k, v in given.keywords.items()}
    if "use_cache" in inspect.signature(model.forward).parameters:
        given.keywords.setdefault("use_cache", False)
    return given


def _fit(model: nn.Module, given: ModelInput) -> None:
    """The keywords by the names of the model's own forward: a mask that it does not take must mask nothing."""
    takes = inspect.signature(type(model).forward).parameters
    passes_on = any(parameter.kind is parameter.VAR_KEYWORD for parameter in takes.values())
    first = list(takes.values())[1]
    named = first.kind is first.POSITIONAL_OR_KEYWORD and (first.default is first.empty or not passes_on)
    if "hidden_states" in given.keywords and "hidden_states" not in takes and named:
        given.keywords[first.name] = given.keywords.pop("hidden_states")
    known = takes if not passes_on else {name for part in model.modules() for name in _names(type(part))}
    mask = None if "attention_mask" in known else given.keywords.pop("attention_mask", None)
    if mask is not None and not mask.bool().all():
        raise ValueError(
            f"{type(model).__name__} takes no attention_mask: padding would be read as tokens. Record rows of one"
            " length at a time, without a mask"
        )


@cache
def _names(kind: type[nn.Module]) -> tuple[str, ...]:
    """What a module's forward takes."""
    return tuple(inspect.signature(kind.forward).parameters)


def _from_array(inputs: Any, attention_mask: Any) -> ModelInput:
    if isinstance(inputs, str) or (isinstance(inputs, list | tuple) and inputs and isinstance(inputs[0], str)):
        raise ValueError("inputs are token ids or hidden states; pass strings as text=[...] with tokenizer=")
    tensor = _tensor(inputs, "inputs")
    name = "hidden_states" if tensor.is_floating_point() else "input_ids"
    need = {"hidden_states": "(batch, token, model)", "input_ids": "(batch, token)"}[name]
    if tensor.ndim != need.count(",") + 1:
        hint = " Add a batch dimension: ids[None]." if tensor.ndim == need.count(",") else ""
        if name == "hidden_states" and tensor.ndim == 2:
            hint = " Token ids are integers: ids.long()."
        raise ValueError(f"{name} needs dims {need}; got shape {tuple(tensor.shape)}.{hint}")
    keywords = {name: tensor}
    if attention_mask is not None:
        keywords["attention_mask"] = _tensor(attention_mask, "attention_mask")
    return ModelInput(keywords, tensor.shape[0], tensor.shape[1])


def _from_mapping(inputs: Mapping[str, Any], attention_mask: Any) -> ModelInput:
    keywords = {key: value for key, value in inputs.items() if value is not None}
    if attention_mask is not None:
        if "attention_mask" in keywords:
            raise ValueError("attention_mask came twice: in the dict and as an argument")
        keywords["attention_mask"] = attention_mask
    main = next((key for key in ("input_ids", "hidden_states", "inputs_embeds") if key in keywords), None)
    if main is None:
        raise ValueError(f"a dict needs input_ids, inputs_embeds or hidden_states; got {sorted(keywords)}")
    checked = _from_array(keywords.pop(main), keywords.pop("attention_mask", None))
    renamed = {main if key in ("input_ids", "hidden_states") else key: value for key, value in checked.keywords.items()}
    return ModelInput(keywords | renamed, checked.batch, checked.length)


def _from_task(task: Task, attention_mask: Any) -> ModelInput:
    given = _from_array(task.input_ids, attention_mask)
    answers = range(task.vocab) if task.answers is None else task.answers
    labels = {"role": task.role.astype(object), "target": task.target, "source_token": task.source_token}
    return ModelInput(
        given.keywords,
        given.batch,
        given.length,
        labels,
        {
            "task": task.name,
            "task_params": json.dumps(task.params),
            "vocab": task.vocab,
            "answers": [answers.start, answers.stop],
        },
    )


def _from_text(text: Sequence[str], tokenizer: Any) -> ModelInput:
    if tokenizer is None:
        raise ValueError("text needs tokenizer=mp.load_tokenizer(...): the one the model was trained with")
    if isinstance(text, str) or not all(isinstance(line, str) for line in text) or not text:
        raise ValueError(f"text is a non-empty list of strings; got {type(text).__name__}")
    rows = [tokenizer(line)["input_ids"] for line in text]
    empty = [i for i, row in enumerate(rows) if not row]
    if empty:
        raise ValueError(f"text {empty[0]} has no tokens: an empty sequence cannot be recorded")
    length = max(map(len, rows))
    ids, mask = np.zeros((len(rows), length), np.int64), np.zeros((len(rows), length), np.int64)
    pieces = np.full((len(rows), length), "", dtype=object)
    for i, row in enumerate(rows):
        ids[i, : len(row)], mask[i, : len(row)] = row, 1
        pieces[i, : len(row)] = tokenizer.convert_ids_to_tokens(row)
    given = _from_array(ids, mask)
    return ModelInput(given.keywords, given.batch, given.length, {"token_text": pieces})


def _tensor(value: Any, name: str) -> Tensor:
    try:
        tensor = value if isinstance(value, Tensor) else torch.as_tensor(np.asarray(value))
    except (TypeError, ValueError) as error:
        raise ValueError(f"{name} is no rectangular array of numbers ({error}); pad rows and pass a mask") from error
    if tensor.dtype == torch.bool and name != "attention_mask":
        raise ValueError(f"{name} is boolean; expected token ids (integers) or hidden states (floats)")
    return tensor.long() if not tensor.is_floating_point() and tensor.dtype != torch.bool else tensor


def _check(model: nn.Module, width: int, given: ModelInput) -> None:
    if given.batch == 0 or given.length == 0:
        raise ValueError(
            f"empty sequence: got {given.batch} row(s) of {given.length} token(s); at least 1 x 1 is needed"
        )
    for name, value in given.keywords.items():
        if name == "input_ids":
            _check_ids(model, value)
        elif name in ("hidden_states", "inputs_embeds"):
            _check_hidden(value, width, name)
        elif name == "attention_mask":
            _check_mask(value, (given.batch, given.length))


def _check_ids(model: nn.Module, ids: Tensor) -> None:
    embedding = (part for part in model.modules() if isinstance(part, nn.Embedding))
    embed = getattr(model, "get_input_embeddings", lambda: next(embedding, None))()
    if embed is None:
        raise ValueError(
            f"{type(model).__name__} takes hidden states (batch, token, model) as floats; got integer ids of shape"
            f" {tuple(ids.shape)}"
        )
    low, high, n_vocab = int(ids.min()), int(ids.max()), len(embed.weight)
    if low < 0 or high >= n_vocab:
        bad = low if low < 0 else high
        row, token = torch.argwhere(ids == bad)[0].tolist()
        raise ValueError(
            f"token id {bad} at row {row}, token {token} is out of range: this model knows 0..{n_vocab - 1}."
            " Was the text tokenised for another model?"
        )


def _check_hidden(hidden: Tensor, width: int, name: str) -> None:
    if hidden.shape[-1] != width:
        raise ValueError(f"{name} needs dims (batch, token, model = {width}); got shape {tuple(hidden.shape)}")
    if not torch.isfinite(hidden).all():
        row, token = torch.argwhere(~torch.isfinite(hidden).all(-1))[0].tolist()
        raise ValueError(f"{name} holds NaN or infinity at row {row}, token {token}")


def _check_mask(mask: Tensor, shape: tuple[int, int]) -> None:
    if tuple(mask.shape) != shape:
        raise ValueError(
            f"attention_mask needs the shape of the input, (batch, token) = {shape}; got {tuple(mask.shape)}"
        )
    if not ((mask == 0) | (mask == 1)).all():
        raise ValueError("attention_mask holds 1 at tokens and 0 at padding, and nothing else")
    empty = torch.argwhere(mask.sum(-1) == 0)
    if len(empty):
        raise ValueError(
            f"attention_mask masks every token of row {int(empty[0])}: an empty sequence cannot be recorded"
        )
