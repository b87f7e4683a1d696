"""Traces and stores, changed as Datasets or as bytes, through `open_trace`, `trace.probe`, every measure and plot.

A store of which bytes were changed gives what was written, exactly, or an error: never another number.
"""

import importlib
import shutil
import tempfile
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import xarray as xr
from harness import ODD, Fuzzer, Unclean, odd
from hypothesis import strategies as st
from probe_cases import TASK, model

import mamba_probe as mp
from mamba_probe.analyses.comparison import compare

FAMILIES = ("mamba1", "mamba2", "s4d")
VARIABLES = ["delta", "A", "B", "C", "x", "y", "z", "u", "out"]


@cache
def held(kind: str) -> dict[str, xr.Dataset]:
    """What analyses are given, of a small model."""
    with mp.attach(model(kind)) as probe:
        trace = probe.record(TASK, variables=VARIABLES)
        found = {"trace": trace, "weights": probe.weights()}
        found["interventions"] = probe.intervene(TASK, [mp.ablate("conv"), mp.ablate("gate")])
        found["ablated"] = probe.ablate_units(TASK, n_random=1)
        found["found"] = probe.associating(TASK) if kind != "s4d" else probe.associating(TASK, sites=["x"])
        found["relevance"] = probe.relevance(TASK)
        found["gradient"] = probe.relevance(TASK, rules="gradient")
        found["perturbation"] = probe.perturbed(found["relevance"], found["gradient"], n_random=1)
        found["jacobian"] = probe.jacobian(TASK, layer=0, query_tokens=[11])
        found["loss"] = probe.losses(TASK)
        found["remembrance"] = probe.remembrance(TASK)
        found["classes"] = probe.ablate_class(TASK, classes={"value": TASK.role == "value"}, n_random=1)
    return {name: each.load() for name, each in found.items()}


def analysis(name: str) -> Any:
    return importlib.import_module(f"mamba_probe.analyses.{name}")


