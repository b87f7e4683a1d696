"""All signatures of a trace over layers and prompts: a run of tokens of one (layer, batch) in memory at a time."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import xarray as xr
from jaxtyping import Float, Int

from mamba_probe.analyses.common import Canonical, by_layer, interval
from mamba_probe.analyses.recall_circuit.core import (
    Questions,
    gated_output,
    identity_error,
    norm_scale,
    ratio,
    readout,
    relative_tap,
)
from mamba_probe.analyses.recall_circuit.features import conjunction
from mamba_probe.analyses.recall_circuit.reading import Survey, read_sums, survey
from mamba_probe.analyses.recall_circuit.signatures import ACTIVATION, IDS, absent
from mamba_probe.analyses.recall_circuit.static import LayerWeights, layer_weights
from mamba_probe.analyses.recall_circuit.stream import Stream
from mamba_probe.analyses.recall_circuit.swaps import input_error, lag_swap
from mamba_probe.analyses.recall_circuit.tally import tally

__all__ = ["Scores", "score"]

TALLIED = (*ACTIVATION, "S11_B", "S11_C", "S11_x")
"""Signatures of prompts, in the order of the tallies; the others come from weights, or weights and token features."""

RECOMPUTED = 0.05
"""Largest error of x recomputed from the mixer's input, over max |x|: what bf16 leaves, and no more."""


@dataclass(frozen=True)
class Scores:
    """Signatures by (signature, layer), at each layer's own best offset.

    Attributes:
        value, null, low, high: measured, closed-form null, 95 % interval over prompts.
        offset: the offset chosen, by the largest S1, then the largest S6, then the order given.
        taps: shares of squared convolution weight by lag, of each path that the family has.
        carried: share of the answer's logit that runs through each head, |L_{t,s*}[v*]| by head.
        matched: share of the match |C_t[n] B_s*[n]| by group and state; NaN where both are constant.
        shifted: share of B's taps' squared weight that each feature has at lag offset + 1; empty without B.
        identity: `core.identity_error` at the last scored query, the largest over prompts; empty without `out`.
    """

    value: Float[np.ndarray, "signature layer"]
    null: Float[np.ndarray, "signature layer"]
    low: Float[np.ndarray, "signature layer"]
    high: Float[np.ndarray, "signature layer"]
    offset: Int[np.ndarray, " layer"]
    taps: dict[str, Float[np.ndarray, "layer lag"]]
    carried: Float[np.ndarray, "layer head"]
    matched: Float[np.ndarray, "layer group state"]
    shifted: Float[np.ndarray, "layer feature"]
    identity: Float[np.ndarray, " layer_with_out"]


@dataclass(frozen=True)
class _Layer:
    """One layer at its best offset: tallies of every prompt, what heads and states carry, and the identity's error.

    Attributes:
        weighed: value and null of the signatures that are no sums over prompts.
    """

    tallies: Float[np.ndarray, "row kind signature part"]
    carried: Float[np.ndarray, " head"]
    matched: Float[np.ndarray, "group state"]
    identity: float | None
    offset: int
    weighed: dict[str, tuple[float, float]]
    taps: dict[str, Float[np.ndarray, " lag"]]
    shifted: Float[np.ndarray, " feature"]


def score(
    canonical: Canonical, weights: xr.Dataset, questions: dict[int, Questions], values: Int[np.ndarray, " value"],
    offsets: Sequence[int], n_bootstrap: int, seed: int,
) -> Scores:  # fmt: skip
    """Score `questions` (batch index -> its queries) in every layer."""
    rows = weights["unembedding"].isel(vocab=values).values.astype(np.float64)
    norm = weights["norm_f"].values.astype(np.float64)
    kept = weights.drop_vars("unembedding")  # the largest of all, and of no layer
    layers = by_layer(
        [canonical.trace],
        lambda i, own: _layer(canonical, i, own, questions, rows, norm, offsets, seed),
        [kept.sel(layer=[number]) for number in canonical.layers],
    )
    chosen = np.stack([one.tallies for one in layers], axis=-2)
    measured = ratio_of(chosen.sum(axis=0))
    bounds = interval(lambda draws: ratio_of(np.tensordot(draws, chosen[:, 0], axes=1)), len(chosen), n_bootstrap, seed)
    found = dict(zip(("value", "null", "low", "high"), (_spread(each) for each in (*measured, *bounds)), strict=True))
    for i, one in enumerate(layers):
        for name, (value, null) in one.weighed.items():
            found["value"][IDS.index(name), i], found["null"][IDS.index(name), i] = value, null
    found["null"][[bool(why) for why in absent(canonical.trace.attrs["family"], "u" in canonical.trace)]] = np.nan
    carried, matched = (np.array([getattr(one, of) for one in layers]) for of in ("carried", "matched"))
    return Scores(
        **found,
        offset=np.array([one.offset for one in layers]),
        taps={name: np.array([one.taps[name] for one in layers]) for name in layers[0].taps},
        carried=ratio(carried, carried.sum(axis=1, keepdims=True)),
        matched=ratio(matched, matched.sum(axis=(1, 2), keepdims=True)),
        shifted=np.array([one.shifted for one in layers]),
        identity=np.array([one.identity for one in layers if one.identity is not None]),
    )


def _shifted(static: LayerWeights, lag: int) -> Float[np.ndarray, " feature"]:
    """Share of B's taps' squared weight, over all lags, that each feature has at one lag."""
    if "B" not in static.paths:
        return np.zeros(0)
    mass = static.paths["B"].mass[:, None] * static.paths["B"].conv ** 2
    at = mass[:, lag] if lag < mass.shape[1] else np.zeros(len(mass))
    return ratio(at, mass.sum(keepdims=True)[0])


