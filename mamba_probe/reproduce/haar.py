"""Projections onto Haar wavelets by one S6 layer, and what time-invariant kernels cannot do."""

import math
from collections.abc import Sequence
from functools import lru_cache
from itertools import product
from typing import Any

import numpy as np
import torch
import xarray as xr

from mamba_probe.analyses import lti_limits
from mamba_probe.analyses.lti_limits.core import hankel_lower_bound
from mamba_probe.constructions import Construction, haar
from mamba_probe.constructions.wavelets import window_sums
from mamba_probe.reproduce.claim import Claim
from mamba_probe.reproduce.evaluate import MIXERS, dtype_of, estimator, last_output, sizes_of, wanted
from mamba_probe.reproduce.haar_figure import draw
from mamba_probe.reproduce.table import Cell, Criterion, Row, measured, spread

__all__ = ["HAAR", "RATES", "cells"]

COEFFICIENTS = "Coefficients against PyWavelets"
BOUNDS = "Worst case against the bound"
WINDOWS = "Sums over windows at T = 1000"
DECAY = "Decay that is not zero"
RATES = "A step at half the lags: N time-invariant states against one S6 layer"
SLOPES = "Slope of log error against log N, the same step"

DRAWS = 9  # signals of white noise a cell
FLAT = ("flat-x", "flat-B")
LAGS = 1024
STATES = (4, 8, 16, 32, 64)
FITS = {
    "s4d_real": "S4D-Real, best rate", "s4d_lin": "S4D-Lin", "fourier": "Fourier and a constant",
    "optimised": "free complex modes, optimised",
}  # fmt: skip


def tolerance(variant: str, beta: float, length: int, dtype: str) -> float:
    """Return the largest relative error allowed; beyond 256 tokens it grows as rounding does, T or T^2 with ramps."""
    more = max(1.0, length / 256)
    if variant == "ramps":
        return 1e-3 * more**2 if dtype == "float32" else (1e-8 if beta <= 64 else 1e-11 * more**2)
    if variant == "delta":
        return (3e-2 if dtype == "float32" else 1e-10) * more**2
    return (1e-6 if dtype == "float32" else 1e-12) * more


def cells() -> tuple[Cell, ...]:
    """Return the tables as data."""
    return (*_coefficients(), *_bounds(), *_windows(), *_decays(), *_rates())


def _coefficients() -> list[Cell]:
    kinds = [("flat-x", 64.0), ("flat-B", 64.0), ("flat-B", 128.0), ("ramps", 64.0), ("ramps", 128.0), ("delta", 128.0)]
    sizes = [(64, 3), (256, 3), (1024, 3), (1024, 5), (4096, 3)]
    found = []
    for (variant, beta), (length, levels), dtype in product(kinds, sizes, ("float64", "float32")):
        lost = variant == "delta" and dtype == "float32" and length >= 1024
        limit = (
            Criterion(">", 0.01, must_fail=True) if lost else Criterion("<=", tolerance(variant, beta, length, dtype))
        )
        build = {"length": length, "levels": levels, "beta": beta, "variant": variant, "dtype": dtype}
        found.append(Cell(COEFFICIENTS, "coefficients", limit, build))
    for length, dtype in product((64, 256, 1024), ("float64", "float32")):
        build = {"length": length, "levels": 3, "beta": 128.0, "variant": "ramps", "dtype": dtype, "mixer": "mamba2"}
        limit = Criterion("<=", tolerance("ramps", 128.0, length, dtype))
        found.append(Cell(COEFFICIENTS, "coefficients", limit, build))
    for dtype in ("float64", "float32"):
        build = {"length": 256, "levels": 8, "beta": 64.0, "variant": "decay", "dtype": dtype}
        found.append(Cell(COEFFICIENTS, "coefficients", Criterion("<=", tolerance("decay", 64, 256, dtype)), build))
    return found


def _bounds() -> list[Cell]:
    limit = Criterion("<=", 1e-13, of_bound=True)
    return [
        Cell(BOUNDS, "worst case", limit, {"length": 64, "levels": 3, "beta": beta, "variant": variant})
        for variant, beta in product(("flat-x", "ramps"), (4.0, 8.0, 16.0, 32.0, 48.0, 64.0))
    ]


