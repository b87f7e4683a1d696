"""A run: one model on one task or text, recorded with everything the analyses need, in one directory.

DIR/trace.zarr  weights.nc  parity.nc            always
DIR/interventions.nc  twin.zarr  twin_weights.nc  for a task: answers under edits, and the randomised twin
DIR/beside/...                                    where another model was recorded beside it: its run
"""

import copy
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from math import ceil
from os import PathLike
from pathlib import Path
from typing import Any

import numpy as np
import torch
import xarray as xr
from torch import nn

from mamba_probe import again, blocks, provenance, tasks
from mamba_probe.corpora import CONVERT, check_known, n_unknown
from mamba_probe.edits import ablate, freeze
from mamba_probe.inputs import Labelled
from mamba_probe.mixers.offload import place
from mamba_probe.probe import Probe, attach
from mamba_probe.reference import card_train_length
from mamba_probe.run_folder import BESIDE, MEMORY, Into
from mamba_probe.tasks import Task
from mamba_probe.trace.contract import unknown_name
from mamba_probe.trace.schema import DEFAULT_VARIABLES
from mamba_probe.trace.store import open_dataset, open_trace, remove, save
from mamba_probe.trace.untrusted import loaded
from mamba_probe.untrusted import inside

__all__ = [
    "BESIDE",
    "TASKS",
    "Run",
    "Text",
    "randomised_twin",
    "record_given",
    "record_task",
    "record_text",
    "vocabulary",
]

TASKS = {"mqar": tasks.mqar}
EDITS = (ablate("conv"), ablate("gate"), ablate("decay"), freeze("delta"), freeze("B"), freeze("C"))
SHORTEST_ROW = 16
"""Tokens of the last row of a text, below which it is left out: too short for a horizon or a wavelet."""
PARITY_ROWS = 2
"""Rows that the float64 oracle, a sequential loop, is run on."""
Say = Callable[[str], None]


