"""One token kept for as long as the sequence lasts, and how many time-invariant states that would take."""

from collections.abc import Sequence
from functools import lru_cache
from itertools import product
from typing import Any

import numpy as np
import torch
import xarray as xr

from mamba_probe.analyses import memory_horizon
from mamba_probe.analyses.lti_limits.core import keep_lower_bound
from mamba_probe.analyses.lti_limits.fits import fit_optimised, project
from mamba_probe.constructions import Construction, keep_nth
from mamba_probe.probe import attach
from mamba_probe.reproduce.claim import Claim
from mamba_probe.reproduce.evaluate import MIXERS, dtype_of, estimator, last_output, sizes_of, wanted
from mamba_probe.reproduce.keep_figure import draw
from mamba_probe.reproduce.table import Cell, Criterion, Row, counted, measured, spread
from mamba_probe.tasks import keep_nth as task_of

__all__ = ["KEEP", "cells"]

LENGTHS = "Any length: the token in the middle"
PLACES = "Any place: T = 1024"
STEEPNESS = "Error and bound against steepness"
RETENTION = "Retention: mean decay after n against its limit for 1 % of loss"
PROFILE = "Decay and memory horizon around n"
LIMITS = "One token of many, kept by N time-invariant states"
NAMED = f"{LIMITS}, named by the largest output"

N_TOKENS = 16
LOSS = 0.01  # of what was written at n, the retention's epsilon
QUERIES = 1000  # random sequences for the accuracy of a time-invariant kernel


def cells() -> tuple[Cell, ...]:
    """Return the tables as data."""
    return (*_lengths(), *_places(), *_steepness(), *_retention(), *_profile(), *_limits())


def _tolerance(dtype: str) -> Criterion:
    return Criterion("<=", 1e-12 if dtype == "float64" else 1e-6)


