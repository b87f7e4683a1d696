"""Checkpoints: a tiny valid one of every format, changed as data or as bytes, loaded, and where it loads, run."""

import json
import logging
import shutil
import sys
import tempfile
import warnings
from collections.abc import Callable
from functools import cache
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from typing import Any

import torch
from harness import Fuzzer, Unclean
from hypothesis import strategies as st
from safetensors.torch import save_file
from torch import Tensor, nn

import mamba_probe as mp
from mamba_probe.formats.s4d import S4D

Base = tuple[dict[str, Any] | None, dict[str, Tensor], str]
"""config, weights, and the config's file name."""


def _formats(name: str) -> Any:
    """A module of tests/formats, which has the tiny models."""
    path = Path(__file__).parents[1] / "formats" / f"{name}.py"
    spec = spec_from_file_location(f"fuzzed_{name}", path)
    assert spec is not None
    assert spec.loader is not None
    module = sys.modules[spec.name] = module_from_spec(spec)  # a dataclass there looks itself up
    spec.loader.exec_module(module)
    return module


kit, foreign, families, hybrid = (_formats(n) for n in ("conftest", "test_foreign", "test_families", "test_hybrid"))


def _live(model: Any, **config: Any) -> Base:
    weights = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    return json.loads(model.config.to_json_string()) | config, weights, "config.json"


def _original(family: str) -> Base:
    return kit.ORIGINAL[family], kit.original_weights(kit.tiny(family, tie_word_embeddings=True)), "config.json"


def _mixer(family: str) -> Base:
    source = kit.tiny(family)
    config = json.loads(source.config.to_json_string())
    named = {"architectures": [{"mamba": "MambaMixer", "mamba2": "Mamba2Mixer"}[family]]}
    return config | named, dict(source.backbone.layers[1].mixer.state_dict()), "config.json"


def _foreign(name: str) -> Base:
    layout = foreign.LAYOUTS[name]
    return layout.config, foreign.weights_of(foreign.source_of(kit, layout), layout), layout.where


def _own(mixer: dict[str, Any]) -> Base:
    config = {"model_type": "mamba_probe", "vocab_size": 24, "mixers": [mixer] * 2}
    return config, dict(kit.perturb(mp.blocks.build(config)).state_dict()), "config.json"


BASES: dict[str, Callable[[], Base]] = {
    "mamba": lambda: _live(kit.tiny("mamba")),
    "mamba2": lambda: _live(kit.tiny("mamba2")),
    **{name: lambda name=name: _live(families.made(kit, name)) for name in families.CONFIGS},
    "state-spaces": lambda: _original("mamba"),
    "state-spaces 2": lambda: _original("mamba2"),
    "state-spaces hybrid": lambda: (hybrid.CONFIG, hybrid.original(hybrid.bamba(kit)), "config.json"),
    **{name: lambda name=name: _foreign(name) for name in foreign.LAYOUTS},
    "mixer": lambda: _mixer("mamba"),
    "mixer 2": lambda: _mixer("mamba2"),
    "own mamba1": lambda: _own({"kind": "mamba1", "d_model": 8, "d_state": 4}),
    "own mamba2": lambda: _own({"kind": "mamba2", "d_model": 8, "n_heads": 2, "d_state": 4}),
    "own s4d": lambda: _own({"kind": "s4d", "d_model": 8, "d_state": 2}),
    "s4d": lambda: (None, dict(kit.perturb(S4D(6, 3)).state_dict()), "config.json"),
}
base = cache(lambda name: BASES[name]())