@dataclass(frozen=True)
class Run:
    """What was recorded of one model, and of a reference beside it."""

    trace: xr.Dataset
    weights: xr.Dataset
    parity: xr.Dataset
    interventions: xr.Dataset | None = None
    twin: tuple[xr.Dataset, xr.Dataset] | None = None
    beside: "Run | None" = None
    model: nn.Module | None = field(default=None, repr=False)
    """The model itself where this run was recorded in this process; it is not stored."""
    load_models: bool = False
    """Whether the user said that the folders and hub ids which this run names may be read."""

    @property
    def task(self) -> Task | None:
        """The task that was recorded, its answers with it; None of a text."""
        attrs = self.trace.attrs
        if "task" not in attrs:
            return None
        ids, role, target, source = (self.trace[name].values for name in ("token_id", "role", "target", "source_token"))
        params, (start, stop) = json.loads(attrs["task_params"]), attrs["answers"]
        given = (ids.astype(np.int64), role.astype(str), target, source, int(attrs["vocab"]), params)
        return Task(attrs["task"], *given, range(int(start), int(stop)))

    def inputs(self) -> tuple[np.ndarray, np.ndarray]:
        """Token ids and mask (batch, token) as recorded."""
        return self.trace["token_id"].values.astype(np.int64), self.trace["valid"].values.astype(np.int64)

    @property
    def sizes(self) -> Mapping[Any, int]:
        """Sizes of the trace, by dimension."""
        return self.trace.sizes

    def isel(self, batch: Sequence[int] | np.ndarray | slice) -> "Run":
        """The run of some rows, as `xarray` takes them: trace, twin and task; the model, weights and parity are whole.

        Answers under edits are counted over all rows, so they are left out, and so is what was recorded beside.
        """
        twin = None if self.twin is None else (self.twin[0].isel(batch=batch), self.twin[1])
        trace = self.trace.isel(batch=batch)
        return replace(self, trace=trace, twin=twin, interventions=None, beside=None)

    def with_model(self) -> "Run":
        """The run with its model at hand, so that it is loaded once.

        Raises:
            ValueError: as `probe`.
        """
        with self.probe() as probe:
            return replace(self, model=probe.model)

    @contextmanager
    def probe(self) -> Iterator[Probe]:
        """The model that was recorded, with a probe attached: at hand, or loaded again from where the trace says, which
        for other than the zoo and the constructions takes `load_models`.

        Raises:
            ValueError: it may not or cannot be loaded from there, or its weights are no longer those recorded.
        """
        attrs = self.trace.attrs
        model = self.model if self.model is not None else again.load_again(attrs, self.load_models)
        found = provenance.of_model(model)["model_hash"]
        if found != attrs["model_hash"]:
            raise ValueError(
                f"the weights of {attrs['model']} are not those that were recorded (sha256 {found[:12]}, recorded"
                f" {attrs['model_hash'][:12]}): put that checkpoint back, or record again"
            )
        with attach(model, backend=attrs["backend"]) as probe:
            yield probe

    def lacks_model(self) -> str:
        """What is missing for `probe`, in words; nothing where the model is at hand, or on record and allowed."""
        return "" if self.model is not None else again.lacks(self.trace.attrs, self.load_models)

    def save(self, directory: str | PathLike[str], *, overwrite: bool = False) -> Path:
        """Write the stores.

        Raises:
            ValueError: a store exists, unless overwriting.
        """
        directory = Path(directory)
        for name, dataset in self._stores().items():
            if dataset is not None:
                save(dataset, directory / name, overwrite=overwrite)
            elif overwrite:
                remove(directory / name)  # of an earlier run
        if overwrite:
            remove(directory / BESIDE)
        if self.beside is not None:
            self.beside.save(directory / BESIDE)
        return directory

    def _stores(self) -> dict[str, xr.Dataset | None]:
        twin_trace, twin_weights = self.twin or (None, None)
        return {
            "trace.zarr": self.trace, "weights.nc": self.weights, "parity.nc": self.parity,
            "interventions.nc": self.interventions, "twin.zarr": twin_trace, "twin_weights.nc": twin_weights,
        }  # fmt: skip

    @classmethod
    def open(cls, directory: str | PathLike[str], *, load_models: bool = False) -> "Run":
        """Open what `save` wrote, lazily.

        Args:
            directory: may be a stranger's: no store in it may be a link to elsewhere.
            load_models: let `probe` load a model from the folder or hub id that the run names. Without it only what
                ships with the package is loaded: zoo:NAME and construction:KIND.

        Raises:
            FileNotFoundError: no run there.
            ValueError: a store is damaged, or leads out of the directory.
        """
        directory = Path(directory)
        lacks = next(
            (name for name in ("trace.zarr", "weights.nc", "parity.nc") if not (directory / name).exists()), ""
        )
        if lacks:
            raise FileNotFoundError(f"{directory} holds no run (no {lacks}): make one with `mamba-probe record`")
        twin_weights = _optional(directory, "twin_weights.nc") if (directory / "twin.zarr").exists() else None
        twin = None if twin_weights is None else (open_trace(inside(directory / "twin.zarr", directory)), twin_weights)
        below = inside(directory / BESIDE, directory)
        beside = cls.open(below, load_models=load_models) if below.exists() else None
        trace, weights, parity = (
            inside(directory / name, directory) for name in ("trace.zarr", "weights.nc", "parity.nc")
        )
        return cls(
            open_trace(trace), open_dataset(weights), loaded(open_dataset(parity)),
            _optional(directory, "interventions.nc"), twin, beside, load_models=load_models,
        )  # fmt: skip