def _windows() -> list[Cell]:
    return [
        Cell(
            WINDOWS, "windows", Criterion("<=", tolerance(variant, 64, 1000, dtype)),
            {"length": 1000, "windows": 8, "beta": 64.0, "variant": variant, "dtype": dtype},
        )
        for variant, dtype in product(("flat-x", "flat-B", "ramps"), ("float64", "float32"))
    ]  # fmt: skip


def _decays() -> list[Cell]:
    lost = Criterion(">", 0.03, must_fail=True)
    build = {"length": 256, "levels": 3, "beta": 64.0, "dtype": "float64"}
    return [
        Cell(
            DECAY, "decay", lost if variant == "ramps" and log_decay >= -16 else Criterion("<=", 0, of_bound=True),
            build | {"variant": variant}, {"log_decay": log_decay},
        )
        for variant, log_decay in product(("flat-B", "ramps"), (-40, -28, -24, -16, -10))
    ]  # fmt: skip


def _rates() -> list[Cell]:
    never = Criterion(">=", -1e-9, of_bound=True)
    fits = [Cell(RATES, "fit", never, task={"fit": fit, "n_states": STATES}) for fit in FITS]
    steps = [
        Cell(RATES, "step", Criterion("<=", limit), {"length": LAGS, "levels": 1, "beta": 64.0, "dtype": dtype})
        for dtype, limit in (("float64", 1e-12), ("float32", 1e-6))
    ]
    slopes = [
        Cell(SLOPES, "slope", Criterion(">=", -0.6), task={"fit": fit, "n_states": STATES}) for fit in (None, *FITS)
    ]
    return fits + steps + slopes


def _built(build: dict[str, Any], builder: Any = haar) -> Construction:
    return builder(**build | {"dtype": getattr(torch, build.get("dtype", "float64"))})


def _noise(length: int, seed: int) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal((DRAWS, length))


def _relative(construction: Construction, u: np.ndarray) -> np.ndarray:
    """Largest error of each draw's outputs relative to its largest output."""
    known = wanted(construction, u)
    return np.abs(last_output(construction, u) - known).max(1) / np.abs(known).max(1)


def _said(construction: Construction, build: dict[str, Any]) -> dict[str, Any]:
    shown = {"T": build["length"], "J": build["levels"]} if "levels" in build else {"T": build["length"]}
    sizes = shown | {"beta": build["beta"]} | sizes_of(construction)
    what, mixer = f"haar {build.get('variant', 'flat-x')}", MIXERS[build.get("mixer", "mamba1")]
    return {"what": what, "mixer": mixer, "dtype": dtype_of(construction), "sizes": sizes}


def _coefficient_rows(cell: Cell, seed: int) -> list[Row]:
    return _drawn(cell, seed, haar, f"PyWavelets on {DRAWS} draws of white noise")


def _window_rows(cell: Cell, seed: int) -> list[Row]:
    return _drawn(cell, seed, window_sums, f"sums by numpy on {DRAWS} draws of white noise")


def _drawn(cell: Cell, seed: int, builder: Any, against: str) -> list[Row]:
    construction, u = _built(cell.build, builder), _noise(cell.build["length"], seed)
    null = float(np.median(_relative(construction.randomised(seed + 1), u)))
    said = _said(construction, cell.build) | {"null": null, "null_is": f"randomised twin, seed {seed + 1}, same draws"}
    over = f"largest of the outputs; median of {DRAWS} draws"
    how = f"{estimator(construction)}, against {against}; relative to the largest output of the draw"
    return [spread(cell, "relative error", _relative(construction, u).tolist(), estimator=how, over=over, **said)]


def _worst_case_rows(cell: Cell, seed: int) -> list[Row]:
    """The output is linear in u: the worst u of at most 1 meets the sum of the absolute errors of a kernel."""
    construction = _built(cell.build)
    length = cell.build["length"]
    worst = _worst(construction, length)
    said = _said(construction, cell.build)
    return [
        measured(
            cell, "worst error for |u| <= 1", worst, bound=construction.bound, over=f"all u of {length} tokens",
            estimator=f"{estimator(construction)}, on each unit vector: largest L1 error of a kernel",
            null=_worst(construction.randomised(seed + 1), length), null_is=f"randomised twin, seed {seed + 1}", **said,
        )
    ]  # fmt: skip