ODD = [
    None,
    True,
    False,
    -1,
    0,
    1,
    3,
    7,
    10**6,
    10**15,
    2**31,
    2**64,
    -(2**70),
    0.5,
    -1.5,
    1e300,
    float("nan"),
    float("inf"),
    "",
    "text",
    "16",
    "\x00",
    "ß",
    [],
    [0],
    [None],
    ["mamba"],
    [[1], [2]],
    [0.1, 0.2],
    [9, 9],
    {},
    {"a": 1},
    {"__float__": "x"},
    {"__float__": []},
]
TEXTS = [
    "",
    "{",
    "[]",
    "null",
    "1",
    '"a"',
    "{}",
    '{"a": 1',
    "\ufeff{}",
    "[" * 100_000,
    '{"a":' * 5000 + "1" + "}" * 5000,
    '{"model_type": "mamba"}',
    '{"model_type": null}',
    '{"model_type": []}',
    '{"model_type": {}}',
    '{"d_model": 1, "d_model": 2}',
    "9" * 5000,
    '{"a": ' + "9" * 5000 + "}",
]
INDICES = [
    {},
    {"weight_map": {}},
    {"weight_map": []},
    {"weight_map": {"a": 1}},
    {"weight_map": {"a": "../x.bin"}},
    {"weight_map": {"a": "nowhere.safetensors"}},
    {"weight_map": {"a": ""}},
    {"weight_map": {"a": "\x00.bin"}},
    {"weight_map": {"a": "WEIGHTS", "b": "WEIGHTS"}},
    {"weight_map": {"a": "WEIGHTS"}, "metadata": 3},
]
SAID = (
    "are all loaded as",
    "in half precision, this checkpoint's own",
    "names is not run; transformers' own",
    "has no use for .* left out",
)
"""Warnings of our own, which are no findings."""
_at = st.integers(0, 200)
_odd = st.sampled_from(ODD)
_field = st.sampled_from(
    [
        "d_model",
        "n_layer",
        "vocab_size",
        "model_type",
        "architectures",
        "ssm_cfg",
        "attn_layer_idx",
        "hidden_act",
        "time_step_limit",
        "torch_dtype",
        "dtype",
        "auto_map",
        "quantization_config",
        "tie_word_embeddings",
        "generation_config",
    ]
)
_change = st.one_of(
    st.tuples(st.just("drop field"), _at),
    st.tuples(st.just("set field"), _at, _odd),
    st.tuples(st.just("set field"), _at, _odd),
    st.tuples(st.just("set inner"), _at, _at, _odd),
    st.tuples(st.just("rename field"), _at, st.sampled_from(["", "d_modle", "model_type", "ß"])),
    st.tuples(st.just("add field"), _field, _odd),
    st.tuples(st.just("drop"), _at),
    st.tuples(
        st.just("rename"),
        _at,
        st.sampled_from(["", "x", "lm_head.weight", "a..b", "backbone.layers.99.mixer.D", "ß\n"]),
    ),
    st.tuples(st.just("swap"), _at, _at),
    st.tuples(st.just("copy"), _at, st.sampled_from(["x.weight", "backbone.layers.9.mixer.D", "model.a"])),
    st.tuples(st.just("shape"), _at, st.lists(st.integers(0, 5), max_size=4)),
    st.tuples(st.just("wider"), _at, st.integers(0, 3)),
    st.tuples(
        st.just("dtype"),
        _at,
        st.sampled_from(["float16", "bfloat16", "float64", "int64", "bool", "float8_e4m3fn", "complex64"]),
    ),
    st.tuples(st.just("number"), _at, st.sampled_from(["nan", "inf", "-inf", "1e30", "0", "1e-40"])),
    st.tuples(st.just("flip"), st.integers(0, 1), st.floats(0, 1, exclude_max=True), st.integers(0, 7)),
    st.tuples(st.just("flip"), st.just(1), st.floats(0, 0.05), st.integers(0, 7)),
    st.tuples(st.just("cut"), st.integers(0, 1), st.floats(0, 1)),
    st.tuples(st.just("grow"), st.integers(0, 1), st.integers(1, 20)),
    st.tuples(st.just("blank"), st.integers(0, 1), st.floats(0, 1), st.integers(1, 64)),
    st.tuples(st.just("remove"), st.integers(0, 1)),
    st.tuples(st.just("folder"), st.integers(0, 1)),
    st.tuples(st.just("text"), st.integers(0, len(TEXTS) - 1)),
    st.tuples(st.just("latin"), _at),
    st.tuples(st.just("header"), st.integers(0, 2**64 - 1)),
    st.tuples(st.just("index"), st.integers(0, len(INDICES) - 1)),
    st.tuples(st.just("settings"), st.integers(0, len(TEXTS) - 1)),
    st.tuples(st.just("setting"), st.sampled_from(["eos_token_id", "max_length", "pad_token_id", "x"]), _odd),
)
CASES = st.fixed_dictionaries(
    {
        "base": st.sampled_from(sorted(BASES)),
        "bin": st.booleans(),
        "dtype": st.sampled_from([None, None, None, "float16", "float64"]),
        "changes": st.lists(_change, min_size=1, max_size=2),
    }
)


