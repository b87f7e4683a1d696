"""Trace or Jacobian in, wavelet alignment out: validation, and what each number means."""

from collections.abc import Callable, Sequence
from contextlib import ExitStack, closing
from dataclasses import dataclass
from difflib import get_close_matches
from itertools import chain
from typing import Any

import numpy as np
import xarray as xr
from jaxtyping import Float, Int

from mamba_probe.analyses.common import by_layer, described, refuse
from mamba_probe.analyses.lti_limits.core import checked_counts
from mamba_probe.analyses.wavelet_alignment import core, labels, summaries
from mamba_probe.analyses.wavelet_alignment.basis import Basis, window_length
from mamba_probe.analyses.wavelet_alignment.kernels import BlockKernels, Kernels, TraceKernels
from mamba_probe.analyses.wavelet_alignment.passes import SPANNING, of_row
from mamba_probe.analyses.wavelet_alignment.statistics import ORDER_ERROR, SHARES, Settings

__all__ = ["measure"]

DEFAULT_LEVEL = 3
LAST = -1
"""Label of the one query of each row where none was asked for: its last valid token."""

Queries = Sequence[int] | Sequence[Sequence[int]] | np.ndarray | None
Found = dict[str, np.ndarray]
Kept = list[tuple[np.ndarray, np.ndarray]]
"""Of each layer: indices of the kernels that are kept, and those at unit energy."""


@dataclass(frozen=True)
class Plan:
    """What is measured of whom: each row's queries (by index among valid tokens) and windows, and the settings."""

    at: Int[np.ndarray, "batch query_token"]
    window: Int[np.ndarray, "batch query_token"]
    settings: Settings