@dataclass(frozen=True)
class Text:
    """A file's tokens in rows of one length; the last may be shorter, and is left out below SHORTEST_ROW."""

    path: str | PathLike[str]
    tokenizer: Any
    length: int = 512
    rows: int = 4

    def read(self) -> tuple[np.ndarray, np.ndarray, np.ndarray, int]:
        """Ids, mask and token texts (row, token), and how many tokens of the file were left out.

        Raises:
            FileNotFoundError: no such file.
            ValueError: not text, or no tokens.
        """
        try:
            ids = self.tokenizer(Path(self.path).read_text(encoding="utf-8"))["input_ids"]
        except UnicodeDecodeError as error:
            raise ValueError(f"{self.path} is not UTF-8 text: {error}; {CONVERT}") from error
        if not ids:
            raise ValueError(f"{self.path} has no tokens: an empty sequence cannot be recorded")
        check_known(n_unknown(ids, self.tokenizer), len(ids), str(self.path))
        used = ids[: self.length * self.rows]
        if len(used) > self.length and len(used) % self.length < SHORTEST_ROW:
            used = used[: len(used) - len(used) % self.length]
        if min(len(used), self.length) < SHORTEST_ROW:
            shortest = f"rows of at least {SHORTEST_ROW} tokens are needed"
            more = "longer rows (--length)" if self.length < SHORTEST_ROW else "a longer text"
            raise ValueError(
                f"{self.path} gives rows of {min(len(used), self.length)} token(s); {shortest}: give {more}"
            )
        shape = (ceil(len(used) / self.length), min(self.length, len(used)))
        flat = np.zeros(shape[0] * shape[1], np.int64)
        flat[: len(used)] = used
        mask = np.arange(flat.size) < len(used)
        pieces = np.full(flat.size, "", dtype=object)
        pieces[: len(used)] = self.tokenizer.convert_ids_to_tokens(used)
        return flat.reshape(shape), mask.reshape(shape).astype(np.int64), pieces.reshape(shape), len(ids) - len(used)


def record_task(
    model: nn.Module, name: str, *, rows: int = 64, length: int = 64, n_pairs: int = 8, vocab: int | None = None,
    seed: int = 0, beside: nn.Module | None = None, train_length: int | None = None, backend: str = "auto",
    batch_size: int | None = 16, into: Into = MEMORY, say: Say = lambda _: None,
) -> Run:  # fmt: skip
    """Record a language model on a generated task: trace, weights, parity, answers under edits, randomised twin.

    Args:
        model: with an embedding; `vocab` defaults to its number of ids (one fewer if odd).
        name: of the task; see `TASKS`.
        rows, length, n_pairs, vocab, seed: of the task.
        beside: a reference to record likewise: on the same rows where it has as many ids, else on rows drawn alike
            from its own.
        train_length: tokens of the rows that the model was trained on; None: what its card says, if it has one.
        batch_size: rows a forward call.
        into: a directory that traces stream to, or memory.
        say: told each step before it starts.

    Raises:
        ValueError: an unknown task, sizes that cannot be, a model without token ids; a directory that holds a run.
    """
    if name not in TASKS:
        raise unknown_name("task", name, tuple(TASKS))
    if n_pairs < 2:
        raise ValueError(f"n_pairs is at least 2, so that a query has a pair to confuse with its own; got {n_pairs}")
    vocab = vocab or vocabulary(model)
    task = TASKS[name](batch=rows, length=length, n_pairs=n_pairs, vocab=vocab, seed=seed)
    options: dict[str, Any] = {"seed": seed, "backend": backend, "batch_size": batch_size}
    run = record_given(model, task, train_length=train_length, into=into, say=say, **options)
    if beside is None:
        return run
    if vocabulary(beside) != vocab:
        task = TASKS[name](batch=rows, length=length, n_pairs=n_pairs, vocab=vocabulary(beside), seed=seed)
    options |= {"into": into.beside, "say": lambda step: say(f"beside: {step}")}
    return replace(run, beside=record_given(beside, task, **options))


def record_given(
    model: nn.Module, task: Task, *, seed: int = 0, train_length: int | None = None, backend: str = "auto",
    batch_size: int | None = 16, into: Into = MEMORY, say: Say = lambda _: None,
) -> Run:  # fmt: skip
    """As `record_task`, of a task that was drawn before, by any of `mamba_probe.tasks`."""
    given = Labelled(task, attrs=_trained_on(model, train_length))
    options = {"batch_size": batch_size, "variables": (*DEFAULT_VARIABLES, "x", "z", "y", "u", "out")}
    with attach(model, backend=backend) as probe:
        run = _begun(probe, given, task.input_ids[:PARITY_ROWS], None, into, say, **options)
        if not into.leads:
            return run
        say("answers with parts edited")
        edits = EDITS[:3] if run.trace.attrs["family"] == "s4d" else EDITS  # there delta, B and C are constant
        size = into.options.get("batch_size") or batch_size
        interventions = into.kept("interventions.nc", lambda: probe.intervene(task, edits, batch_size=size))
    say("the randomised twin")
    with attach(randomised_twin(model, seed), backend=backend) as probe:
        twin_weights = into.kept("twin_weights.nc", probe.weights)
        twin = into.alone.record(probe, "twin.zarr", Labelled(task), **options)
    return replace(run, interventions=interventions, twin=(twin, twin_weights))