def change_data(config: dict[str, Any] | None, weights: dict[str, Tensor], change: Any) -> None:
    """A change of the config's fields, or of named tensors, in place."""
    kind, *what = json.loads(json.dumps(change))
    if config:
        fields = sorted(config)
        name = fields[what[0] % len(fields)] if isinstance(what[0], int) else what[0]
        if kind == "drop field":
            del config[name]
        elif kind in ("set field", "add field"):
            config[name] = what[1]
        elif kind == "rename field":
            config[what[1]] = config.pop(name)
        elif kind == "set inner":
            nested = [key for key in fields if isinstance(config[key], dict | list) and config[key]]
            if nested:
                inner = config[nested[what[0] % len(nested)]]
                keys = sorted(inner) if isinstance(inner, dict) else range(len(inner))
                inner[keys[what[1] % len(keys)]] = what[2]
    if weights and kind in ("drop", "rename", "swap", "copy", "shape", "wider", "dtype", "number"):
        change_tensor(weights, kind, what)


def change_tensor(weights: dict[str, Tensor], kind: str, what: list[Any]) -> None:
    """A change of named tensors, in place."""
    names = sorted(weights)
    name = names[what[0] % len(names)]
    tensor = weights[name]
    if kind == "drop":
        del weights[name]
    elif kind == "rename":
        weights[what[1]] = weights.pop(name)
    elif kind == "swap":
        other = names[what[1] % len(names)]
        weights[name], weights[other] = weights[other], tensor
    elif kind == "copy":
        weights[what[1]] = tensor.clone()
    elif kind == "shape":
        weights[name] = torch.ones(what[1], dtype=tensor.dtype)
    elif kind == "wider" and tensor.ndim:
        axis = what[1] % tensor.ndim
        weights[name] = torch.cat([tensor, tensor.narrow(axis, 0, min(1, tensor.shape[axis]))], axis)
    elif kind == "dtype":
        weights[name] = tensor.to(getattr(torch, what[1]))
    elif kind == "number" and tensor.numel() and tensor.is_floating_point():
        weights[name] = tensor.clone(memory_format=torch.contiguous_format)
        weights[name].view(-1)[0] = float(what[1])


def change_bytes(files: list[Path], change: Any) -> None:
    """A change of what lies in the folder."""
    kind, *what = change
    path, folder = (
        files[what[0]] if kind in ("flip", "cut", "grow", "blank", "remove", "folder") else files[0],
        files[1].parent,
    )
    if kind == "index":
        text = json.dumps(INDICES[what[0]]).replace("WEIGHTS", files[1].name)
        (folder / "model.safetensors.index.json").write_text(text)
        files[1].rename(folder / ("part" + files[1].suffix))
    elif kind == "settings":
        (folder / "generation_config.json").write_text(TEXTS[what[0]])
    elif kind == "setting":
        (folder / "generation_config.json").write_text(json.dumps({what[0]: what[1]}))
    elif not path.is_file() or not files[1].is_file():
        return
    elif kind == "text":
        path.write_text(TEXTS[what[0]])
    elif kind == "header":
        files[1].write_bytes(what[0].to_bytes(8, "little") + files[1].read_bytes()[8:])
    elif kind in ("remove", "folder"):
        path.unlink()
        if kind == "folder":
            path.mkdir()
    elif kind in ("flip", "cut", "grow", "blank", "latin"):
        path.write_bytes(bent(path.read_bytes(), kind, what))


