"""What a model is run on, checked before it runs: ids, hidden states, keywords, text, a task or a corpus."""

import hashlib
import inspect
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache, partial
from typing import Any

import numpy as np
import torch
import xarray as xr
from torch import Tensor, nn

from mamba_probe.arguments import whole
from mamba_probe.corpora import Corpus, Document, check_known, n_unknown, token_ids
from mamba_probe.mixers.offload import place
from mamba_probe.tasks import Task
from mamba_probe.trace.contract import unknown_name

__all__ = ["CorpusInput", "Labelled", "ModelInput", "checked_input"]


@dataclass
class ModelInput:
    """Keywords of one forward, whole, and the labels that the trace gets."""

    keywords: dict[str, Any]
    batch: int
    length: int
    labels: dict[str, np.ndarray] = field(default_factory=dict)
    """Coordinates over (batch, token)."""
    attrs: dict[str, Any] = field(default_factory=dict)

    def spans(self, batch_size: int | None, first: int = 0) -> list[slice]:
        """Which rows each piece has, `batch_size` at a time, from row `first` on.

        Raises:
            ValueError: batch_size below 1.
        """
        step = self.batch if batch_size is None else whole("batch_size", batch_size, 1)
        return [slice(start, min(start + step, self.batch)) for start in range(first, self.batch, step)]

    def piece(self, rows: slice) -> dict[str, Any]:
        """The keywords of some rows."""
        return {key: value[rows] if isinstance(value, Tensor) else value for key, value in self.keywords.items()}

    def pieces(self, batch_size: int | None) -> Iterator[dict[str, Any]]:
        """The keywords, `batch_size` rows at a time."""
        return map(self.piece, self.spans(batch_size))

    def labelled(self, rows: slice) -> dict[str, np.ndarray]:
        """The labels of some rows."""
        return {name: values[rows] for name, values in self.labels.items()}

    def label(self, trace: xr.Dataset, first: int = 0) -> xr.Dataset:
        """The trace of the rows from `first` on, with the labels of its input."""
        tokens = trace["token"].values if "token" in trace.coords else np.arange(self.length)
        rows = slice(first, first + trace.sizes["batch"])  # fewer than asked for after a fault
        coords = {name: (("batch", "token"), values[:, tokens]) for name, values in self.labelled(rows).items()}
        return trace.assign_coords(coords).assign_attrs(self.attrs)

    @property
    def sha256(self) -> str:
        """Hash of what the model is given: of a corpus its own, else of the names, shapes and numbers of all arrays."""
        digest = hashlib.sha256()
        for name, value in sorted(self.keywords.items()):
            if isinstance(value, Tensor):
                digest.update(f"{name}{tuple(value.shape)}{value.dtype}".encode())
                digest.update(value.detach().cpu().contiguous().view(torch.uint8).numpy().data)
        return digest.hexdigest()


class CorpusInput(ModelInput):
    """A corpus, read a piece at a time; `keywords` and `labels` are all of it, made when they are asked for."""

    def __init__(self, corpus: Corpus, prepared: Callable[[dict[str, Any]], dict[str, Any]]):
        self.corpus, self._prepared = corpus, prepared
        self.batch, self.length, self.attrs = len(corpus), corpus.length, corpus.attrs

    @property
    def keywords(self) -> dict[str, Any]:  # pyright: ignore[reportIncompatibleVariableOverride]
        """The keywords of all rows."""
        return self.piece(slice(None))

    @property
    def labels(self) -> dict[str, np.ndarray]:  # pyright: ignore[reportIncompatibleVariableOverride]
        """The labels of all rows."""
        return self.labelled(slice(None))

    @property
    def sha256(self) -> str:
        """The corpus's."""
        return self.corpus.sha256

    def piece(self, rows: slice) -> dict[str, Any]:
        """The keywords of some rows; a mask where any row of the corpus has padding."""
        found = self.corpus[rows]
        keywords = {"input_ids": torch.from_numpy(found.ids)}
        if self.corpus.padding_tokens:
            keywords["attention_mask"] = torch.from_numpy(found.mask)
        return self._prepared(keywords)

    def labelled(self, rows: slice) -> dict[str, np.ndarray]:
        """The labels of some rows."""
        return self.corpus[rows].labels