MEASURES: dict[str, tuple[list[str], dict[str, Any]]] = {
    "memory_horizon": (
        ["trace"],
        {"level": "1/e", "tokens": None, "epsilon": 0.1, "mass": False, "n_bootstrap": 3, "seed": 0},
    ),
    "wavelet_alignment": (
        ["trace"],
        {
            "query_tokens": None,
            "kernel": "mixer",
            "wavelet": "haar",
            "level": None,
            "n_sampled": 2,
            "order_lags": 8,
            "n_span": 4,
            "n_bootstrap": 3,
            "seed": 0,
            "read_out": None,
            "exponentials": (),
        },
    ),
    "recall_circuit": (
        ["trace", "weights", "interventions"],
        {"offsets": (0, 1), "n_bootstrap": 3, "seed": 0, "values": None},
    ),
    "hidden_attention": (
        ["trace"],
        {
            "query_tokens": None,
            "aggregate": "signed_mean",
            "normalise": "raw",
            "heads": None,
            "tolerance": 1e-3,
            "n_bootstrap": 3,
            "seed": 0,
        },
    ),
    "state_dynamics": (
        ["trace", "loss"],
        {"every": None, "at": None, "heads": None, "tolerance": 1e-3, "saturation": 0.05, "n_bootstrap": 3, "seed": 0},
    ),
    "receptive_field": (
        ["trace", "remembrance"],
        {"train_length": 8, "query_tokens": None, "lags": (1, None), "theta": 0.05, "n_bootstrap": 3, "seed": 0},
    ),
    "sinks": (["trace"], {"threshold": 2.0, "n_shifts": 5, "n_bootstrap": 3, "seed": 0, "classes": None}),
    "ablation": (["trace", "ablated"], {"query_tokens": None, "n_bootstrap": 3, "seed": 0}),
    "association": (["found"], {"n_bootstrap": 3, "seed": 0}),
    "attribution": (["relevance", "gradient", "perturbation"], {"n_bootstrap": 3, "seed": 0}),
    "lti_limits": ([], {"kernels": None, "n_states": (2, 4), "fits": None, "target_error": 0.1, "seed": 0}),
    "compare": (
        ["trace"],
        {
            "variable": None,
            "resample": "each",
            "statistic": "mean",
            "n_bootstrap": 3,
            "seed": 0,
            "paired": True,
            "reference": None,
        },
    ),
}
_at = st.integers(0, 60)
_change = st.one_of(
    st.tuples(st.just("drop variable"), _at),
    st.tuples(st.just("drop coordinate"), _at),
    st.tuples(st.just("rename dimension"), _at, st.sampled_from(["time", "chanel", "state", "group"])),
    st.tuples(st.just("rename variable"), _at, st.sampled_from(["delta", "B", "", "valid", "z"])),
    st.tuples(st.just("transpose"), _at),
    st.tuples(st.just("dtype"), _at, st.sampled_from(["float64", "int64", "bool", "object", "U3"])),
    st.tuples(st.just("number"), _at, st.sampled_from(["nan", "inf", "-inf", "1e30", "0", "-1"]), st.booleans()),
    st.tuples(
        st.just("coordinate"),
        _at,
        st.sampled_from(["shift", "same", "text", "nan", "reverse", "float", "negative", "huge"]),
    ),
    st.tuples(st.just("drop attribute"), _at),
    st.tuples(st.just("attribute"), _at, odd),
    st.tuples(st.just("select"), _at, st.integers(0, 3)),
    st.tuples(st.just("scalar"), _at),
    st.tuples(st.just("axis"), _at),
    st.tuples(st.just("chunk"), st.integers(1, 5)),
)
_selection = st.one_of(
    st.tuples(st.just("drop variable"), _at),
    st.tuples(st.just("drop coordinate"), _at),
    st.tuples(st.just("chunk"), st.integers(1, 5)),
)
_bytes = st.one_of(
    st.tuples(st.just("flip"), _at, st.floats(0, 1, exclude_max=True), st.integers(0, 7)),
    st.tuples(st.just("cut"), _at, st.floats(0, 1)),
    st.tuples(st.just("remove"), _at),
    st.tuples(st.just("blank"), _at, st.floats(0, 1), st.integers(1, 64)),
    st.tuples(st.just("grow"), _at, st.integers(1, 20)),
)
CASES = st.one_of(
    st.fixed_dictionaries(
        {
            "kind": st.sampled_from(FAMILIES),
            "entry": st.just("measure"),
            "analysis": st.sampled_from(sorted(MEASURES)),
            "which": _at,
            "changes": st.lists(_selection, max_size=1),
            "options": st.just([]),
            "plot": st.just([]),
        }
    ),
    st.fixed_dictionaries(
        {
            "kind": st.sampled_from(FAMILIES),
            "entry": st.just("accessor"),
            "changes": st.lists(_change, min_size=1, max_size=2),
            "call": st.sampled_from(["A_bar", "B_bar", "by_head", "along", "unrolled", "repr", "save"]),
            "value": odd,
        }
    ),
    st.fixed_dictionaries(
        {
            "kind": st.sampled_from(FAMILIES),
            "entry": st.just("store"),
            "suffix": st.sampled_from([".zarr", ".nc"]),
            "changes": st.lists(_bytes, min_size=1, max_size=2),
        }
    ),
)


def changed(data: xr.Dataset, change: Any) -> xr.Dataset:
    """The Dataset after one change; xarray's own refusal to make it leaves it as it is."""
    try:
        return CHANGES[change[0]](data, *change[1:])
    except (ValueError, TypeError, KeyError, IndexError, OverflowError, RuntimeWarning, UserWarning):
        return data


def _name(names: Any, at: int) -> Any:
    listed = sorted(map(str, names))
    if not listed:
        raise KeyError("none")
    return listed[at % len(listed)]


def _with(data: xr.Dataset, name: str, values: Any, dims: Any = None) -> xr.Dataset:
    variable = xr.Variable(data[name].dims if dims is None else dims, values, data[name].attrs)
    return data.assign_coords({name: variable}) if name in data.coords else data.assign({name: variable})