def _lengths() -> list[Cell]:
    lengths = (64, 256, 1024, 4096, 16384)
    return [
        Cell(
            LENGTHS, "kept", _tolerance(dtype),
            {"length": length, "n": length // 2, "profile": profile, "mixer": mixer, "dtype": dtype},
            {"batch": 32 if length <= 4096 else 8},
        )
        for (profile, mixer), length, dtype in product(KINDS, lengths, ("float64", "float32"))
    ]  # fmt: skip


def _places() -> list[Cell]:
    return [
        Cell(
            PLACES, "kept", _tolerance("float64"),
            {"length": 1024, "n": n, "profile": profile, "mixer": mixer, "dtype": "float64"}, {"batch": 32},
        )
        for (profile, mixer), n in product(KINDS, (0, 1023))
    ]  # fmt: skip


def _steepness() -> list[Cell]:
    limit = Criterion("<=", 1e-15, of_bound=True)
    return [
        Cell(
            STEEPNESS, "error", limit,
            {"length": 64, "n": 0 if profile == "event" else 32, "beta": beta, "profile": profile, "dtype": "float64"},
            {"batch": 32},
        )
        for profile, beta in product(("ramp", "event"), (8.0, 16.0, 32.0, 64.0))
    ]  # fmt: skip


def _retention() -> list[Cell]:
    limit = Criterion(">=", -1e-12, of_bound=True)
    return [
        Cell(RETENTION, "retention", limit, {"length": 16384, "n": 16383 - m}, {"m": m}) for m in (10, 100, 1000, 10000)
    ]


def _profile() -> list[Cell]:
    return [
        Cell(PROFILE, "profile", limit, {"length": 1024, "n": 512, "profile": profile}, {"place": place})
        for profile, place, limit in (
            ("ramp", "mean decay before", Criterion("<=", 1e-12)),
            ("ramp", "mean decay at", Criterion("<=", 1e-12)),
            ("ramp", "mean decay after", Criterion(">=", 1 - 1e-12)),
            ("ramp", "horizon before", Criterion("=", 1)),
            ("ramp", "horizon at", Criterion(">=", 511)),
            ("event", "mean decay before", Criterion(">=", 1 - 1e-12)),
            ("event", "mean decay at", Criterion("<=", 1e-12)),
            ("event", "mean decay after", Criterion(">=", 1 - 1e-12)),
            ("event", "horizon before", Criterion("=", 1)),
            ("event", "horizon at", Criterion(">=", 511)),
        )
    ]


def _limits() -> list[Cell]:
    never, lost = Criterion(">=", -1e-9, of_bound=True), Criterion("<", 0.99, must_fail=True)
    grid = [(length, n) for length in (64, 256, 1024) for n in (4, 16, 64, 256) if n <= length]
    errors = [Cell(LIMITS, "lti error", never, task={"length": length, "n_states": n}) for length, n in grid]
    named = [
        Cell(
            NAMED, "lti accuracy", lost if n < length // 2 else Criterion("=", 1),
            task={"length": length, "n_states": n},
        )
        for length, n in grid
    ]  # fmt: skip
    single = [Cell(LIMITS, "one state", _tolerance("float64"), {"length": n, "n": n // 2}) for n in (64, 256, 1024)]
    return errors + single + named


KINDS = tuple((profile, mixer) for mixer in ("mamba1", "mamba2") for profile in ("ramp", "event"))


def _built(build: dict[str, Any]) -> Construction:
    return keep_nth(
        **{"n_tokens": N_TOKENS, "beta": 64.0} | build | {"dtype": getattr(torch, build.get("dtype", "float64"))}
    )


def _tokens(cell: Cell, seed: int) -> np.ndarray:
    return task_of(cell.task["batch"], cell.build["length"], cell.build["n"], N_TOKENS, seed).input_ids


def _said(construction: Construction, build: dict[str, Any]) -> dict[str, Any]:
    sizes = {"T": build["length"], "n": build["n"], "beta": build.get("beta", 64.0)} | sizes_of(construction)
    what = f"keep_nth {build.get('profile', 'ramp')}"
    mixer = MIXERS[build.get("mixer", "mamba1")]
    return {"what": what, "mixer": mixer, "dtype": dtype_of(construction), "sizes": sizes}


def _error_rows(cell: Cell, seed: int) -> list[Row]:
    return _kept_rows(cell, seed)[:1]


def _kept_rows(cell: Cell, seed: int) -> list[Row]:
    """The error of what comes out, and how often the largest output is the token's."""
    construction, ids = _built(cell.build), _tokens(cell, seed)
    twin = construction.randomised(seed + 1)
    known, wrote = wanted(construction, ids), ids[:, cell.build["n"]]
    out, null = last_output(construction, ids), last_output(twin, ids)
    missed = np.abs(out - known).max(1)
    said = _said(construction, cell.build) | {"null_is": f"randomised twin, seed {seed + 1}, same sequences"}
    how = f"{estimator(construction)}, at the last token"
    error = spread(
        cell, "error", missed.tolist(), estimator=f"{how}, against the one-hot token n", bound=construction.bound,
        over=f"largest of the outputs; median of {len(ids)} sequences",
        null=float(np.median(np.abs(null - known).max(1))), **said,
    )  # fmt: skip
    named, lucky = ((found[:, :N_TOKENS].argmax(1) == wrote).sum() for found in (out, null))
    answers = Cell(f"{cell.table}, named by the largest output", cell.how, Criterion("=", 1))
    return [error, counted(
        answers, (int(named), len(ids)), estimator=f"{how}, the largest output", null=float(lucky / len(ids)),
        over=f"{len(ids)} sequences, one query each", **said,
    )]  # fmt: skip


@lru_cache(maxsize=8)
def _trace(length: int, n: int, profile: str, seed: int, randomised: bool = False) -> xr.Dataset:
    """One sequence through the float32 block: delta and A of one channel of a token."""
    construction = keep_nth(N_TOKENS, length, n, 64.0, profile)
    construction = construction.randomised(seed + 1) if randomised else construction
    hidden = construction.inputs(task_of(1, length, n, N_TOKENS, seed).input_ids)
    with attach(construction.model) as probe:
        return probe.record(hidden, variables=("delta", "A"), channels=[0])


def _retention_rows(cell: Cell, seed: int) -> list[Row]:
    r"""If a share 1 - e of the write survives m steps, their mean decay is at least (1 - e)^(1/m) (ours)."""
    m, length, n = cell.task["m"], cell.build["length"], cell.build["n"]
    kept, null = (_decay(_trace(length, n, "ramp", seed, randomised))[n + 1 :] for randomised in (False, True))
    limit = (1 - LOSS) ** (1 / m)
    construction = keep_nth(N_TOKENS, length, n)
    return [
        measured(
            cell, "mean decay exp(A delta)", float(kept.mean()), bound=limit, over=f"the {m} tokens after n",
            null=float(null.mean()), null_is=f"randomised twin, seed {seed + 1}",
            estimator="delta and A recorded from the block; the limit is that of a product of at least 0.99",
            **_said(construction, cell.build) | {"sizes": {"T": length, "m": m}},
        )
    ]  # fmt: skip


def _decay(trace: xr.Dataset) -> np.ndarray:
    """exp(A delta) of the recorded channel, (token,), in float64."""
    return np.exp(trace["delta"].values[0, 0, :, 0].astype(float) * trace["A"].values[0, 0, 0].astype(float))


def _profile_rows(cell: Cell, seed: int) -> list[Row]:
    length, n, profile = (cell.build[name] for name in ("length", "n", "profile"))
    what, where = cell.task["place"].rsplit(" ", 1)
    value, null = (_place(_trace(length, n, profile, seed, randomised), n, what, where) for randomised in (False, True))
    said = _said(keep_nth(N_TOKENS, length, n, profile=profile), cell.build)
    token = {"before": "n - 1", "at": "n"}
    over = f"one sequence, tokens {where} n" if what == "mean decay" else f"the write at token {token[where]}"
    censored = ", the rest of the recording where it is never reached" if what == "horizon" and where == "at" else ""
    return [
        measured(
            cell, f"{what} {where} n", value, over=over, null=null, null_is=f"randomised twin, seed {seed + 1}",
            estimator="memory_horizon.measure on a recording of the float32 block"
            + (f": tokens until 1/e{censored}" if what == "horizon" else ""), **said,
        )
    ]  # fmt: skip


def _place(trace: xr.Dataset, n: int, what: str, where: str) -> float:
    if what == "mean decay":
        found = memory_horizon.measure(trace, event_tokens=n)["mean_decay_event"]
        return float(found.sel(event=where).values.squeeze())
    token = n - 1 if where == "before" else n
    found = memory_horizon.measure(trace, tokens=[token])
    return float(found["token_forward_horizon_at_least"].values.squeeze())


@lru_cache(maxsize=32)
def _lti(length: int, n_states: int, seed: int) -> tuple[str, float, np.ndarray]:
    """The best kernel found for one token at lag T / 2 - 1: of Fourier modes and, up to 64 states, of free ones."""
    target = np.eye(length)[length // 2 - 1]
    modes = 2j * np.pi * (np.arange(n_states) - n_states // 2)
    found = {"N of T Fourier modes": project(target, modes)}
    if n_states <= 64:
        found["free modes, optimised"] = fit_optimised(target, n_states, seed)
    best = min(found, key=lambda name: found[name].error)
    return best, found[best].error, np.real(found[best].kernel)


def _lti_said(cell: Cell) -> dict[str, Any]:
    sizes = {"T": cell.task["length"], "exponentials": cell.task["n_states"]}
    return {"what": "best kernel found", "mixer": "time-invariant", "dtype": "float64", "sizes": sizes}


def _lti_error_rows(cell: Cell, seed: int) -> list[Row]:
    length, n_states = cell.task["length"], cell.task["n_states"]
    best, error, _ = _lti(length, n_states, seed)
    bound = float(keep_lower_bound(length, length // 2 - 1, [n_states])[0])
    return [
        measured(
            cell, "relative L2 error", error, bound=bound, over=f"{length} lags of one kernel", null=1.0,
            null_is="the zero kernel", estimator=f"least squares, {best}; no N exponentials go below the bound",
            **_lti_said(cell),
        )
    ]  # fmt: skip


def _one_state_rows(cell: Cell, seed: int) -> list[Row]:
    """What the block reads of each token, at its own channel: its kernel, one at n and zero elsewhere."""
    construction, length, n = _built(cell.build), cell.build["length"], cell.build["n"]
    error, null = (_kernel_error(each, length, n) for each in (construction, construction.randomised(seed + 1)))
    said = _said(construction, cell.build)
    return [
        measured(
            cell, "relative L2 error", error, over=f"{length} tokens of one kernel", null=null,
            null_is=f"randomised twin, seed {seed + 1}",
            estimator=f"{estimator(construction)}, on a sequence whose one other token stands at each place in turn",
            **said | {"what": "S6 layer, keep_nth ramp", "sizes": {"T": length, "exponentials": 1}},
        )
    ]  # fmt: skip


def _kernel_error(construction: Construction, length: int, n: int) -> float:
    kernel = last_output(construction, np.eye(length, dtype=int))[:, 1]
    return float(np.linalg.norm(kernel - np.eye(length)[n]))


def _lti_accuracy_rows(cell: Cell, seed: int) -> list[Row]:
    length, n_states = cell.task["length"], cell.task["n_states"]
    best, _, kernel = _lti(length, n_states, seed)
    n = length - length // 2
    ids = task_of(QUERIES, length, n, N_TOKENS, seed).input_ids
    read = np.stack([(ids == token) @ kernel[::-1] for token in range(N_TOKENS)], axis=1)
    correct = int((read.argmax(1) == ids[:, n]).sum())
    return [
        counted(
            cell, (correct, QUERIES), estimator=f"the kernel applied to one-hot tokens, {best}", null=1 / N_TOKENS,
            null_is=f"chance, 1 of {N_TOKENS}", over=f"{QUERIES} sequences, one query each", **_lti_said(cell),
        )
    ]  # fmt: skip


def _curves(_cells: Sequence[Cell], seed: int) -> dict[str, np.ndarray]:
    """Return exp(A delta) of both profiles and the horizon of every write of the ramp, 32 tokens around n = 32."""
    found = {}
    for profile in ("ramp", "event"):
        trace = _trace(64, 32, profile, seed)
        horizon = memory_horizon.measure(trace, tokens=range(64))
        found[f"decay {profile}"] = _decay(trace)
        found[f"horizon {profile}"] = horizon["token_forward_horizon"].values.squeeze()
        found[f"least {profile}"] = horizon["token_forward_horizon_at_least"].values.squeeze()
    return found


KEEP = Claim(
    name="keep",
    title="Memory that does not decay",
    paper="The S6 layer of Mamba can dynamically counteract memory decay.",
    ours=(
        "One block with planted weights returns the n-th token at the end, however long ago it was: the ramp erases up"
        " to n and holds after it, the event writes at n alone. The ramp's error does not depend on the length. Beside"
        " it: the limit that keeping a write sets to the decay after it, and how many time-invariant states keep one"
        " token."
    ),
    cells=cells,
    measures={
        "kept": _kept_rows, "error": _error_rows, "retention": _retention_rows, "profile": _profile_rows,
        "lti error": _lti_error_rows, "one state": _one_state_rows, "lti accuracy": _lti_accuracy_rows,
    },
    curves=_curves,
    draw=draw,
    caption=(
        "Above left: the decay of each step around n = 32, recorded. Above right: tokens until a write has decayed to"
        " 1/e; triangles are at least that, the recording ends first. Below left: error against length. Below right:"
        " one token of T kept by N time-invariant states, the best kernel found and the bound; the S6 layer needs one."
    ),
    left_out=(
        "The best kernel found comes from a local search: a better one may exist, and only the bound speaks for all.",
        "L2 is strict: with N = T/4 states the largest output is still mostly the right token.",
        "Nothing in the tokens says where n is: the block is built for one n, or told by a marker (event).",
    ),
)  # fmt: skip