def bent(content: bytes, kind: str, what: list[Any]) -> bytes:
    """Bytes with one of them changed, cut, filled up or blanked."""
    data = bytearray(content)
    if kind == "grow":
        return content + bytes(what[1])
    if kind == "latin":
        return content[: what[0]] + b"\xff\xe9" + content[what[0] :]
    at = min(int(what[1] * len(data)), max(0, len(data) - 1))
    if kind == "cut" or not data:
        return content[:at]
    if kind == "flip":
        data[at] ^= 1 << what[2]
    else:
        data[at : at + what[2]] = bytes(len(data[at : at + what[2]]))
    return bytes(data)


def written(case: Any, folder: Path) -> None:
    """The checkpoint of a case."""
    config, weights, where = base(case["base"])
    config, weights = json.loads(json.dumps(config)), dict(weights)
    for change in case["changes"]:
        change_data(config, weights, change)
    files = [folder / where, folder / ("pytorch_model.bin" if case["bin"] else "model.safetensors")]
    if where == "params.json" and not case["bin"]:
        files[1] = folder / "consolidated.safetensors"
    if config is not None:
        files[0].write_text(json.dumps(config), encoding="utf-8")
    if case["bin"]:
        torch.save(weights, files[1])
    else:
        save_file({name: tensor.contiguous().clone() for name, tensor in weights.items()}, files[1])
    for change in case["changes"]:
        if files[1].exists():
            change_bytes(files, change)


def run(case: Any) -> None:
    folder = Path(tempfile.mkdtemp(prefix="fuzz"))
    logging.getLogger("transformers").setLevel(logging.CRITICAL)
    with warnings.catch_warnings():
        for text in SAID:
            warnings.filterwarnings("ignore", f"(?s).*{text}", UserWarning)
        _run(case, folder)


def _run(case: Any, folder: Path) -> None:
    try:
        written(case, folder)
        dtype = case["dtype"] and getattr(torch, case["dtype"])
        used(mp.load(folder, dtype=dtype))
    finally:
        shutil.rmtree(folder)


def used(model: nn.Module) -> None:
    """Attached, recorded and run: outputs of the right shape, finite where the weights are moderate."""
    embedding = next((part for part in model.modules() if isinstance(part, nn.Embedding)), None)
    moderate = all(bool((weight.abs() < 100).all()) for weight in model.parameters())
    with mp.attach(model) as probe:
        width = probe._adapters[0].sizes.width
        ids: Any = torch.arange(10).reshape(2, 5)
        given = ids % len(embedding.weight) if embedding is not None else torch.ones(2, 5, width, dtype=dtype_of(model))
        trace = probe.record(given, variables=["delta", "A", "out"])
        if trace["out"].shape[1:] != (2, 5, width):
            raise Unclean(f"out has shape {trace['out'].shape}")
        with torch.no_grad():
            found = model(given)
    out = found.logits if hasattr(found, "logits") else getattr(found, "last_hidden_state", found)
    out = out[0] if isinstance(out, tuple) else out
    if out.shape[:2] != (2, 5):
        raise Unclean(f"the model's output has shape {tuple(out.shape)}")
    if moderate and not (out.isfinite().all() and trace["out"].notnull().all()):
        raise Unclean("output is not finite, though all weights are below 100")


def dtype_of(model: nn.Module) -> torch.dtype:
    return next(model.parameters()).dtype


FUZZER = Fuzzer("checkpoint", CASES, run, long=1500, short=40, shard=250)
