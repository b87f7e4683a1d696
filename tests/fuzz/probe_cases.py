"""Arguments of a probe's methods, of edits, hooks and patching: right ones, of which one or two are changed.

After every case the model gives its own logits again, bit for bit.
"""

import contextlib
import shutil
import tempfile
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
import xarray as xr
from harness import ODD, Fuzzer, Unclean, odd
from hypothesis import strategies as st
from torch import nn

import mamba_probe as mp

TASK = mp.tasks.mqar(batch=2, length=12, n_pairs=2, vocab=16, seed=1)
IDS = TASK.input_ids
HIDDEN = torch.randn(2, 12, 8, generator=torch.Generator().manual_seed(0))
KINDS: dict[str, Callable[[], dict[str, Any]]] = {
    "mamba1": lambda: {"kind": "mamba1", "d_model": 8, "d_state": 2},
    "mamba2": lambda: {"kind": "mamba2", "d_model": 8, "n_heads": 4, "d_state": 4, "n_groups": 2},
    "s4d": lambda: {"kind": "s4d", "d_model": 8, "d_state": 2},
}


@cache
def model(kind: str) -> nn.Module:
    """A language model of two layers, and below what it answers untouched."""
    torch.manual_seed(0)
    if kind == "hf":
        from transformers import MambaConfig, MambaForCausalLM

        config = MambaConfig(vocab_size=16, hidden_size=8, state_size=2, num_hidden_layers=2, time_step_rank=2)
        made: nn.Module = MambaForCausalLM(config)
    else:
        made = mp.blocks.build({"mixers": [KINDS[kind]()] * 2, "vocab_size": 16})
    with torch.no_grad():
        for weight in made.parameters():
            weight.add_(torch.randn(weight.shape) * 0.1)
    return made.eval()