def ratio_of(tallied: Float[np.ndarray, "*any part=2"]) -> Float[np.ndarray, "*any"]:
    """Numerator over denominator of what was tallied."""
    return ratio(tallied[..., 0], tallied[..., 1])


def _spread(tallied: Float[np.ndarray, "tallied layer"]) -> Float[np.ndarray, "signature layer"]:
    """From the order of the tallies to that of all signatures, NaN for the others."""
    full = np.full((len(IDS), tallied.shape[1]), np.nan)
    full[[IDS.index(name) for name in TALLIED]] = tallied
    return full


def _best_offset(value: Float[np.ndarray, "offset kind signature"]) -> int:
    pair, match = value[:, 0, TALLIED.index("S1")], np.nan_to_num(value[:, 0, TALLIED.index("S6")])
    return max(range(len(value)), key=lambda i: (pair[i], match[i], -i))


def _layer(
    canonical: Canonical, i: int, weights: xr.Dataset, questions: dict[int, Questions],
    rows: Float[np.ndarray, "value model"], norm: Float[np.ndarray, " model"], offsets: Sequence[int], seed: int,
) -> _Layer:  # fmt: skip
    """One layer; `rows` of the unembedding, `norm` before it."""
    static = layer_weights(weights, int(canonical.layers[i]), canonical.trace.attrs["family"])
    read = readout(rows, norm, static.out_proj)
    tallies, swapped, errors = [], [], []
    for row, asked in questions.items():
        stream = Stream(canonical, i, row)
        seen = survey(stream, asked, offsets, static.out_energy)
        tallied = tally(stream, seen, read, asked, offsets, _scale(stream, seen, static, asked.query))
        tallies.append(tallied)
        swapped.append(_swapped(stream, static, asked, offsets, seed))
        if "out" in canonical.trace:
            last = int(asked.query.argmax())
            gated = gated_output(tallied.last, seen.readers[last], static.skip)
            out = stream.load("out", asked.query[[last]])[0]
            errors.append(identity_error(gated, static.out_proj, out, static.norm_groups))
    totals = [np.concatenate([one.totals, swap], axis=2) for one, swap in zip(tallies, swapped, strict=True)]
    carried, matched = (np.sum([getattr(one, of) for one in tallies], axis=0) for of in ("carried", "matched"))
    tallied = np.stack(totals, axis=1)
    best = _best_offset(ratio_of(tallied.sum(axis=1)))
    taps = {name: path.taps for name, path in static.paths.items()}
    return _Layer(
        tallied[best], carried[best], matched[best], max(errors, default=None), offsets[best],
        _of_weights(canonical, i, static, offsets[best]), taps, _shifted(static, offsets[best] + 1),
    )  # fmt: skip


def _swapped(
    stream: Stream, static: LayerWeights, asked: Questions, offsets: Sequence[int], seed: int
) -> Float[np.ndarray, "offset kind=2 path=3 part=2"]:
    """S11 of one prompt, NaN without the mixer's input.

    Raises:
        ValueError: the input and the weights do not give the recorded x.
    """
    canonical = stream.canonical
    if "u" not in canonical.trace:
        return np.full((len(offsets), 2, 3, 2), np.nan)
    both = ((stream.load("u", at), stream.load("x", at).reshape(at.stop - at.start, -1)) for at in stream.tokens())
    error = input_error(both, static.paths["x"])
    if error > RECOMPUTED:
        raise ValueError(
            f"`u` of layer {canonical.layers[stream.layer]} and the weights give an x that is {error:.2g} from the "
            "recorded one: the layer was recorded under an edit, or has a bias in in_proj. Leave `u` out of variables="
        )
    return lag_swap(lambda tokens: stream.load("u", tokens), stream.size, static.paths, asked, offsets, seed)


def _of_weights(canonical: Canonical, i: int, static: LayerWeights, offset: int) -> dict[str, tuple[float, float]]:
    """Value and null of the signatures that are no sums over prompts: S10, S12 and S13."""
    taps = {name: path.taps for name, path in static.paths.items()}
    width = len(taps["x"])
    uniform = np.full(width, 1 / width)
    if "B" in taps:
        shift = relative_tap(taps["B"], taps["x"]), relative_tap(uniform, uniform)
        return {"S10_rel": shift, "S10_C0": (float(taps["C"][0]), 1 / width)}
    at = dict(enumerate(taps["x"].tolist()))
    found = {f"S10_x{j}": (at.get(offset + j, 0.0), 1 / width) for j in (0, 1)}
    if "u" in canonical.trace and offset + 1 < width:
        values = conjunction(canonical, i, static.paths["x"], offset)
        found |= {name: (value, 0.0) for name, value in zip(("S12", "S13"), values, strict=True)}
    return found


def _scale(
    stream: Stream, seen: Survey, static: LayerWeights, queries: Int[np.ndarray, " n"]
) -> Float[np.ndarray, "n head"]:
    """The frozen scale of a gated norm at each query; one group's common scale changes no argmax and is left out."""
    if static.norm_groups < 2:
        return np.ones((len(queries), len(static.skip)))
    sums = zip(read_sums(stream, queries, seen.readers), seen.readers, strict=True)
    return np.array([norm_scale(gated_output(*each, static.skip), static.norm_groups) for each in sums])
