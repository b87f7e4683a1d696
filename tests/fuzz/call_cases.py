"""Tasks, constructions, blocks, training configs and the command line: right arguments, of which some are changed."""

import inspect
import os
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from harness import ODD, Fuzzer, Unclean, odd
from hypothesis import strategies as st
from typer.testing import CliRunner

import mamba_probe as mp
from mamba_probe.cli import app
from mamba_probe.training.config import Config

TASKS: dict[str, dict[str, Any]] = {
    "mqar": {
        "batch": 2,
        "length": 16,
        "n_pairs": 2,
        "vocab": 16,
        "seed": 0,
        "power_a": 0.01,
        "filler": "zero",
        "n_keys": 2,
    },
    "keep_nth": {"batch": 2, "length": 16, "n": 3, "n_tokens": 8, "seed": 0, "marker": False},
    "induction": {"batch": 2, "length": 16, "vocab": 8, "occurrences": 1, "seed": 0, "special": 0},
    "induction_every_token": {"batch": 2, "length": 16, "vocab": 8, "seed": 0},
    "selective_copying": {"batch": 2, "seed": 0},
    "repeated_tokens": {"batch": 2, "seed": 0},
    "function_approximation": {"kind": "steps", "batch": 1, "length": 16, "n_pieces": 2, "jumps": None, "seed": 0},
}
CONSTRUCTIONS: dict[str, dict[str, Any]] = {
    "mqar": {"mixer": "mamba1", "n_keys": 4, "n_values": 4, "key_code": "one-hot", "writes": "add"},
    "keep_nth": {"n_tokens": 4, "length": 8, "n": 3, "beta": 64.0, "profile": "ramp"},
    "induction": {"kind": "every", "mixer": "mamba1", "n_tokens": 4, "special": 0},
}
BLOCKS: dict[str, dict[str, Any]] = {
    "mamba1": {"d_model": 4, "d_state": 2, "d_conv": 2, "dt_rank": 1, "d_inner": 8},
    "mamba2": {"d_model": 4, "n_heads": 2, "d_state": 2, "d_conv": 2, "n_groups": 1, "d_inner": 8, "gated_norm": True},
    "s4d": {"d_model": 4, "d_state": 2, "d_conv": 2, "d_inner": 8},
}
CONFIG: dict[str, Any] = {
    "task": {"name": "mqar", "length": 16, "n_pairs": 2, "vocab": 16},
    "mixer": {"kind": "mamba1", "d_model": 4},
    "layers": 1,
    "steps": 10,
    "batch": 2,
    "learning_rate": 1e-3,
    "warmup": 1,
    "schedule": "cosine",
    "weight_decay": 0.0,
    "clip": 1.0,
    "seed": 0,
    "device": "cpu",
    "dtype": "float32",
    "every": 5,
    "evaluation_batches": 1,
    "stop_at": 0.9,
    "fixed_batches": None,
    "mixture": [],
}
WORDS = [
    "zoo:mqar-mamba1",
    "zoo:none",
    "nowhere",
    "",
    "-1",
    "0",
    "1",
    "3",
    "abc",
    "mqar",
    "all",
    "main",
    "haar",
    "memory_horizon",
    "no_such",
    "--task",
    "--text",
    "--length",
    "--rows",
    "--seed",
    "--pairs",
    "--n-pairs",
    "--overwrite",
    "--backend",
    "naive",
    "cpu",
    "triton",
    "-o",
    "out",
    "--out",
    "FILE",
    "FOLDER",
    "--beside",
    "construction:mamba2",
    "construction:x",
    "none",
    "--tokenizer",
    "--train-length",
    "--analyses",
    "a=FOLDER",
    "=",
    "--variable",
    "--resample",
    "refit",
    "--unpaired",
    "\x00",
    "99999999999999999999",
    "../..",
    "~",
    "nan",
    "--help",
]
COMMANDS = ["report", "record", "analyze", "compare", "inspect", "zoo", "verify", "no-such"]
_at = st.integers(0, 30)
_changes = st.lists(st.tuples(_at, odd), max_size=2)
CASES = st.one_of(
    st.tuples(st.just("task"), st.sampled_from(sorted(TASKS)), _changes),
    st.tuples(st.just("task"), st.sampled_from(sorted(TASKS)), _changes),
    st.tuples(st.just("construction"), st.sampled_from(sorted(CONSTRUCTIONS)), st.just([])),
    st.tuples(st.just("block"), st.sampled_from(sorted(BLOCKS)), _changes),
    st.tuples(st.just("config"), st.sampled_from(["whole", "task", "mixer", "json"]), _changes),
    st.tuples(st.just("command"), st.sampled_from(COMMANDS), st.lists(st.sampled_from(WORDS), max_size=5)),
)


def with_changes(base: dict[str, Any], changes: Any) -> dict[str, Any]:
    given, names = dict(base), sorted(base)
    for at, value in changes:
        given[names[at % len(names)]] = ODD[value]()
    return given


def run(case: Any) -> None:
    kind, name, changes = case
    if kind == "command":
        commanded(name, changes)
    elif kind == "config":
        configured(name, changes)
    elif kind == "task":
        drawn(name, changes)
    elif kind == "construction":
        built = getattr(mp.constructions, name)(**with_changes(CONSTRUCTIONS[name], changes))
        if not all(bool(weight.isfinite().all()) for weight in built.model.parameters()):
            raise Unclean(f"a weight of the construction {name} is not finite")
    else:
        made = mp.blocks.build({"mixers": [{"kind": name} | with_changes(BLOCKS[name], changes)], "vocab_size": None})
        with torch.no_grad():
            if not made(torch.ones(1, 3, made.sizes["d_model"])).isfinite().all():
                raise Unclean("a block's output is not finite")


def drawn(name: str, changes: Any) -> None:
    task = getattr(mp.tasks, name)(**with_changes(TASKS[name], changes))
    for array in vars(task).values() if not isinstance(task, tuple) else task:
        if isinstance(array, np.ndarray) and array.dtype.kind == "f" and not np.isfinite(array).all():
            raise Unclean(f"{name} drew NaN or infinity")


def configured(part: str, changes: Any) -> None:
    if part == "whole":
        Config(**with_changes(CONFIG, changes))
    elif part == "json":
        text = Config(**CONFIG).to_json()
        at = changes[0][0] if changes else 0
        Config.from_json(text[: at * 10] + text[at * 10 + 1 :])
    else:
        Config(**CONFIG | {part: with_changes(CONFIG[part], changes)})


def commanded(name: str, words: list[str]) -> None:
    """No traceback; an exit code of 2, or 1, comes with words."""
    with tempfile.TemporaryDirectory(prefix="fuzz") as folder:
        before = os.getcwd()
        os.chdir(folder)
        try:
            Path("FILE").write_text("some text")
            Path("FOLDER").mkdir()
            found = CliRunner().invoke(app, [name, *words])
        finally:
            os.chdir(before)
    if found.exception is not None and not isinstance(found.exception, SystemExit):
        raise found.exception
    if found.exit_code not in (0, 1, 2) or (found.exit_code and not found.output.strip()):
        raise Unclean(f"exit code {found.exit_code} with the words {found.output[-200:]!r}")


assert all(set(base) <= set(inspect.signature(getattr(mp.tasks, name)).parameters) for name, base in TASKS.items())
FUZZER = Fuzzer("call", CASES, run, long=500, short=20, shard=250)