def answered(live: nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return live(torch.as_tensor(IDS)).logits


untouched = cache(lambda kind: answered(model(kind)))

NEAR: dict[str, Callable[[], Any]] = {
    "ids": lambda: IDS,
    "ids of a row": lambda: IDS[0],
    "ids 3d": lambda: IDS[None],
    "ids as floats": lambda: IDS.astype(float),
    "ids as bytes": lambda: IDS.astype(np.uint8),
    "ids unsigned": lambda: IDS.astype(np.uint64),
    "ids as lists": IDS.tolist,
    "ids as text": lambda: [["a", "b"]],
    "ids out of range": lambda: IDS + 9,
    "ids negative": lambda: -IDS - 1,
    "ids huge": lambda: np.full((2, 12), 2**40),
    "ids beyond": lambda: [[2**70]],
    "no rows": lambda: IDS[:0],
    "no tokens": lambda: IDS[:, :0],
    "one token": lambda: IDS[:, :1],
    "on meta": lambda: torch.as_tensor(IDS).to("meta"),
    "sparse ids": lambda: torch.as_tensor(IDS).to_sparse(),
    "strided ids": lambda: torch.as_tensor(IDS).mT.contiguous().mT,
    "hidden": lambda: HIDDEN,
    "hidden NaN": lambda: HIDDEN / 0,
    "hidden narrow": lambda: HIDDEN[..., :3],
    "hidden double": HIDDEN.double,
    "hidden half": HIDDEN.half,
    "hidden 2d": lambda: HIDDEN[0],
    "hidden complex": lambda: HIDDEN.to(torch.complex64),
    "dict": lambda: {"input_ids": IDS},
    "dict embeds": lambda: {"inputs_embeds": HIDDEN},
    "dict both": lambda: {"input_ids": IDS, "inputs_embeds": HIDDEN},
    "dict unknown": lambda: {"input_ids": IDS, "no_such": 1},
    "dict labels": lambda: {"input_ids": IDS, "labels": IDS[:1]},
    "dict mask": lambda: {"input_ids": IDS, "attention_mask": None},
    "dict numbers": lambda: {1: IDS},
    "mask": lambda: np.ones((2, 12)),
    "mask left": lambda: (np.arange(12) > 3)[None] & np.ones((2, 1), bool),
    "mask right": lambda: ((np.arange(12) < 9)[None] & np.ones((2, 1), bool)).astype(int),
    "mask hole": lambda: np.array([[1, 1, 0, 1] * 3] * 2),
    "mask empty": lambda: np.zeros((2, 12), int),
    "mask 2": lambda: np.full((2, 12), 2),
    "mask NaN": lambda: np.full((2, 12), np.nan),
    "mask 4d": lambda: np.ones((2, 1, 12, 12)),
    "mask short": lambda: np.ones((2, 11), int),
    "task": lambda: TASK,
    "task of another vocabulary": lambda: mp.tasks.mqar(batch=2, length=12, n_pairs=2, vocab=64, seed=0),
    "task without queries": lambda: mp.tasks.keep_nth(batch=2, length=12, n=3, n_tokens=16),
    "repeated": lambda: mp.tasks.repeated_tokens(batch=2, period=6, vocab=16),
    "names": lambda: ["delta", "A", "B", "C", "x", "out"],
    "name twice": lambda: ["delta", "delta"],
    "a wrong name": lambda: ["delta", "delt"],
    "every name": lambda: list(mp.trace.schema.VARIABLES) if hasattr(mp, "trace") else ["h", "y"],
    "layers": lambda: [0, 1],
    "layer 1": lambda: [1],
    "layer 2": lambda: [2],
    "layers twice": lambda: [0, 0],
    "np layers": lambda: np.array([0, 1]),
    "tokens": lambda: [0, 5, 11],
    "token 12": lambda: [12],
    "tokens falling": lambda: [5, 3],
    "generator": lambda: (i for i in range(2)),
    "hook name": lambda: "blocks.0.mixer.hook_delta",
    "hook names": lambda: ["blocks.0.mixer.hook_B", "blocks.1.mixer.hook_x"],
    "hook of a state": lambda: "blocks.0.mixer.hook_h.3",
    "hook of no token": lambda: "blocks.0.mixer.hook_h.99",
    "hook of no layer": lambda: "blocks.7.mixer.hook_delta",
    "filter": lambda: lambda name: "delta" in name,
    "filter of nothing": lambda: lambda name: False,
    "filter of text": lambda: lambda name: "yes",
    "hook": lambda: [("blocks.0.mixer.hook_delta", lambda tensor, hook: tensor * 0.5)],
    "hook of a shape": lambda: [("blocks.0.mixer.hook_delta", lambda tensor, hook: tensor[:1])],
    "hook of a number": lambda: [("blocks.0.mixer.hook_delta", lambda tensor, hook: 3)],
    "hook NaN": lambda: [("blocks.0.mixer.hook_delta", lambda tensor, hook: tensor * float("nan"))],
    "hook double": lambda: [("blocks.0.mixer.hook_delta", lambda tensor, hook: tensor.double())],
    "hook of no function": lambda: [("blocks.0.mixer.hook_delta", 3)],
    "hook alone": lambda: [("blocks.0.mixer.hook_delta",)],
    "metric": lambda: lambda logits: logits[:, -1, 1] - logits[:, -1, 2],
    "metric of all": lambda: lambda logits: logits,
    "metric of a number": lambda: lambda logits: 1.0,
    "metric NaN": lambda: lambda logits: logits[:, -1, 1] * float("nan"),
    "metric alone": lambda: lambda logits: logits.mean(),
    "edit": lambda: mp.scale("delta", 0.5),
    "edits": lambda: [mp.ablate("conv"), [mp.zero("B"), mp.scale("C", 2.0)]],
    "edit of no layer": lambda: mp.ablate("conv", layer=9),
    "classes": lambda: {"a": np.ones((2, 12), bool), "b": np.arange(24).reshape(2, 12) % 2 == 0},
    "classes short": lambda: {"a": np.ones((2, 3), bool)},
    "classes odd": lambda: {"a": np.full((2, 12), "x"), 3: None},
    "class of nothing": lambda: {"a": np.zeros((2, 12), bool)},
    "class with NaN": lambda: {"a": np.full((2, 12), np.nan)},
    "per channel": lambda: np.ones((2, 12, 16)),
    "sites": lambda: ["x", "B"],
    "zarr": lambda: "STORE.zarr",
    "no store": lambda: "STORE.txt",
    "taken": lambda: "TAKEN.zarr",
    "delta": lambda: "delta",
    "B": lambda: "B",
    "h": lambda: "h",
    "zero": lambda: "zero",
    "1 GB": lambda: "1GB",
    "1 kB": lambda: "1kB",
    "lz4": lambda: "lz4",
    "device": lambda: "device",
    "(0, 2)": lambda: (0, 2),
    "(2, 2)": lambda: (2, 2),
    "narrow": lambda: {"B": "float16"},
    "narrow wrong": lambda: {"Q": "float3"},
    "2": lambda: 2,
    "narrower": lambda: {"delta": "int8"},
}
VALUES = ODD | NEAR


def _metric(logits: torch.Tensor) -> torch.Tensor:
    return logits[:, -1, 1] - logits[:, -1, 2]


def _edited(probe: Any, verb: str, **given: Any) -> Any:
    where, axis = given.pop("where"), given.pop("axis")
    axes = {} if where is None or verb == "ablate" or not isinstance(axis, str) else {axis: where}
    with probe.edit(getattr(mp, verb)(**given, **axes)):
        return probe.record(IDS, variables=["delta", "A", "out"])


def _recording(probe: Any, **given: Any) -> Any:
    with probe.recording(**given) as recorder:
        answered(probe.model)
    return recorder.dataset


def _generating(probe: Any, **given: Any) -> Any:
    if not hasattr(probe.model, "generate"):
        return answered(probe.model)
    with probe.recording(variables=["delta", "A"]) as recorder:
        beams, new = (len(str(given[name])) % 3 + 1 for name in ("beams", "new"))  # of the library's own arguments
        probe.model.generate(torch.as_tensor(IDS), max_new_tokens=new, num_beams=beams, do_sample=False, pad_token_id=0)
    return recorder.dataset


def _perturbed(probe: Any, target: Any, tokens: Any, rules: Any, **given: Any) -> Any:
    found = probe.relevance(TASK, target=target, tokens=tokens, rules=rules)
    return probe.perturbed(found, **given)


def _parity(probe: Any, **given: Any) -> Any:
    return probe.parity(**given)


RUN = {"inputs": "task", "attention_mask": "None", "batch_size": "None"}
RECORD = RUN | {
    "variables": "names",
    "layers": "None",
    "tokens": "None",
    "channels": "None",
    "store": "None",
    "text": "None",
}
PATCH = {"base": "ids", "source": "ids", "metric": "metric", "quantities": "['x']", "layers": "None", "tokens": "None"}
EDIT = {"target": "delta", "layer": "None", "axis": "token text", "where": "None"}
ENTRIES: dict[str, tuple[Callable[..., Any], dict[str, str]]] = {
    "record": (lambda probe, **given: probe.record(**given), RECORD),
    "estimate": (
        lambda probe, **given: probe.estimate(**given),
        {name: value for name, value in RECORD.items() if name not in ("attention_mask", "batch_size", "store")},
    ),
    "recording": (
        _recording,
        {"variables": "names", "layers": "None", "channels": "None", "keep": "host text", "store": "None"},
    ),
    "generate": (_generating, {"beams": "1", "new": "3"}),
    "weights": (lambda probe, **given: probe.weights(**given), {"layers": "None"}),
    "parity": (_parity, {"inputs": "ids", "attention_mask": "None", "text": "None"}),
    "jacobian of queries": (
        lambda probe, **given: probe.jacobian(**given),
        {
            "inputs": "ids",
            "attention_mask": "None",
            "layer": "0",
            "query_tokens": "tokens",
            "source_tokens": "None",
            "read_out": "None",
            "direction": "None",
            "n_probes": "None",
            "seed": "0",
        },
    ),
    "jacobian of sources": (
        lambda probe, **given: probe.jacobian(**given),
        {
            "inputs": "ids",
            "layer": "1",
            "query_tokens": "None",
            "source_tokens": "[0]",
            "direction": "None",
            "n_probes": "2",
            "seed": "0",
        },
    ),
    "intervene": (
        lambda probe, **given: probe.intervene(**given),
        {"task": "task", "edits": "edits", "batch_size": "None"},
    ),
    "cache": (
        lambda probe, **given: probe.run_with_cache(**given)[0],
        {"inputs": "ids", "attention_mask": "None", "names_filter": "hook names"},
    ),
    "hooks": (
        lambda probe, **given: probe.run_with_hooks(**given),
        {"inputs": "ids", "fwd_hooks": "hook", "bwd_hooks": "[]"},
    ),
    "losses": (lambda probe, **given: probe.losses(**given), RUN | {"edits": "[]", "fwd_hooks": "[]"}),
    "remembrance": (lambda probe, **given: probe.remembrance(**given), RUN | {"starts": "None", "queries": "None"}),
    "relevance": (
        lambda probe, **given: probe.relevance(**given),
        RUN | {"target": "None", "tokens": "None", "rules": "mambalrp text"},
    ),
    "perturbed": (
        _perturbed,
        {
            "target": "None",
            "tokens": "None",
            "rules": "mambalrp text",
            "replacement": "zero",
            "own": "True",
            "n_random": "1",
            "seed": "0",
            "batch_size": "None",
        },
    ),
    "ablate_class": (
        lambda probe, **given: probe.ablate_class(**given),
        RUN | {"classes": "classes", "n_random": "1", "seed": "0"},
    ),
    "ablate_units": (
        lambda probe, **given: probe.ablate_units(**given),
        RUN | {"layers": "layer 1", "heads": "None", "group": "None", "n_random": "1", "seed": "0"},
    ),
    "associating": (
        lambda probe, **given: probe.associating(**given),
        {"task": "task", "sites": "None", "layers": "layer 1", "batch_size": "64", "seed": "0", "twin_seed": "None"},
    ),
    "sweep": (
        lambda probe, **given: mp.patching.sweep(probe, **given, progress=False),
        PATCH | {"batch_size": "64", "store": "None"},
    ),
    "attribute": (
        lambda probe, **given: mp.patching.attribute(probe, **given),
        PATCH | {"exact": "None", "n_bootstrap": "3", "seed": "0"},
    ),
    "freeze": (lambda probe, **given: _edited(probe, "freeze", **given), EDIT | {"value": "None"}),
    "ablate": (lambda probe, **given: _edited(probe, "ablate", **given), EDIT),
    "assign": (lambda probe, **given: _edited(probe, "assign", **given), EDIT | {"value": "0.5"}),
    "scale": (lambda probe, **given: _edited(probe, "scale", **given), EDIT | {"factor": "0.5"}),
    "clamp": (lambda probe, **given: _edited(probe, "clamp", **given), EDIT | {"low": "0", "high": "1"}),
    "zero": (lambda probe, **given: _edited(probe, "zero", **given), EDIT),
    "swap": (lambda probe, **given: _edited(probe, "swap", **given), EDIT | {"source": "trace"}),
    "attach": (lambda probe, **given: mp.attach(**given), {"model": "None", "backend": "auto"}),
    "load": (
        lambda probe, **given: mp.load(**given),
        {"source": "zoo:mqar-mamba1", "revision": "None", "dtype": "None", "device": "cpu", "device_map": "None"},
    ),
    "load_tokenizer": (lambda probe, **given: mp.load_tokenizer(**given), {"source": "None", "revision": "None"}),
    "detach": (lambda probe, **given: mp.detach(**given), {"model": "None"}),
    "open_trace": (lambda probe, **given: mp.open_trace(**given), {"path": "zarr"}),
}
LITERAL = {
    "token text": "token",
    "channel text": "channel",
    "host text": "host",
    "mambalrp text": "mambalrp",
    "['x']": ["x"],
    "64": 64,
    "auto": "auto",
    "cpu": "cpu",
    "zoo:mqar-mamba1": "zoo:mqar-mamba1",
}


@cache
def traced(kind: str) -> xr.Dataset:
    with mp.attach(model(kind)) as probe:
        return probe.record(IDS, variables=["delta", "A", "B", "C", "x", "y", "z"])


_near = st.sampled_from(sorted(NEAR))
CASES = st.fixed_dictionaries(
    {
        "kind": st.sampled_from([*KINDS, "hf"]),
        "entry": st.sampled_from(sorted(ENTRIES)),
        "changes": st.lists(st.tuples(st.integers(0, 20), st.one_of(_near, _near, odd)), max_size=2),
    }
)


def valued(name: str, kind: str, folder: Path) -> Any:
    value = traced(kind) if name == "trace" else LITERAL[name] if name in LITERAL else VALUES[name]()
    if isinstance(value, str) and value.startswith(("STORE", "TAKEN")):
        path = folder / value
        if value.startswith("TAKEN"):
            path.mkdir(exist_ok=True)
        return path
    return value


def run(case: Any) -> None:
    kind, folder = case["kind"], Path(tempfile.mkdtemp(prefix="fuzz"))
    live, (call, base) = model(kind), ENTRIES[case["entry"]]
    untouched(kind)
    names = list(base)
    given = {name: valued(value, kind, folder) for name, value in base.items()}
    for at, value in case["changes"]:
        given[names[at % len(names)]] = valued(value, kind, folder)
    probe = mp.attach(live)
    try:
        with contextlib.chdir(folder):
            clean(call(probe, **given), case["entry"])
    finally:
        probe.detach()
        mp.detach(live)
        shutil.rmtree(folder)
        if not torch.equal(answered(live), untouched(kind)):
            raise Unclean("the model is not what it was before the probe")


MAY_BE_NAN = {
    "recovered",
    "mass_distance",
    "loss",
    "correct",
    "patched",
    "attributed",
    "relevance",
    "probability",
    "jacobian",
    "error",
    "agreement",
    "prediction",
    "null_patched",
    "null_right",
}
"""Results whose absence of a value is documented: no target, no span, padding."""


def clean(result: Any, entry: str) -> None:
    """Finite wherever there is a token."""
    if isinstance(result, torch.Tensor) and not result.isfinite().all():
        raise Unclean(f"{entry} gave NaN or infinity")
    if not isinstance(result, xr.Dataset) or entry == "open_trace":
        return
    valid = result.coords.get("valid")
    for name, array in result.data_vars.items():
        if array.dtype.kind not in "fc":
            continue
        bad = ~np.isfinite(array)
        if valid is not None and set(valid.dims) <= set(array.dims):
            bad = bad & valid
        if str(name) in MAY_BE_NAN or str(name).endswith(("_loss", "_correct")):
            bad = np.isinf(array)
        if bool(bad.any()):
            raise Unclean(f"{entry}: {name} is NaN or infinite at {int(bad.sum())} of {bad.size} places")


FUZZER = Fuzzer("probe", CASES, run, long=2500, short=100)
