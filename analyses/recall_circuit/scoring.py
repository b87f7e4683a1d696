"""All signatures of a trace over layers and prompts: one (layer, batch) block in memory at a time."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import xarray as xr
from jaxtyping import Float, Int

from mamba_probe.analyses.common import Canonical, interval
from mamba_probe.analyses.recall_circuit.core import (
    Prompt,
    Questions,
    gated_output,
    identity_error,
    norm_scale,
    ratio,
    readout,
    relative_tap,
    tally,
)
from mamba_probe.analyses.recall_circuit.signatures import ACTIVATION
from mamba_probe.analyses.recall_circuit.static import LayerWeights, layer_weights

__all__ = ["Scores", "score"]


@dataclass(frozen=True)
class Scores:
    """Signatures by (signature, layer), at each layer's own best offset.

    Attributes:
        value, null, low, high: measured, closed-form null, 95 % interval over prompts.
        offset: the offset chosen, by the largest S1, then the largest S6, then the order given.
        taps: m_B, m_C, m_x.
        identity: `core.identity_error` at the last scored query, the largest over prompts; empty without `out`.
    """

    value: Float[np.ndarray, "signature layer"]
    null: Float[np.ndarray, "signature layer"]
    low: Float[np.ndarray, "signature layer"]
    high: Float[np.ndarray, "signature layer"]
    offset: Int[np.ndarray, " layer"]
    taps: Float[np.ndarray, "path=3 layer lag"]
    identity: Float[np.ndarray, " layer_with_out"]


def score(
    canonical: Canonical, weights: xr.Dataset, questions: dict[int, Questions], values: Int[np.ndarray, " value"],
    offsets: Sequence[int], n_bootstrap: int, seed: int,
) -> Scores:  # fmt: skip
    """Score `questions` (batch index -> its queries) in every layer."""
    layers = [
        _layer(
            canonical,
            i,
            layer_weights(weights, int(layer), canonical.trace.attrs["family"]),
            weights,
            questions,
            values,
            offsets,
        )
        for i, layer in enumerate(canonical.layers)
    ]
    tallies = np.stack([layer[0] for layer in layers])
    best = [_best_offset(ratio_of(one.sum(axis=1))) for one in tallies]
    chosen = np.stack([one[i] for one, i in zip(tallies, best, strict=True)], axis=-2)
    value, null = ratio_of(chosen.sum(axis=0))
    low, high = interval(
        lambda draws: ratio_of(np.tensordot(draws, chosen[:, 0], axes=1)), len(chosen), n_bootstrap, seed
    )
    taps = np.stack([layer[1] for layer in layers], axis=1)
    uniform = np.full(taps.shape[-1], 1 / taps.shape[-1])
    shift = [relative_tap(one[0], one[2]) for one in taps.transpose(1, 0, 2)]
    unknown = np.full((2, len(layers)), np.nan)
    return Scores(
        np.vstack([value, shift, taps[1, :, 0]]),
        np.vstack([null, np.full(len(layers), relative_tap(uniform, uniform)), np.full(len(layers), uniform[0])]),
        np.vstack([low, unknown]), np.vstack([high, unknown]),
        np.array([offsets[i] for i in best]), taps, np.array([layer[2] for layer in layers if layer[2] is not None]),
    )  # fmt: skip


def ratio_of(tallied: Float[np.ndarray, "*any part=2"]) -> Float[np.ndarray, "*any"]:
    """Numerator over denominator of what was tallied."""
    return ratio(tallied[..., 0], tallied[..., 1])


def _best_offset(value: Float[np.ndarray, "offset kind signature"]) -> int:
    pair, match = value[:, 0, ACTIVATION.index("S1")], value[:, 0, ACTIVATION.index("S6")]
    return max(range(len(value)), key=lambda i: (pair[i], match[i], -i))


def _layer(
    canonical: Canonical, i: int, static: LayerWeights, weights: xr.Dataset, questions: dict[int, Questions],
    values: Int[np.ndarray, " value"], offsets: Sequence[int],
) -> tuple[Float[np.ndarray, "offset row kind signature part"], Float[np.ndarray, "3 lag"], float | None]:  # fmt: skip
    """Tallies, tap masses and the identity's error of one layer."""
    rows = weights["unembedding"].isel(vocab=values).values.astype(np.float64)
    read = readout(rows, weights["norm_f"].values.astype(np.float64), static.out_proj)
    tallies, errors = [], []
    for row, asked in questions.items():
        prompt = _prompt(canonical, i, row)
        scale = _scale(prompt, static, asked.query)
        tallies.append([tally(prompt, read, static.out_energy, asked, offset, scale) for offset in offsets])
        if "out" in canonical.trace:
            last, out = int(asked.query.max()), canonical.load("out", i, row)
            gated = gated_output(prompt, static.skip, last)
            errors.append(identity_error(gated, static.out_proj, out[last], static.norm_groups))
    return np.stack(tallies, axis=1), static.taps, max(errors, default=None)


def _prompt(canonical: Canonical, layer: int, row: int) -> Prompt:
    """One block of the trace, valid tokens only, in float64."""
    step, (B, C) = canonical.row(layer, row), canonical.selection(layer, row)
    shape = (*step.delta.shape, -1)
    x, z = (canonical.load(name, layer, row).reshape(shape) for name in ("x", "z"))
    return Prompt(step.delta, step.cumulative, canonical.matrix(layer), B, C, x, z, canonical.zoh)


def _scale(prompt: Prompt, static: LayerWeights, queries: Int[np.ndarray, " n"]) -> Float[np.ndarray, "n head"]:
    """The frozen scale of a gated norm at each query; one group's common scale changes no argmax and is left out."""
    if static.norm_groups < 2:
        return np.ones((len(queries), len(static.skip)))
    return np.array([norm_scale(gated_output(prompt, static.skip, int(t)), static.norm_groups) for t in queries])