def measure(
    trace: xr.Dataset | None, *, query_tokens: Queries = None, kernel: str = "mixer", wavelet: str = "haar",
    mode: str = "periodization", level: int | None = None, read_out: np.ndarray | xr.DataArray | None = None,
    jacobian: xr.Dataset | None = None, baseline: xr.Dataset | None = None, n_sampled: int = 4, order_lags: int = 512,
    exponentials: Sequence[int] = (), n_span: int = 512, n_kept: int = 0, n_bootstrap: int = 200, seed: int = 0,
    weights: xr.Dataset | None = None, interventions: xr.Dataset | None = None,
) -> xr.Dataset:  # fmt: skip
    r"""Measure how nearly the kernels of a layer are wavelets.

    Three kernels of a query t, never mixed (estimators ours):

    - `mixer`: $k_t[s] = \sum_n C_t[n] \exp(A_n \sum_{r=s+1}^{t} \Delta_r) \, \Delta_s B_s[n]$, selection frozen at
      what was executed;
    - `write`: the same with B and C at one: what the step sizes alone can window;
    - `block`: $k_t[s] = \partial\, \mathrm{out}_t / \partial u_s$, selection moving, from `probe.jacobian`.

    In zoh (S4D) $\Delta_s$ stands for $\Delta_s \varphi_1(\Delta_s A_n)$; a complex state for its conjugate too (twice
    the real part). Kernels run over the last $2^{\lfloor \log_2 n \rfloor}$ of the n valid tokens up to t, and are
    scaled to unit energy. Beside the executed kernels: `null_*`, the layer made time-invariant, delta, B and C at
    their means over the row (a slow one is constant: the *scaling function* matches it, so read `best_cosine` and
    `wavelet_capture`, which leave that out, before `capture`); `null_shuffle_*`, delta permuted over the row;
    `baseline_*`, another model; `dft_*`, the same kernels in the unitary DFT.

    Args:
        trace: delta and A, for "mixer" B and C too, with `valid` and `position`; in memory or on dask. With "block"
            None, or a trace of the same model.
        query_tokens: positions among a row's valid tokens: (query_token,) for every row, or (batch, query_token) one
            set a row; default: the last valid token of each ("block": all queries of the Jacobian).
        kernel: "mixer", "write" or "block".
        wavelet: an orthonormal discrete wavelet of pywt.
        mode: "periodization", or "zero": the kernel as zero outside of its window.
        level: J of the coarse space, spanned by the scaling function and the 2^J - 1 coarsest wavelets;
            default 3, or less where the shortest window is below 16 tokens.
        read_out: (kernel, channel or head): then kernels are read_out @ (kernels of the channels), else the latter.
        jacobian: of `probe.jacobian(query_tokens=..., direction=..., read_out=...)`, for "block" only.
        baseline: a trace of another model, as the randomised twin, on the same rows ("block": its Jacobian).
        n_sampled: kernels a query, evenly spaced, of which `lti_order` and `exponential_error` are taken; NaN else.
        order_lags: lags next to the query that enter `lti_order` (a bound on these is one on all, if a weaker one).
        exponentials: numbers N of exponentials to fit (slow); beside each the error of as many wavelets.
        n_span: kernels a query, evenly spaced, whose span is compared with the coarse space.
        n_kept: kernels a layer, those nearest to a wavelet, kept with it for `plot(kind="kernels")`.
        n_bootstrap: replicates of the interval (95 %, percentile) over rows; with one row over runs of its queries.
        seed: seed of the replicates and of the shuffle.
        weights, interventions: not used; refused.

    Returns:
        Dataset over layer, batch, query_token and kernel; `layer_*` are means (`discontinuity_index` and `lti_order`:
        medians) over the rest, live kernels only. `null_shuffle_*` and `baseline_*` are of layers only.

    Raises:
        ValueError: a missing variable, a window below 4 tokens, tokens with gaps, a wavelet or mode that does not keep
            energies, an unknown kernel, a query that a row lacks, a read-out of another shape, a Jacobian of norms, a
            baseline of other rows or layers, an argument that the kernel does not use.
        OSError: no room on disk for the span of a long window (`n_span`).

    >>> import numpy as np, xarray as xr
    >>> delta = np.where(np.arange(8) < 4, 1e-9, 1.0).astype("float32").reshape(1, 1, 8, 1)
    >>> trace = xr.Dataset(
    ...     {"delta": (("layer", "batch", "token", "channel"), delta),
    ...      "A": (("layer", "channel", "state"), np.full((1, 1, 1), -1e-9, "float32"))},
    ...     {"layer": [0], "valid": (("batch", "token"), np.ones((1, 8), bool)),
    ...      "position": (("batch", "token"), np.arange(8)[None])},
    ...     {"schema_version": 1, "family": "mamba", "discretization": "euler"})
    >>> result = measure(trace, kernel="write")
    >>> round(result.best_cosine.item(), 6), round(result.null_best_cosine.item(), 6)
    (0.707107, 0.0)
    >>> round(result.discontinuity_index.item(), 6)
    1.0
    """
    refuse("wavelet_alignment", weights=weights, interventions=interventions)
    source = _source(trace, kernel, read_out, jacobian, seed)
    twin = None if baseline is None else _twin(source, baseline, kernel, read_out, seed)
    limits = {"n_sampled": n_sampled, "order_lags": order_lags, "n_span": n_span}
    plan = _plan(source, query_tokens, Basis(wavelet, mode), level, limits, exponentials)
    if not 0 <= n_kept <= len(source.names):
        raise ValueError(f"n_kept must be 0 to {len(source.names)}, the number of kernels; got {n_kept}")
    found, totals, kept = _measured(source, twin, plan, n_kept)
    for variant, sums in totals.items():
        found |= summaries.summarised(sums, labels.PREFIX[variant], n_bootstrap, seed)
    found["spike_best_cosine"] = np.asarray(core.spike_cosine(int(plan.window.max()), plan.settings.basis))
    found |= _kept(source, plan, found["best_cosine"], kept)
    coords = _coords(source, plan, query_tokens, found)
    attrs = _attrs(source, baseline, plan, kernel, read_out is not None) | {
        "model": str((trace if jacobian is None else jacobian).attrs.get("model", "model")),  # type: ignore[union-attr]
        "n_bootstrap": str(n_bootstrap),
        "seed": str(seed),
    }
    return described({name: labels.entry(name, found[name]) for name in sorted(found)}, coords, attrs)


