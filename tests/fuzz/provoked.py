"""A call for each row of docs/errors.md, by entry and the beginning of what is said: the table is written from here."""

import json
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import xarray as xr
from probe_cases import HIDDEN, IDS, TASK, model

import mamba_probe as mp
from mamba_probe.analyses import hidden_attention
from mamba_probe.formats.build import configure
from mamba_probe.kernels.scan import Emit, selective_scan
from mamba_probe.trace import validate
from mamba_probe.training.config import Config


class Row(NamedTuple):
    """What is said (its beginning; "..." is what depends on the call), what it means, what to do; and a call."""

    says: str
    means: str
    do: str
    call: Callable[[], Any]


def probed(call: Callable[[Any], Any], kind: str = "mamba1") -> Callable[[], Any]:
    def run() -> None:
        with mp.attach(model(kind)) as probe:
            call(probe)

    return run


def folder(**files: str | dict[str, torch.Tensor]) -> Path:
    made = Path(tempfile.mkdtemp(prefix="provoked"))
    for name, content in files.items():
        path = (
            made
            / {"config": "config.json", "weights": "pytorch_model.bin", "index": "model.safetensors.index.json"}[name]
        )
        path.write_text(content) if isinstance(content, str) else torch.save(content, path)
    return made


def loading(**files: Any) -> Callable[[], Any]:
    return lambda: mp.load(folder(**files))


def trace(**change: Any) -> xr.Dataset:
    with mp.attach(model("mamba1")) as probe:
        return probe.record(TASK, variables=["delta", "A", "B", "C"]).assign_attrs(change)


def scan(**change: Any) -> Callable[[], Any]:
    one = torch.ones(1, 3, 1, 1)
    given = {"x": one, "delta": one[..., 0], "A": torch.zeros(1, 1), "B": one, "C": one}
    return lambda: selective_scan(**given | change)


def store(damage: Callable[[Path], Any]) -> Callable[[], Any]:
    def run() -> None:
        path = Path(tempfile.mkdtemp(prefix="provoked")) / "run.zarr"
        trace().probe.save(path)
        damage(path)
        mp.open_trace(path).load()

    return run