@dataclass(frozen=True)
class Labelled:
    """What a model is run on, with attributes and labels over (batch, token) for its trace beside its own."""

    inputs: Any
    attention_mask: Any = None
    labels: Mapping[str, np.ndarray] = field(default_factory=dict)
    attrs: Mapping[str, Any] = field(default_factory=dict)


def checked_input(
    model: nn.Module, width: int, inputs: Any, attention_mask: Any, text: Sequence[str] | None, tokenizer: Any
) -> ModelInput:
    """Keywords for `model`, with every mistake answered before anything runs.

    Raises:
        ValueError: no input or two; an empty sequence; ids out of range; a mask of another shape; wrong dims or dtype.
    """
    if (inputs is None) == (text is None):
        raise ValueError("pass either inputs (ids, hidden states, a dict, a Task or a Corpus) or text=[...], not both")
    if isinstance(inputs, Labelled):
        given = checked_input(model, width, inputs.inputs, inputs.attention_mask, None, None)
        given.attrs = given.attrs | dict(inputs.attrs)
        if inputs.labels:
            given.labels = given.labels | dict(inputs.labels)
        return given
    if isinstance(inputs, Corpus):
        return _from_corpus(model, inputs, attention_mask)
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
    given.keywords = _prepared(model, given.keywords)
    return given


def _from_corpus(model: nn.Module, corpus: Corpus, attention_mask: Any) -> ModelInput:
    """Its ids and its mask are whole by construction; what is left to check is whether the model takes them."""
    if attention_mask is not None:
        raise ValueError("a corpus brings its own attention mask: lay it out with mp.corpus(..., layout=...)")
    if corpus.largest_id >= _n_vocab(model, (len(corpus), corpus.length)):
        for batch in corpus.blocks():
            _check_ids(model, torch.from_numpy(batch.ids), batch.first)
    if corpus.padding_tokens:
        _prepared(model, {"attention_mask": torch.zeros(1, 1, dtype=torch.long)})
    return CorpusInput(corpus, partial(_prepared, model))


def _prepared(model: nn.Module, given: Mapping[str, Any]) -> dict[str, Any]:
    """The keywords as the model's own forward takes them, where the model is.

    Raises:
        ValueError: the model takes no mask, and there is padding.
    """
    device = place(model)
    keywords = {k: v.to(device) if isinstance(v, Tensor) else v for k, v in _fitted(model, dict(given)).items()}
    if "use_cache" in inspect.signature(model.forward).parameters:
        keywords.setdefault("use_cache", False)
    return keywords