def _source(trace: xr.Dataset | None, kernel: str, read_out: object, jacobian: xr.Dataset | None, seed: int) -> Kernels:
    if kernel not in labels.KERNELS:
        close = get_close_matches(str(kernel), labels.KERNELS)
        known = ", ".join(map(repr, labels.KERNELS))
        raise ValueError(
            f"unknown kernel {kernel!r}: " + (f"did you mean {close[0]!r}?" if close else f"known: {known}")
        )
    if kernel != "block":
        if jacobian is not None:
            raise ValueError(f"jacobian= is of kernel 'block', not of {kernel!r}; leave it None")
        if trace is None:
            raise ValueError(f"kernel {kernel!r} is measured from a trace; got None")
        return TraceKernels(trace, kernel, read_out, seed)
    if jacobian is None:
        raise ValueError("kernel 'block' is measured from jacobian=probe.jacobian(query_tokens=..., direction=...)")
    if read_out is not None:
        raise ValueError("the read-out of kernel 'block' goes to probe.jacobian(read_out=...); leave it None here")
    if trace is not None and trace.attrs.get("model_hash") != jacobian.attrs.get("model_hash"):
        raise ValueError("trace and jacobian are of different models (attrs model_hash)")
    return BlockKernels(jacobian)


def _twin(source: Kernels, baseline: xr.Dataset, kernel: str, read_out: object, seed: int) -> Kernels:
    """Kernels of the baseline, which must have the same rows and layers."""
    twin = BlockKernels(baseline) if kernel == "block" else TraceKernels(baseline, kernel, read_out, seed)
    if not np.array_equal(twin.layers, source.layers) or twin.n_rows != source.n_rows:
        raise ValueError(
            f"baseline needs the layers {source.layers.tolist()} and {source.n_rows} rows; got {twin.layers.tolist()} "
            f"and {twin.n_rows}"
        )
    for row in range(source.n_rows):
        if not np.array_equal(twin.positions(row), source.positions(row)):
            raise ValueError(f"baseline needs the same valid tokens; row {row} has others")
    return twin


def _plan(
    source: Kernels, query_tokens: Queries, basis: Basis, level: int | None, limits: dict[str, int],
    exponentials: Sequence[int],
) -> Plan:  # fmt: skip
    for name, value in limits.items():
        if value < 2:
            raise ValueError(f"{name} must be at least 2; got {value}")
    asked = _asked(source, query_tokens)
    at = np.array([_queries(source, row, None if asked is None else asked[row]) for row in range(source.n_rows)])
    windows = np.array([[window_length(index + 1) for index in row] for row in at.tolist()])
    top = int(windows.min()).bit_length() - 2
    chosen = min(DEFAULT_LEVEL, top) if level is None else level
    if not 0 <= chosen <= top:
        raise ValueError(
            f"level must be 0 to {top} (2^level below the shortest window of {windows.min()} tokens); got {level}"
        )
    n_angles = max(int(basis.coarse(size, chosen).sum()) for size in set(windows.ravel().tolist()))
    depth = int(windows.max()).bit_length() - 1
    return Plan(
        at, windows, Settings(basis, chosen, depth, n_angles, **limits, exponentials=_fits(exponentials, windows))
    )


def _fits(exponentials: Sequence[int], windows: np.ndarray) -> tuple[int, ...]:
    if not len(exponentials):
        return ()
    counts = tuple(checked_counts(exponentials, least=1).tolist())
    if max(counts) >= windows.min() // 2:
        raise ValueError(f"exponentials must be below half the shortest window of {windows.min()} tokens; got {counts}")
    return counts


def _asked(source: Kernels, query_tokens: Queries) -> Int[np.ndarray, "batch query_token"] | None:
    """The queries of each row, by position; None where the last valid tokens were asked for."""
    asked = source.asked if query_tokens is None else np.asarray(query_tokens)
    if asked is None:
        return None
    if asked.size == 0:
        raise ValueError("query_tokens is empty; leave it None for the last valid token of each row")
    if asked.dtype.kind not in "iu" or asked.ndim > 2 or (asked.ndim == 2 and len(asked) != source.n_rows):
        raise ValueError(
            f"query_tokens needs integers (query_token,) or (batch = {source.n_rows}, query_token); got {asked.dtype} "
            f"of shape {asked.shape}"
        )
    held = asked.ravel().tolist() if source.asked is None else source.asked.tolist()
    lacking = sorted(set(asked.ravel().tolist()) - set(held))
    if lacking:
        raise ValueError(f"query_tokens {lacking} are not in the jacobian, which has {held}")
    return np.broadcast_to(asked, (source.n_rows, asked.shape[-1]))