def _number(data: xr.Dataset, at: int, number: str, every: bool) -> xr.Dataset:
    name = _name(data.data_vars, at)
    values = data[name].values.copy()
    values[... if every else (0,) * values.ndim] = float(number)
    return _with(data, name, values)


def _coordinate(data: xr.Dataset, at: int, how: str) -> xr.Dataset:
    name = _name(data.coords, at)
    values = data[name].values
    made: dict[str, Callable[[], Any]] = {
        "shift": lambda: values + 1,
        "same": lambda: np.full_like(values, values.flat[0]),
        "reverse": lambda: values[::-1],
        "text": lambda: np.full(values.shape, "a", dtype=object),
        "nan": lambda: np.full(values.shape, np.nan),
        "float": lambda: values.astype(float) + 0.5,
        "negative": lambda: -values - 1,
        "huge": lambda: values + 2**40,
    }
    return _with(data, name, made[how]())


def _set(data: xr.Dataset, at: int, value: str) -> xr.Dataset:
    return data.assign_attrs({_name(data.attrs, at): ODD[value]()})


CHANGES: dict[str, Callable[..., xr.Dataset]] = {
    "drop variable": lambda data, at: data.drop_vars(_name(data.data_vars, at)),
    "drop coordinate": lambda data, at: data.drop_vars(_name(data.coords, at)),
    "rename dimension": lambda data, at, to: data.rename_dims({_name(data.dims, at): to}),
    "rename variable": lambda data, at, to: data.rename({_name(data.data_vars, at): to}),
    "transpose": lambda data, at: _with(
        data, name := _name(data.data_vars, at), data[name].values.T, data[name].dims[::-1]
    ),
    "dtype": lambda data, at, dtype: _with(data, name := _name(data.variables, at), data[name].values.astype(dtype)),
    "number": _number,
    "coordinate": _coordinate,
    "drop attribute": lambda data, at: (
        data.assign_attrs({})
        .drop_attrs()
        .assign_attrs({name: value for name, value in data.attrs.items() if name != _name(data.attrs, at)})
    ),
    "attribute": _set,
    "select": lambda data, at, n: data.isel({_name(data.dims, at): slice(0, n)}),
    "scalar": lambda data, at: _with(data, name := _name(data.data_vars, at), data[name].values.flat[0], ()),
    "axis": lambda data, at: _with(
        data, name := _name(data.data_vars, at), data[name].values[None], ("extra", *data[name].dims)
    ),
    "chunk": lambda data, n: data.chunk(dict.fromkeys(data.dims, n)),
}


def run(case: Any) -> None:
    {"measure": measured, "accessor": accessed, "store": stored}[case["entry"]](case)


def measured(case: Any) -> None:
    """A measure of changed inputs or options, and its picture."""
    needs, options = MEASURES[case["analysis"]]
    given = {name: held(case["kind"])[name] for name in needs}
    names = list(given)
    for change in case["changes"]:
        if names:
            name = names[case["which"] % len(names)]
            given[name] = changed(given[name], change)
    options = dict(options)
    if case["analysis"] == "lti_limits":
        options |= {"kernels": np.exp(-np.arange(16.0))[None] + 0.01, "fits": ("prony",)}
    for at, value in case["options"]:
        options[sorted(options)[at % len(options)]] = ODD[value]()
    result = called(case["analysis"], given, options)
    _, plain = (
        held(case["kind"]),
        [change for change in case["changes"] if change[0] in ("number", "dtype", "coordinate")],
    )
    if not plain and not case["options"]:
        for name, array in result.data_vars.items():
            if array.dtype.kind == "f" and case["analysis"] != "memory_horizon" and np.isinf(array).any():
                raise Unclean(f"{case['analysis']}: {name} is infinite")
    drawn(case["analysis"], result, case["plot"])


def called(name: str, given: dict[str, Any], options: dict[str, Any]) -> xr.Dataset:
    if name == "compare":
        return compare("hidden_attention", {"a": given["trace"], "b": held("mamba1")["trace"]}, **options)
    first = options.pop("kernels") if name == "lti_limits" else given.pop(next(iter(given)))
    return analysis(name).measure(first, **given, **options)