def _begun(
    probe: Probe, given: Labelled, ids: np.ndarray, mask: np.ndarray | None, into: Into, say: Say, **options: Any
) -> Run:  # fmt: skip
    """Weights and parity, so that what follows can be read whatever stops it, and the trace.

    A process that does not lead records its share of the trace, and has no parity.
    """
    weighs = probe.estimate(given, **{name: value for name, value in options.items() if name == "variables"})
    into.begin()
    if into.leads:
        weights = into.kept("weights.nc", probe.weights)
        say("parity with the untouched model and the float64 oracle")
        parity = into.kept("parity.nc", lambda: probe.parity(ids, mask))
    else:
        weights, parity = probe.weights(), xr.Dataset()
    say(f"recording {weighs}")
    return Run(into.record(probe, "trace.zarr", given, **options), weights, parity, model=probe.model)


def _trained_on(model: nn.Module, train_length: int | None) -> dict[str, Any]:
    """The attribute of the length of the rows that the model was trained on, where that is known."""
    if train_length is not None and train_length < 1:
        raise ValueError(f"train_length is at least 1 token; got {train_length}")
    source = getattr(model, "_mamba_probe_source", {}).get("source")
    length = train_length or (None if source is None else card_train_length(source))
    return {} if length is None else {"train_length": length}


def record_text(
    model: nn.Module, text: Text, *, train_length: int | None = None, backend: str = "auto", into: Into = MEMORY,
    say: Say = lambda _: None,
) -> Run:  # fmt: skip
    """Record a language model on a text: trace, weights and parity; no task, so no answers to count.

    `train_length` and `into` as in `record_task`.

    Raises:
        ValueError: an empty file, a tokenizer of another model, a model without token ids.
    """
    vocabulary(model)
    ids, mask, pieces, left = text.read()
    say(f"{mask.sum()} tokens of {text.path} in {len(ids)} row(s); {left} tokens left out")
    attrs = _trained_on(model, train_length) | {"text": str(text.path), "tokens_left_out": left}
    given = Labelled(ids, mask, {"token_text": pieces}, attrs)
    with attach(model, backend=backend) as probe:
        return _begun(probe, given, ids[:1], mask[:1], into, say, batch_size=1)


def randomised_twin(model: nn.Module, seed: int = 0) -> nn.Module:
    """The same architecture with the library's own standard initialisation: what an untrained model measures.

    Raises:
        ValueError: neither a transformers model with a config nor one of `mamba_probe.blocks`.
    """
    config = getattr(model, "config", None)
    own = blocks.config_of(model) if config is None else None
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        twin = (blocks.build(own) if own else type(model)(copy.deepcopy(config))).eval()
    return twin.to(device=place(model), dtype=next(model.parameters()).dtype)


def _optional(directory: Path, name: str) -> xr.Dataset | None:
    path = inside(directory / name, directory)
    return loaded(open_dataset(path)) if path.exists() else None


def vocabulary(model: nn.Module) -> int:
    """Token ids that a task may use: as many as the model has, one fewer if odd.

    Raises:
        ValueError: a model without token ids.
    """
    embed = getattr(model, "get_input_embeddings", lambda: None)()
    if embed is None:
        raise ValueError(
            f"{type(model).__name__} takes hidden states, not token ids, so no task or text can be fed to it here:"
            " record it from Python with mp.attach(model).record(hidden_states)"
        )
    return embed.num_embeddings - embed.num_embeddings % 2