def _queries(source: Kernels, row: int, query_tokens: Int[np.ndarray, " query_token"] | None) -> list[int]:
    position = source.positions(row)
    if not source.contiguous(row):
        raise ValueError(
            f"the tokens of row {row} are not contiguous: a kernel needs every token of its window; record all"
        )
    if query_tokens is None:
        return [len(position) - 1]
    missing = sorted(set(query_tokens.tolist()) - set(position.tolist()))
    if missing:
        raise ValueError(
            f"query_tokens {missing} are not among the valid tokens of row {row}: {len(position)} tokens at positions "
            f"{position[0]} to {position[-1]}"
        )
    return [int(token) - int(position[0]) for token in query_tokens]


def _measured(source: Kernels, twin: Kernels | None, plan: Plan, n_kept: int) -> tuple[Found, dict[str, Found], Kept]:
    """Numbers by kernel, executed and time-invariant, what each variant's summaries need, and the kernels kept.

    Stacked over (layer, batch, query_token); one block of kernels is held at a time.
    """
    layers = _by_layer(source, twin, lambda layer: _layer(source, twin, plan, n_kept, layer))
    shape = (len(layers), *plan.at.shape)
    details, totals = (_joined(list(each), shape) for each in list(zip(*layers, strict=True))[:2])
    found = {
        labels.PREFIX[variant] + name: values for variant, parts in details.items() for name, values in parts.items()
    }
    return found, totals, [kept for *_, each in layers for kept in each]


Variants = dict[str, list[Found]]
"""Of a layer, by variant: a row and query after another."""
Layer = tuple[Variants, Variants, Kept]
"""Numbers by kernel, what summaries need, and what is kept."""


def _joined(layers: list[Variants], shape: tuple[int, ...]) -> dict[str, Found]:
    return {name: _stacked([part for one in layers for part in one[name]], shape) for name in layers[0]}


def _by_layer(source: Kernels, twin: Kernels | None, measured: Callable[[int], Layer]) -> list[Layer]:
    if isinstance(source, BlockKernels):  # of one layer
        return [measured(0)]
    return by_layer([one.view.trace for one in (source, twin) if isinstance(one, TraceKernels)], measured)


def _layer(source: Kernels, twin: Kernels | None, plan: Plan, n_kept: int, layer: int) -> Layer:
    details, totals, kept = {}, {}, []
    for row in range(len(plan.at)):
        where, own = (layer, row, plan.at[row], plan.window[row]), ("real", *source.nulls)
        runs = [of_row(source, dict(zip(own, own, strict=True)), *where, plan.settings, n_kept if row == 0 else 0)]
        if twin is not None:
            runs.append(of_row(twin, {"baseline": "real"}, *where, plan.settings))
        with ExitStack() as stack:
            for variant, query in chain.from_iterable(stack.enter_context(closing(run)) for run in runs):
                one, sums = query.result()
                totals.setdefault(variant, []).append(sums)
                if variant in SPANNING:
                    details.setdefault(variant, []).append(one)
                if query.n_kept:
                    kept.append(query.kept)
    return details, totals, kept


def _stacked(parts: list[Found], shape: tuple[int, ...]) -> Found:
    stacked = {name: np.stack([part[name] for part in parts]) for name in parts[0]}
    return {name: values.reshape(*shape, *values.shape[1:]) for name, values in stacked.items()}