def _fitted(model: nn.Module, keywords: dict[str, Any]) -> dict[str, Any]:
    """The keywords by the names of the model's own forward: a mask that it does not take must mask nothing."""
    takes = inspect.signature(type(model).forward).parameters
    passes_on = any(parameter.kind is parameter.VAR_KEYWORD for parameter in takes.values())
    first = list(takes.values())[1]
    named = first.kind is first.POSITIONAL_OR_KEYWORD and (first.default is first.empty or not passes_on)
    if "hidden_states" in keywords and "hidden_states" not in takes and first.name == "input_ids":
        raise ValueError(
            f"{type(model).__name__} takes token ids (batch, token), which are integers; got"
            f" {keywords['hidden_states'].dtype} of shape {tuple(keywords['hidden_states'].shape)}"
        )
    if "hidden_states" in keywords and "hidden_states" not in takes and named:
        keywords[first.name] = keywords.pop("hidden_states")
    if "input_ids" in keywords and "input_ids" not in takes and not passes_on:
        raise ValueError(
            f"{type(model).__name__}.forward has no argument `input_ids`, by which token ids are given and tokens are"
            f" labelled; it has {', '.join(list(takes)[1:])}: call that of token ids `input_ids`, as transformers does"
        )
    known = set(takes) if not passes_on else {name for part in model.modules() for name in _names(type(part))}
    unknown = [name for name in keywords if name not in known and name != "attention_mask"]
    if unknown:
        raise unknown_name(f"keyword of {type(model).__name__}", unknown[0], sorted(known - {"self"}))
    mask = None if "attention_mask" in known else keywords.pop("attention_mask", None)
    if mask is not None and not mask.bool().all():
        raise ValueError(
            f"{type(model).__name__} takes no attention_mask: padding would be read as tokens. Record rows of one"
            " length at a time, without a mask"
        )
    return keywords


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
    found = [key for key in ("input_ids", "hidden_states", "inputs_embeds") if key in keywords]
    if len(found) != 1:
        came = sorted(map(str, keywords))
        raise ValueError(f"a dict needs input_ids, inputs_embeds or hidden_states, one of them; got {came}")
    main = found[0]
    checked = _from_array(keywords.pop(main), keywords.pop("attention_mask", None))
    if (main == "input_ids") != ("input_ids" in checked.keywords):
        raise ValueError(f"{main} of the dict holds {next(iter(checked.keywords.values())).dtype}: ids are integers")
    for key, value in keywords.items():
        if isinstance(value, Tensor) and value.shape[:1] != (checked.batch,):
            raise ValueError(f"{key} needs a row for each of {checked.batch}; got shape {tuple(value.shape)}")
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
    if isinstance(text, str) or not all(isinstance(line, str) for line in text) or not text:
        raise ValueError(f"text is a non-empty list of strings; got {type(text).__name__}")
    rows = [token_ids(Document(line, f"text {i}"), tokenizer) for i, line in enumerate(text)]
    empty = [i for i, row in enumerate(rows) if not len(row)]
    if empty:
        raise ValueError(f"text {empty[0]} has no tokens: an empty sequence cannot be recorded")
    check_known(sum(n_unknown(row, tokenizer) for row in rows), sum(map(len, rows)), "text")
    length = max(map(len, rows))
    ids, mask = np.zeros((len(rows), length), np.int64), np.zeros((len(rows), length), np.int64)
    pieces = np.full((len(rows), length), "", dtype=object)
    for i, row in enumerate(rows):
        ids[i, : len(row)], mask[i, : len(row)] = row, 1
        pieces[i, : len(row)] = tokenizer.convert_ids_to_tokens(row.tolist())
    given = _from_array(ids, mask)
    return ModelInput(given.keywords, given.batch, given.length, {"token_text": pieces})


def _tensor(value: Any, name: str) -> Tensor:
    try:
        tensor = value if isinstance(value, Tensor) else torch.as_tensor(np.asarray(value))
    except (TypeError, ValueError, RuntimeError, OverflowError) as error:
        raise ValueError(f"{name} is no rectangular array of numbers ({error}); pad rows and pass a mask") from error
    if tensor.is_complex() or tensor.device.type == "meta" or tensor.layout != torch.strided:
        came = f"{tensor.dtype}, {tensor.layout}, on {tensor.device}"
        raise ValueError(f"{name} is a dense tensor of integers or real numbers that exist; got {came}")
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


def _n_vocab(model: nn.Module, shape: tuple[int, ...]) -> int:
    """How many token ids the model knows.

    Raises:
        ValueError: it takes none.
    """
    embedding = (part for part in model.modules() if isinstance(part, nn.Embedding))
    embed = getattr(model, "get_input_embeddings", lambda: next(embedding, None))()
    if embed is None:
        raise ValueError(
            f"{type(model).__name__} takes hidden states (batch, token, model) as floats; got integer ids of shape"
            f" {shape}"
        )
    return len(embed.weight)


def _check_ids(model: nn.Module, ids: Tensor, first: int = 0) -> None:
    """`first`: the number of the first of these rows."""
    n_vocab = _n_vocab(model, tuple(ids.shape))
    low, high = int(ids.min()), int(ids.max())
    if low < 0 or high >= n_vocab:
        bad = low if low < 0 else high
        row, token = torch.argwhere(ids == bad)[0].tolist()
        raise ValueError(
            f"token id {bad} at row {first + row}, token {token} is out of range: this model knows 0..{n_vocab - 1}."
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