def _worst(construction: Construction, length: int) -> float:
    """The bias of the output, at u = 0, belongs to none of the kernels and is taken off."""
    u = np.concatenate([np.zeros((1, length)), np.eye(length)])
    missed = last_output(construction, u) - wanted(construction, u)
    return float(np.abs(missed[1:] - missed[0]).sum(0).max() + np.abs(missed[0]).max())


def _decay_rows(cell: Cell, seed: int) -> list[Row]:
    construction, u = _built(cell.build), _noise(cell.build["length"], seed)
    null = construction.randomised(seed + 1)
    with torch.no_grad():
        construction.model.get_parameter("A_log").fill_(cell.task["log_decay"])
    errors = [np.abs(last_output(each, u) - wanted(construction, u)).max(1) for each in (construction, null)]
    said = _said(construction, cell.build)
    said["sizes"] |= {"log(-A)": cell.task["log_decay"]}
    return [
        spread(
            cell, "error", errors[0].tolist(), bound=_decay_bound(cell, construction) * float(np.abs(u).max()),
            estimator=f"{estimator(construction)}, A set by hand, against PyWavelets",
            over=f"largest of the outputs; median of {DRAWS} draws of white noise",
            null=float(np.median(errors[1])), null_is=f"randomised twin, seed {seed + 1}, its own A", **said,
        )
    ]  # fmt: skip


def _decay_bound(cell: Cell, construction: Construction) -> float:
    """For |u| <= 1: |A| L^2 / 2 a window with flat windows, |A| beta T^4 / 2 a sum with ramps, and the rest's bound."""
    length, windows = cell.build["length"], 2 ** cell.build["levels"]
    rate = math.exp(cell.task["log_decay"])
    held = (length / windows) ** 2 / 2 if cell.build["variant"] in FLAT else cell.build["beta"] * length**4 / 2
    weight = windows / math.sqrt(length)  # sum of the absolute weights of the windows in an output: of each level
    if cell.build["variant"] == "ramps":
        weight *= 2  # suffix sums: at most twice that
    assert construction.bound is not None
    return construction.bound + weight * rate * held