def drawn(name: str, result: xr.Dataset, changes: Any) -> None:
    from matplotlib import pyplot

    for change in changes:
        result = changed(result, change)
    try:
        (analysis("comparison" if name == "compare" else name).plot)(result)
    finally:
        pyplot.close("all")


def accessed(case: Any) -> None:
    trace = held(case["kind"])["trace"]
    for change in case["changes"]:
        trace = changed(trace, change)
    call, value = case["call"], ODD[case["value"]]()
    if call in ("A_bar", "B_bar"):
        np.asarray(getattr(trace.probe, call))
    elif call == "repr":
        repr(trace.probe)
    elif call == "by_head":
        np.asarray(trace.probe.by_head("B" if case["value"] < "a" else value))
    elif call == "along":
        trace.probe.along(value)
    elif call == "unrolled":
        trace.probe.unrolled(None if case["value"] < "a" else value)
    else:
        saved(trace)


def saved(trace: xr.Dataset) -> None:
    """What is written comes back equal."""
    folder = Path(tempfile.mkdtemp(prefix="fuzz"))
    try:
        back = mp.open_trace(trace.probe.save(folder / "a.zarr")).load()
        if not same(back, trace):
            raise Unclean("a trace is not what was saved")
    finally:
        shutil.rmtree(folder)


def same(one: xr.Dataset, other: xr.Dataset) -> bool:
    if set(one.variables) != set(other.variables) or set(one.attrs) != set(other.attrs):
        return False
    return all(
        one[name].dims == other[name].dims and np.array_equal(*_plain(one[name], other[name])) for name in one.variables
    )


def _plain(one: xr.DataArray, other: xr.DataArray) -> tuple[np.ndarray, np.ndarray]:
    """Bytes of numbers; text as text."""
    pair = [each.values for each in (one, other)]
    if all(each.dtype.kind in "fciub" for each in pair):
        return (*(np.ascontiguousarray(each).reshape(-1).view(np.uint8) for each in pair),)
    return (*(np.asarray(each, dtype=str) for each in pair),)


@cache
def written(kind: str, suffix: str) -> Path:
    """A store whose copies are damaged."""
    path = Path(tempfile.mkdtemp(prefix="fuzzed")) / f"trace{suffix}"
    held(kind)["trace"].probe.save(path)
    return path


def stored(case: Any) -> None:
    """A damaged copy opens as what was written, or not at all."""
    source, folder = written(case["kind"], case["suffix"]), Path(tempfile.mkdtemp(prefix="fuzz"))
    copy = folder / source.name
    try:
        (shutil.copytree if source.is_dir() else shutil.copy)(source, copy)
        for change in case["changes"]:
            damage(copy, *change)
        try:
            back = mp.open_trace(copy).load()
        except OSError as error:  # of netCDF, a chunk that is damaged is h5py's to tell, when it is read
            if case["suffix"] == ".nc" and "read data" in str(error):
                return
            raise
        if not same(back, held(case["kind"])["trace"]):
            raise Unclean(f"another trace in silence: {list(back.variables)}")
    finally:
        shutil.rmtree(folder)


def damage(store: Path, kind: str, at: int, *what: Any) -> None:
    files = sorted(path for path in store.rglob("*") if path.is_file()) if store.is_dir() else [store]
    if not files or not files[0].exists():
        return
    path = files[at % len(files)]
    data = bytearray(path.read_bytes())
    if kind == "remove":
        path.unlink()
        return
    if kind == "swap":
        other = files[what[0] % len(files)]
        data, theirs = bytearray(other.read_bytes()), bytes(data)
        other.write_bytes(theirs)
    elif kind == "grow":
        data += bytes(what[0])
    elif kind == "cut":
        data = data[: int(what[0] * len(data))]
    elif data:
        place = int(what[0] * len(data))
        if kind == "flip":
            data[place] ^= 1 << what[1]
        else:
            data[place : place + what[1]] = bytes(len(data[place : place + what[1]]))
    path.write_bytes(bytes(data))


FUZZER = Fuzzer("trace", CASES, run, long=500, short=12, shard=250)