def flipped(path: Path) -> None:
    chunk = next(file for file in sorted((path / "delta").rglob("*")) if file.is_file() and file.name != "zarr.json")
    data = bytearray(chunk.read_bytes())
    data[len(data) // 2] ^= 1
    chunk.write_bytes(bytes(data))


MAMBA = json.dumps({"model_type": "mamba", "hidden_size": 4, "vocab_size": 8, "num_hidden_layers": 1, "state_size": 2})
D = {"backbone.layers.0.mixer.D": torch.ones(8)}
TABLE: dict[str, list[Row]] = {
    "mp.load": [
        Row(
            "...there is no such directory or file",
            "The path is not there, and the text is no hub id.",
            "Correct the path; a hub id is `owner/name`.",
            lambda: mp.load("./nowhere"),
        ),
        Row(
            "zoo: no checkpoint is named",
            "No model of the zoo has this name.",
            "Take one of those named; `mamba-probe zoo`.",
            lambda: mp.load("zoo:none"),
        ),
        Row(
            "...has no config.json",
            "Weights are there, but not the config that says what they are of.",
            "Put the checkpoint's config.json beside them.",
            loading(),
        ),
        Row(
            "...has no weight file",
            "There is a config, and none of the names that weights have.",
            "Put the weights there, or name the file.",
            loading(config=MAMBA),
        ),
        Row(
            "...is not valid JSON",
            "The config or the index is damaged, or nested beyond reason.",
            "Copy it again.",
            loading(config="{", weights=D),
        ),
        Row(
            "...is refused: it holds more than tensors",
            "A pickle that could run code; nothing of it was run.",
            "Save a plain state dict, best as safetensors.",
            lambda: mp.load(pickled()),
        ),
        Row(
            "...weights must be finite",
            "The named tensors hold NaN or infinity.",
            "Take an earlier checkpoint.",
            loading(config=MAMBA, weights={"a": torch.tensor([np.nan])}),
        ),
        Row(
            "...the weights do not fit",
            "Names are missing or unexpected, or shapes differ; each is listed.",
            "Correct the config, or take the weights that belong to it.",
            loading(config=MAMBA, weights=D),
        ),
        Row(
            "...model_type 'gpt2' is not known to have a Mamba SSM layer",
            "No module here holds this family.",
            "Load it yourself and attach, if it has mixers of [these classes](supported.md).",
            loading(config='{"model_type": "gpt2"}', weights=D),
        ),
        Row(
            "...hidden_size must be a whole number",
            "A size of the config cannot be one.",
            "Correct the config.",
            lambda: configure("mamba", {"hidden_size": "4"}, "here"),
        ),
        Row(
            "dtype must be None or one of",
            "Weights are floating.",
            "Pass a torch dtype such as torch.float32.",
            lambda: mp.load("zoo:mqar-mamba1", dtype=torch.int8),
        ),
        Row(
            "device must name a torch device",
            "torch knows no such device.",
            "Pass 'cpu' or 'cuda'.",
            lambda: mp.load("zoo:mqar-mamba1", device="gpu"),
        ),
    ],
    "mp.attach, the probe": [
        Row(
            "...has no state-space layer to probe",
            "The model holds no layer that a probe can take over.",
            "See [what is supported](supported.md).",
            lambda: mp.attach(torch.nn.Linear(2, 2)),
        ),
        Row(
            "unknown backend",
            "No such backend of the scan.",
            "auto, cpu, naive or triton.",
            lambda: mp.attach(model("mamba1"), backend="cuda"),
        ),
        Row(
            "this probe is detached",
            "The model was given back.",
            "`mp.attach(model)` again.",
            lambda: detached().record(IDS),
        ),
        Row(
            "pass either inputs",
            "Nothing to run on, or two things.",
            "Pass ids, hidden states, a dict, a Task or text=.",
            probed(lambda probe: probe.record()),
        ),
        Row(
            "input_ids needs dims (batch, token)",
            "An axis too many or too few.",
            "Mostly `ids[None]`.",
            probed(lambda probe: probe.record(IDS[0])),
        ),
        Row(
            "...is out of range",
            "An id beyond the vocabulary.",
            "Use the model's own tokenizer.",
            probed(lambda probe: probe.record(IDS + 99)),
        ),
        Row(
            "...takes token ids (batch, token)",
            "Hidden states came where ids are due.",
            "Pass whole numbers.",
            probed(lambda probe: probe.record(HIDDEN)),
        ),
        Row(
            "attention_mask needs the shape of the input",
            "The mask is of other rows or tokens.",
            "One entry a token: (batch, token).",
            probed(lambda probe: probe.record(IDS, IDS[:1])),
        ),
        Row(
            "attention_mask holds 1 at tokens and 0 at padding",
            "Another number stands in it.",
            "Pass 0 and 1.",
            probed(lambda probe: probe.record(IDS, IDS * 0 + 2)),
        ),
        Row(
            "unknown variable",
            "No trace has this variable.",
            "The nearest names are given.",
            probed(lambda probe: probe.record(IDS, variables=["delt"])),
        ),
        Row(
            "unknown layer",
            "The model has no such layer that is probed.",
            "`probe.layers` has them.",
            probed(lambda probe: probe.record(IDS, layers=[7])),
        ),
        Row(
            "tokens (None is all) is a list of whole numbers",
            "Indices are whole; nothing is rounded.",
            "Pass integers.",
            probed(lambda probe: probe.record(IDS, tokens=[0.5])),
        ),
        Row(
            "batch_size is at least 1 and a whole number",
            "Rows of a forward.",
            "Pass 1 or more, or None for all.",
            probed(lambda probe: probe.record(IDS, batch_size=0)),
        ),
        Row(
            "unknown hook point",
            "No hook has this name.",
            "`probe.hook_names()`; the nearest are given.",
            probed(lambda probe: probe.run_with_cache(IDS, names_filter="blocks.0.mixer.hook_delt")),
        ),
        Row(
            "fwd_hooks is a list of (names, function) pairs",
            "Another shape of argument.",
            "`[(name, function)]`.",
            probed(lambda probe: probe.run_with_hooks(IDS, fwd_hooks=[3])),
        ),
        Row(
            "unknown quantity to scale",
            "No edit has this quantity.",
            "The nearest names are given.",
            lambda: mp.scale("delt", 0.5),
        ),
        Row(
            "...delta is a step size and cannot be negative",
            "The edit would run time backwards.",
            "Pass 0 or more.",
            lambda: mp.assign("delta", -1.0),
        ),
        Row(
            "edit takes mp.freeze",
            "Something else than an edit.",
            "Make one: `mp.scale(...)`, `mp.zero(...)`.",
            probed(lambda probe: probe.intervene(TASK, [[3]])),
        ),
        Row(
            "name at least one quantity, and none twice",
            "A sweep needs each entry once.",
            "Remove what is double.",
            probed(lambda probe: mp.patching.sweep(probe, IDS, IDS, len, quantities=["x", "x"])),
        ),
    ],
    "mp.open_trace, stores": [
        Row(
            "a store's name ends in one of",
            "The suffix says the format.",
            "Name it `*.zarr` or `*.nc`.",
            lambda: mp.open_trace("run.txt"),
        ),
        Row("no store at", "Nothing is there.", "Correct the path.", lambda: mp.open_trace("nowhere.zarr")),
        Row(
            "...exists",
            "Nothing is overwritten unasked.",
            "overwrite=True, or another path.",
            store(lambda path: trace().probe.save(path)),
        ),
    ],
    "trace.probe, analyses": [
        Row(
            "a trace is an xarray.Dataset",
            "Something else came.",
            "Pass what `probe.record` or `mp.open_trace` gave.",
            lambda: validate(xr.DataArray()),
        ),
        Row(
            "a trace needs attrs['schema_version']",
            "The Dataset is none of ours, or of another version.",
            "Record it again; keep attributes in what you compute.",
            lambda: repr(xr.Dataset().probe),
        ),
        Row(
            "a trace needs attrs['family']",
            "The family is unknown.",
            "Keep the attributes of the recording.",
            lambda: repr(trace(family="gpt").probe),
        ),
        Row(
            "the trace lacks",
            "The measure needs a variable that was not recorded.",
            "Record again with the variables that the message names.",
            lambda: hidden_attention.measure(trace().drop_vars("delta")),
        ),
        Row(
            "`delta` needs dims",
            "Dimensions were renamed or transposed.",
            "Transpose it back.",
            lambda: repr(trace().transpose("token", ...).probe),
        ),
        Row(
            "this trace has no direction",
            "Its layers scan one way.",
            "Leave `along` out.",
            lambda: trace().probe.along("backward"),
        ),
    ],
    "selective_scan": [
        Row("`x` must be a torch.Tensor", "Another type.", "torch.as_tensor.", scan(x=[1.0])),
        Row(
            "`delta` must have shape",
            "An axis differs from those of `x`.",
            "The expected shape is named.",
            scan(delta=torch.ones(1, 2, 1)),
        ),
        Row("`z` must be dense", "A sparse tensor.", "`.to_dense()`.", scan(z=torch.ones(1, 3, 1, 1).to_sparse())),
        Row(
            "float64 is all or none",
            "One tensor is double, others are not.",
            "Cast all of them.",
            scan(A=torch.zeros(1, 1).double()),
        ),
        Row("`delta_softplus` must be True or False", "Another value.", "Pass a bool.", scan(delta_softplus=1)),
        Row("`delta_limits` must be", "Two numbers, low and high.", "(0.0, math.inf) is none.", scan(delta_limits=3)),
        Row("no scan emits", "An unknown name.", "The known names are given.", lambda: Emit(("delat",))),
        Row("`emit.tokens` holds", "A token beyond the call.", "0 .. tokens - 1.", scan(emit=Emit(("h",), tokens=[9]))),
    ],
    "mp.tasks, training": [
        Row(
            "mqar: needs",
            "Sizes do not fit each other; each inequality is named.",
            "Change the size that it names.",
            lambda: mp.tasks.mqar(length=3),
        ),
        Row(
            "mqar: sizes and seed are integers",
            "A float or text came.",
            "Pass whole numbers.",
            lambda: mp.tasks.mqar(batch=1.5),
        ),
        Row(
            "steps must be",
            "A field of the config cannot have this value.",
            "What it may be is named.",
            lambda: Config({"name": "mqar"}, {"kind": "mamba1", "d_model": 4}, steps=0),
        ),
    ],
}


def pickled() -> Path:
    path = folder(config=MAMBA)
    torch.save({"a": Path("x")}, path / "pytorch_model.bin")
    return path


def detached() -> Any:
    probe = mp.attach(model("mamba1"))
    probe.detach()
    return probe


INTRO = """# Errors

Wrong input is answered before anything runs: by a `ValueError`, or a `FileNotFoundError` where a path is not there,
that names the argument or file, what was expected, what came and what to do. Python's own `TypeError` comes only
where a call does not fit a function's signature: an argument that it has not, or one that is missing. A full disk
is an `OSError`, and so is a damaged chunk of a netCDF store, which h5py finds when it is read. What else comes out
of a call is a fault of ours: please report it. The command line prints the same words after `error:` and ends with
code 2.

Counts, indices, names and numbers are checked in `mamba_probe/arguments.py`; what a model is run on in `inputs.py`;
a trace in `trace/contract.py`; a scan's arguments in `kernels/scan/arguments.py`; a checkpoint's config in
`formats/fields.py`. Fuzzing asks for all of it: [results and what is open](../benchmarks/results/fuzz.md).

Each row is provoked by a test (tests/fuzz/provoked.py, from which this page is written); `...` stands for what
depends on the call.
"""


def page() -> str:
    """docs/errors.md, as it must be."""
    parts = [INTRO]
    for entry, rows in TABLE.items():
        parts.append(f"\n## {entry}\n\n| what is said | what it means | what to do |\n|---|---|---|\n")
        parts += [f"| {row.says} | {row.means} | {row.do} |\n" for row in rows]
    return "".join(parts)