def _step(length: int = LAGS) -> np.ndarray:
    return (np.arange(length) < length // 2).astype(float)


@lru_cache(maxsize=8)
def _limits(fit: str, counts: tuple[int, ...], seed: int) -> xr.Dataset:
    return lti_limits.measure(_step()[None], n_states=counts, fits=(fit,), seed=seed).isel(kernel=0, fit=0)


def _fit_rows(cell: Cell, seed: int) -> list[Row]:
    """The bound of each row is that of the exponentials it has: "fourier" adds a constant."""
    fit, counts = cell.task["fit"], cell.task["n_states"]
    found = _limits(fit, counts, seed)
    modes = [int(each) for each in found["n_modes"].values]
    bounds = hankel_lower_bound(_step(), modes)
    said = {"what": FITS[fit], "mixer": "S4D", "dtype": "float64", "over": f"{LAGS} lags of one kernel"}
    how = f"lti_limits.measure, {fit}; the bound: Hankel singular values, no such number of exponentials goes below it"
    null = {"null": float(found["null_error"].item()), "null_is": "the zero kernel"}
    return [
        measured(
            cell, "relative L2 error", float(error), sizes={"N": count, "exponentials": n}, bound=float(bound),
            estimator=how, **said, **null,
        )
        for count, n, error, bound in zip(counts, modes, found["error"].values, bounds, strict=True)
    ]  # fmt: skip


def _step_rows(cell: Cell, seed: int) -> list[Row]:
    construction = _built(cell.build)
    said, length = _said(construction, cell.build), cell.build["length"]
    twin = construction.randomised(seed + 1)
    return [
        measured(
            cell, "relative L2 error", _step_error(construction, length), over=f"{length} tokens of one kernel",
            estimator=f"{estimator(construction)}, on each unit vector: kernel of cA - cD",
            null=_step_error(twin, length), null_is=f"randomised twin, seed {seed + 1}",
            **said | {"what": "S6 layer, flat-x, exact up to rounding", "sizes": {"N": 1} | said["sizes"]},
        )
    ]  # fmt: skip


def _step_error(construction: Construction, length: int) -> float:
    """(cA - cD) sqrt(T) / 2 is the sum over the last half: its kernel is the step, from lag 0 on."""
    average, detail = _kernels(construction, length)[:2]
    kernel = ((average - detail) * math.sqrt(length) / 2)[::-1]
    return float(np.linalg.norm(kernel - _step(length)) / np.linalg.norm(_step(length)))


def _kernels(construction: Construction, length: int) -> np.ndarray:
    """What each output reads of each token, (kernel, token): the outputs at unit vectors less that at zero."""
    return (last_output(construction, np.eye(length)) - last_output(construction, np.zeros((1, length)))).T


def _slope_rows(cell: Cell, seed: int) -> list[Row]:
    fit, counts = cell.task["fit"], cell.task["n_states"]
    found = _limits(fit or "fourier", counts, seed)
    value = found["bound_slope"] if fit is None else found["slope"]
    return [
        measured(
            cell, "slope", float(value.item()), what="lower bound for any N exponentials" if fit is None else FITS[fit],
            mixer="S4D", dtype="float64", sizes={"N": f"{counts[0]} .. {counts[-1]}"}, over=f"{len(counts)} N",
            estimator="least squares in log-log", null=0.0, null_is="an error that N does not change",
        )
    ]  # fmt: skip


def _curves(_cells: Sequence[Cell], seed: int) -> dict[str, np.ndarray]:
    """Return the kernels of the default block through its read-out of the trace, and the Haar functions."""
    from mamba_probe.probe import attach

    construction = haar(256, 3)
    assert construction.read_out is not None
    hidden = construction.inputs(_noise(256, seed)[:1])
    with attach(construction.model) as probe:
        trace = probe.record(hidden, variables=("delta", "A", "B", "C", "delta_cumsum"))
    delta, cumulative = (trace[name].values[0, 0].astype(float) for name in ("delta", "delta_cumsum"))
    B, C = (trace[name].values[0, 0, :, 0, 0].astype(float) for name in ("B", "C"))
    decay = np.exp(trace["A"].values[0, :, 0] * (cumulative[-1] - cumulative))
    kernels = construction.read_out @ (C[-1] * decay * delta * B[:, None]).T
    return {"kernels": kernels, "haar": wanted(construction, np.eye(256)).T}


HAAR = Claim(
    name="haar",
    title="Haar wavelets",
    paper=(
        "The S6 layer of Mamba can represent projections onto Haar wavelets, an edge over its Diagonal SSM (S4D)"
        " predecessor in approximating discontinuous functions."
    ),
    ours=(
        "One Mamba-1 block with planted weights returns the coarsest Haar coefficients of its input at the last token,"
        " in five variants; one Mamba-2 block without its gated norm does so in one. What they compute is compared with"
        " PyWavelets, the worst case with a bound, and the kernel of a step with the best that N time-invariant states"
        " reach: fits, and a lower bound that none goes below."
    ),
    cells=cells,
    measures={
        "coefficients": _coefficient_rows, "windows": _window_rows, "worst case": _worst_case_rows,
        "decay": _decay_rows, "fit": _fit_rows, "step": _step_rows, "slope": _slope_rows,
    },
    curves=_curves,
    draw=draw,
    caption=(
        "Above left: kernels recorded from the block and read out, on the Haar functions they should be. Above right:"
        " worst error over all inputs of at most 1, and the bound. Below left: relative L2 error at a step against the"
        " number of states; the axis is broken, since the S6 layer's error is rounding. Below right: error on white"
        " noise against length; ramps lose precision as the square of the length."
    ),
    left_out=(
        "The edge is one of mixers: a whole S4D block that is given a position feature and SiLU represents the same"
        " functions.",
        "A fixed Haar basis has the rate N^(-1/2) too at a jump off its knots; the edge is in knots on the jumps.",
    ),
)  # fmt: skip