def _kept(source: Kernels, plan: Plan, cosine: Float[np.ndarray, "layer batch query kernel"], kept: Kept) -> Found:
    """The kernels of the first row's first query that are nearest to a wavelet, with their projections on it."""
    if not kept:
        return {}
    return {
        "kept_kernel": np.stack([kernel for _, kernel in kept]),
        "kept_wavelet": np.stack([_projected(kernel, plan.settings.basis) for _, kernel in kept]),
        "kept_cosine": np.stack([found[index] for found, (index, _) in zip(cosine[:, 0, 0], kept, strict=True)]),
        "kept_name": np.stack([source.names[index] for index, _ in kept]),
    }


def _projected(kernel: Float[np.ndarray, "kept token"], basis: Basis) -> Float[np.ndarray, "kept token"]:
    coefficient, level = basis.transform(kernel), basis.levels(kernel.shape[1])
    index = np.argmax(np.where(level == 0, -1.0, np.abs(np.nan_to_num(coefficient))), axis=1)
    return np.stack([c[i] * basis.function(int(i), kernel.shape[1]) for c, i in zip(coefficient, index, strict=True)])


def _coords(source: Kernels, plan: Plan, query_tokens: Queries, found: Found) -> dict[str, Any]:
    given = source.asked if query_tokens is None else np.asarray(query_tokens)
    query = np.array([LAST]) if given is None else given if given.ndim == 1 else np.arange(plan.at.shape[1])
    position = np.stack([source.positions(row)[at] for row, at in enumerate(plan.at)])
    where, depth = ("batch", "query_token"), plan.settings.depth
    coords = {
        "layer": source.layers,
        "batch": source.batch,
        "query_token": query,
        "kernel": source.names,
        "energy_share": list(SHARES),
        "level": np.arange(depth + 1),
        "angle": np.arange(plan.settings.n_angles),
        "coefficient": 2 ** np.arange(depth + 1),
        "query_position": (where, position, {"long_name": "position of the query", "units": "token"}),
        "window": (where, plan.window, {"long_name": "length of the window", "units": "token"}),
    }
    coords |= {"n_states": list(plan.settings.exponentials)} if plan.settings.exponentials else {}
    if "kept_name" in found:
        coords["kept_name"] = (("layer", "kept"), found.pop("kept_name"), {"long_name": "label of a kept kernel"})
        coords["kept_token"] = position[0, 0] + 1 - int(plan.window[0, 0]) + np.arange(int(plan.window[0, 0]))
    return coords


def _attrs(source: Kernels, baseline: xr.Dataset | None, plan: Plan, kernel: str, read: bool) -> dict[str, str]:
    settings = plan.settings
    nulls = "; ".join(
        (
            "null_*: the layer made time-invariant, delta, B and C frozen to means over the row's valid tokens",
            "null_shuffle_* (layers only): delta permuted over the row's valid tokens, one order a row, B and C as is",
        )[: len(source.nulls)]
    )
    attrs = {
        "analysis": "wavelet_alignment",
        "estimator": f"{labels.KERNELS[kernel]}; at unit energy, in an orthonormal wavelet basis (ours)",
        "kernel": kernel + (" after a read-out" if read else f", one a {source.head_dim}"),
        "kernel_name": kernel,
        "wavelet": settings.basis.wavelet,
        "mode": settings.basis.mode,
        "coarse_level": str(settings.level),
        "window_rule": "the last 2^floor(log2 n) of the n valid tokens up to the query; nothing is padded",
        "null": nulls or "none: a block's nulls need the model; pass its randomised twin's jacobian as baseline=",
        "interval": summaries.interval_rule(*plan.at.shape),
        "reduces_over": "layer_*: batch, query_token, kernel (kernels with energy only)",
        "rank_tolerance": f"{core.RANK_TOLERANCE:g} of the largest pivot of a QR of the unit-energy kernels",
        "span_rule": f"span of at most {settings.n_span} kernels a query, evenly spaced over them",
        "order_rule": f"lti_order at {ORDER_ERROR:.0%} error, of at most {settings.n_sampled} kernels a query, evenly"
        f" spaced over them, from the {settings.order_lags} lags next to the query",
        "n_rows": str(source.n_rows),
    }
    if baseline is not None:
        model = baseline.attrs.get("model", "another model")
        attrs["baseline_estimator"] = f"baseline_* (layers only): the same kernels of the baseline given, {model}"
    return attrs
