"""Names, dimensions, units and attributes of a result."""

from typing import Any

import numpy as np

from mamba_probe.analyses.common.result import Entry
from mamba_probe.analyses.wavelet_alignment import core
from mamba_probe.analyses.wavelet_alignment.statistics import ORDER_ERROR

__all__ = ["KERNELS", "NULL_TEXT", "PREFIX", "entry", "title"]

PREFIX = {"real": "", "null": "null_", "null_shuffle": "null_shuffle_", "baseline": "baseline_"}
"""Prefix of the names of each variant."""

KERNELS = {
    "write": "write kernels exp(A Cum) delta_s, B and C at one, states added",
    "mixer": "mixer kernels C_t exp(A Cum) delta_s B_s, selection as executed",
    "block": "block kernels d out_t / d u_s, selection moving",
}
"""What each kernel is, in a result's words."""

NULL_TEXT = {
    "null_shuffle_": "null: delta shuffled in time",
    "null_": "null: time-invariant layer",
    "baseline_": "baseline: the model given as baseline",
    "": "",
}

TEXT = {
    "n_coefficients": ("coefficients that hold a share of the energy", "coefficient"),
    "coefficient_fraction": ("the same as a fraction of the window", "1"),
    "effective_rank": ("effective number of coefficients, exp of the entropy of their energy", "coefficient"),
    "best_cosine": ("|cosine| with the best single wavelet", "1"),
    "spike_best_cosine": (
        f"|cosine| of a kernel of one single token with its best single wavelet (reference; windows to"
        f" {core.SPIKE_WINDOW} tokens, longer ones alike)", "1",
    ),
    "best_level": ("level of that wavelet, log2 of its length in tokens", "level"),
    "best_shift": ("shift of that wavelet, in its own lengths from the window's start", "1"),
    "scaling_cosine": ("|cosine| with the best scaling function (a constant, for Haar)", "1"),
    "capture": ("share of the energy in the coarse space, scaling function included", "1"),
    "wavelet_capture": ("share of the energy in the coarse space's wavelets, scaling function left out", "1"),
    "energy_by_level": ("share of the energy by level, 0 the scaling function", "1"),
    "principal_cosine": ("cosine of the principal angles between the kernels' span and the coarse space", "1"),
    "mean_squared_cosine": ("mean squared cosine of the principal angles", "1"),
    "random_mean_squared_cosine": ("the same expected of a random subspace of that rank (closed form)", "1"),
    "capture_residual": ("share of the coarse space's energy outside of the kernels' span", "1"),
    "rank": ("numerical rank of the kernels", "1"),
    "n_dead": ("kernels without energy, left out", "kernel"),
    "compaction": ("share of the energy in the largest coefficients", "1"),
    "discontinuity_index": (
        f"largest step over the range; NaN for constant kernels (range within {core.RANGE_TOLERANCE:g} of peak)", "1",
    ),
    "lti_order": (f"states a time-invariant layer needs at least, {ORDER_ERROR:.0%} error (Hankel bound)", "state"),
    "dft_compaction": ("share of the energy in the largest coefficients of the unitary DFT", "1"),
    "dft_n_coefficients": ("DFT coefficients that hold a share of the energy, conjugates counted", "coefficient"),
    "dft_effective_rank": ("effective number of DFT coefficients, conjugates counted", "coefficient"),
    "exponential_error": ("relative L2 error of the best N exponentials found (upper end of the least)", "1"),
    "n_term_error": ("relative L2 error of a kernel's largest N coefficients", "1"),
    "kept_kernel": ("kernels of the first row's first query, unit energy", "1"),
    "kept_wavelet": ("their projections on their best single wavelets", "1"),
    "kept_cosine": ("|cosine| of the two", "1"),
}  # fmt: skip

PLACE = ("layer", "batch", "query_token")
DIMS = {
    "n_coefficients": ("kernel", "energy_share"),
    "dft_n_coefficients": ("kernel", "energy_share"),
    "coefficient_fraction": ("kernel", "energy_share"),
    "energy_by_level": ("kernel", "level"),
    "principal_cosine": ("angle",),
    "exponential_error": ("kernel", "n_states"),
    "n_term_error": ("kernel", "n_states"),
    **dict.fromkeys(
        ("mean_squared_cosine", "random_mean_squared_cosine", "capture_residual", "rank", "n_dead"), ()
    ),
}  # fmt: skip
CURVES = {"compaction": "coefficient", "dft_compaction": "coefficient", "energy_by_level": "level"}
KEPT = {
    "kept_kernel": ("layer", "kept", "kept_token"), "kept_wavelet": ("layer", "kept", "kept_token"),
    "kept_cosine": ("layer", "kept"),
}  # fmt: skip
ENDS = {"_low": ", lower end of the interval", "_high": ", upper end of the interval", "": ""}


def entry(name: str, values: np.ndarray) -> Entry:
    """Dimensions, values, long name and units of a variable of the result.

    >>> entry("layer_null_best_cosine", np.zeros(1))[2]
    '|cosine| with the best single wavelet (null: time-invariant layer), mean over rows, queries and kernels'
    """
    base = name.removeprefix("layer_")
    end = next(end for end in ENDS if base.endswith(end))
    prefix = next(prefix for prefix in NULL_TEXT if base.startswith(prefix))
    base = base.removesuffix(end).removeprefix(prefix)
    text, units = TEXT[base]
    text += ENDS[end] + (f" ({NULL_TEXT[prefix]})" if prefix else "")
    if name == "spike_best_cosine":
        return (), values, text, units
    if name in KEPT:
        return KEPT[name], values, text, units
    if name.startswith("layer_"):
        dims = ("layer", CURVES[base]) if base in CURVES else ("layer",)
        how = "median" if base in ("discontinuity_index", "lti_order") else "mean"
        return dims, values, f"{text}, {how} over rows, queries and kernels", units
    return (*PLACE, *DIMS.get(base, ("kernel",))), values, text, units


def title(attrs: dict[str, Any], layer: Any) -> str:
    """What a picture shows: model, layer, kernel, wavelet.

    >>> title({"model": "m", "kernel_name": "mixer", "wavelet": "haar"}, 3)
    'm, layer 3: mixer kernels, haar'
    """
    where = f"layer {layer}" if layer is not None else "all layers"
    return f"{attrs['model']}, {where}: {attrs['kernel_name']} kernels, {attrs['wavelet']}"
