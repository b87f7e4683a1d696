"""From a task trace to the recall circuit's signatures, against their nulls, gated on accuracy."""

from collections.abc import Sequence

import numpy as np
import xarray as xr
from jaxtyping import Bool, Int

from mamba_probe.analyses.common import Canonical, described
from mamba_probe.analyses.common.proportion import causal_share, wilson
from mamba_probe.analyses.common.result import Entry
from mamba_probe.analyses.recall_circuit.asked import Asked, no_task, read_task
from mamba_probe.analyses.recall_circuit.scoring import Scores, score
from mamba_probe.analyses.recall_circuit.signatures import IDS, SIGNATURES, absent, ideals
from mamba_probe.analyses.recall_circuit.static import check_weights
from mamba_probe.analyses.recall_circuit.verdict import RULE, is_found, nearest_layer, say
from mamba_probe.trace import require

__all__ = ["measure"]

GATE = 0.5
"""A circuit is scored only when the accuracy's lower 95 % bound is above this."""
LAYERED = ("signature", "layer")


def measure(
    trace: xr.Dataset, *, weights: xr.Dataset | None = None, interventions: xr.Dataset | None = None,
    baseline: object = None, offsets: Sequence[int] = (0, 1, 2), n_bootstrap: int = 200, seed: int = 0,
    values: Sequence[int] | None = None,
) -> xr.Dataset:  # fmt: skip
    """Signatures of the circuit that writes key-value pairs into the state and reads them back (ours).

    A source s adds o_{t,s} = W_out[SiLU(z_t) x_s delta_s sum_n C_t B_s exp(A Cum(s,t))] to the mixer's output at a
    query t, and L_{t,s} = (U norm_f) . o_{t,s} to the logits, centred over the values; sum_s o_{t,s} + D path = output.
    That is direct attribution: the last norm (and a gated norm) is frozen, and the path runs past later layers. A
    network may write a pair some tokens late, so candidate writes are the value tokens plus an offset, the best of
    `offsets` in each layer. Only queries answered correctly are scored, and none when the lower 95 % (Wilson) bound of
    the accuracy is at most 0.5.

    Args:
        trace: of a task (coordinates role, target, source_token, prediction) with delta, A, B, C, x, z; with `out`, the
            identity above is measured too; with `u`, also S11 to S13. Without task roles the result only says so.
        weights: `probe.weights()` of a language model.
        interventions: `probe.intervene(...)`: n_correct and n_query by intervention, "none" among them.
        baseline: (trace, weights) of a randomised twin, scored on all its queries.
        offsets: tokens between a value and the write of its pair.
        n_bootstrap: draws of prompts for the 95 % intervals.
        seed: of the draws.
        values: token ids a query may have to name; None: the targets that occur.

    Returns:
        value, null, low, high (signature, layer) [and baseline], with coordinates label, ideal and absent (why a
        signature is NaN); offset, strongest (layer) [and baseline_offset, identity_error]; carried (layer, channel or
        head), matched (layer, group, state; not S4D), shifted (layer, channel; Mamba-1); tap_mass_B, tap_mass_C,
        tap_mass_x (layer, lag; S4D: x); causal_share, causal_low, causal_high, causal_accuracy (intervention); scalars
        solved, found, accuracy, accuracy_low, accuracy_high, n_query, n_correct,
        n_scored, n_values, chance. The answer in one sentence: attrs["verdict"]. See `distance` and `diagram`.

    Raises:
        ValueError: something was not recorded, does not fit, or is not of this model; the message says what to do.

    >>> trace = xr.Dataset({"delta": (("layer", "batch", "token", "channel"), np.ones((1, 1, 2, 1)))},
    ...     {"layer": [0], "valid": (("batch", "token"), [[True, True]]), "position": (("batch", "token"), [[0, 1]])},
    ...     {"schema_version": 1, "family": "mamba"})
    >>> measure(trace).verdict[:8]
    'no task:'
    """
    scanned = _check_options(offsets, n_bootstrap)
    unasked = no_task(trace)
    if unasked:
        require(trace, "delta", "layer")
        return _unsolved(f"no task: {unasked}", trace, trace["layer"].values, None, scanned)
    canonical, loaded, asked = _prepare(trace, weights, values)
    _check_interventions(interventions, trace)
    low = wilson(int(asked.correct.sum()), int(asked.query.sum()))[0]
    if low <= GATE:
        share = asked.correct.sum() / asked.query.sum()
        verdict = f"no circuit: accuracy {share:.2f}, lower bound {low:.2f} <= .5: the model does not solve the task"
        return _unsolved(verdict, trace, canonical.layers, asked, scanned, interventions)
    scores, n_scored = _score(canonical, loaded, asked, asked.correct, scanned, n_bootstrap, seed)
    twin = _twin(baseline, canonical, scanned, seed, values)
    return _result(canonical, asked, scores, twin, n_scored, scanned, interventions)


def _check_options(offsets: Sequence[int], n_bootstrap: int) -> tuple[int, ...]:
    scanned = tuple(int(offset) for offset in offsets)
    if not scanned or min(scanned) < 0 or len(set(scanned)) < len(scanned) or scanned != tuple(offsets):
        raise ValueError(f"`offsets` must be distinct integers of at least 0, and one at least; got {tuple(offsets)}")
    if n_bootstrap < 2:
        raise ValueError(f"n_bootstrap must be at least 2; got {n_bootstrap}")
    return scanned


def _prepare(
    trace: xr.Dataset, weights: xr.Dataset | None, values: Sequence[int] | None
) -> tuple[Canonical, xr.Dataset, Asked]:
    canonical = Canonical(trace, "delta", "A", "B", "C", "x", "z")
    asked = read_task(canonical, None if values is None else np.asarray(values))
    checked = check_weights(weights, canonical)
    if asked.values.max() >= checked.sizes["vocab"] or asked.values.min() < 0:
        raise ValueError(
            f"values must be token ids below the {checked.sizes['vocab']} of `unembedding`; "
            f"got {asked.values.min()} .. {asked.values.max()}"
        )
    return canonical, checked, asked


def _score(
    canonical: Canonical, weights: xr.Dataset, asked: Asked, which: Bool[np.ndarray, "batch token"],
    offsets: tuple[int, ...], n_bootstrap: int, seed: int,
) -> tuple[Scores, int]:  # fmt: skip
    """Scores of the queries in `which`, and how many there were; prompts without one are left out."""
    each = {row: asked.questions(canonical, row, which, max(offsets)) for row in range(canonical.n_rows)}
    each = {row: questions for row, questions in each.items() if len(questions.query)}
    if not each:
        raise ValueError(
            f"no query has two candidate writes before it at offset {max(offsets)}: "
            "use a task with more pairs or smaller offsets"
        )
    n_scored = sum(len(questions.query) for questions in each.values())
    return score(canonical, weights, each, asked.values, offsets, n_bootstrap, seed), n_scored


def _twin(
    baseline: object, canonical: Canonical, offsets: tuple[int, ...], seed: int, values: Sequence[int] | None
) -> Scores | None:
    """Scores of a randomised twin on all its queries: it need not solve the task."""
    if baseline is None:
        return None
    if not (isinstance(baseline, tuple) and len(baseline) == 2):
        raise ValueError(f"baseline must be (trace, weights) of a randomised twin; got {type(baseline).__name__}")
    if not all(isinstance(part, xr.Dataset) for part in baseline):
        kinds = ", ".join(type(part).__name__ for part in baseline)
        raise ValueError(f"baseline must be (trace, weights), two Datasets; got ({kinds})")
    own = canonical.trace.attrs.get("model_hash")
    if own and own == baseline[0].attrs.get("model_hash"):
        raise ValueError("baseline is a recording of the model itself; pass one of a randomised twin")
    unasked = no_task(baseline[0])
    if unasked:
        raise ValueError(f"the baseline needs the same task: {unasked}")
    other, weights, asked = _prepare(*baseline, values)
    if other.layers.tolist() != canonical.layers.tolist():
        raise ValueError(f"baseline has layers {other.layers.tolist()}; the trace has {canonical.layers.tolist()}")
    return _score(other, weights, asked, asked.query, offsets, 2, seed)[0]


def _check_interventions(interventions: xr.Dataset | None, trace: xr.Dataset) -> None:
    if interventions is None:
        return
    missing = [name for name in ("n_correct", "n_query", "intervention") if name not in interventions.variables]
    if missing or "none" not in interventions["intervention"].values.tolist():
        lack = ", ".join(missing) or 'the intervention "none"'
        raise ValueError(f"interventions lack {lack}; pass what probe.intervene(task, edits) returned")
    for name in ("model_hash", "task_params"):
        ours, theirs = trace.attrs.get(name), interventions.attrs.get(name)
        if ours and theirs and ours != theirs:
            raise ValueError(
                f"interventions are of another {name.split('_')[0]} than the trace: {theirs} against {ours}"
            )


def _causal(interventions: xr.Dataset | None, chance: float, solved: bool) -> dict[str, Entry]:
    if interventions is None:
        return {}
    edits = interventions.sel(intervention=[name for name in interventions["intervention"].values if name != "none"])
    counts = np.stack([edits["n_correct"].values, edits["n_query"].values], axis=-1).astype(int)
    right, total = (int(interventions[name].sel(intervention="none")) for name in ("n_correct", "n_query"))
    nothing = (np.nan,) * 3
    found = [causal_share((right, total), (int(n), int(of)), chance) if solved else nothing for n, of in counts]
    shares = np.array(found).reshape(-1, 3)
    along = ("intervention",)
    return {
        "causal_share": (along, shares[:, 0], "share of the accuracy above chance that the edit takes away", "1"),
        "causal_low": (along, shares[:, 1], "lower 95 % bound of causal_share", "1"),
        "causal_high": (along, shares[:, 2], "upper 95 % bound of causal_share", "1"),
        "causal_accuracy": (along, counts[:, 0] / counts[:, 1], "accuracy under the edit", "1"),
    }


def _accuracy(asked: Asked | None, solved: bool, n_scored: int, found: bool = False) -> dict[str, Entry]:
    """Scalars: the gate and what stands behind it."""
    right, total = (int(asked.correct.sum()), int(asked.query.sum())) if asked else (0, 0)
    low, high = wilson(right, total) if total else (np.nan, np.nan)
    n_values = len(asked.values) if asked else 0
    scalars = {
        "solved": (solved, "lower bound of the accuracy above 0.5"),
        "found": (found, "whether the strongest layer shows the circuit, by verdict_rule"),
        "accuracy": (right / total if total else np.nan, "share of queries answered correctly"),
        "accuracy_low": (low, "lower 95 % Wilson bound of the accuracy"),
        "accuracy_high": (high, "upper 95 % Wilson bound of the accuracy"),
        "n_query": (total, "queries"),
        "n_correct": (right, "queries answered correctly"),
        "n_scored": (n_scored, "correct queries with at least two candidate writes at every offset"),
        "n_values": (n_values, "values a query may have to name"),
        "chance": (1 / n_values if n_values else np.nan, "accuracy of guessing a value"),
    }
    return {name: ((), np.array(value), text, "1") for name, (value, text) in scalars.items()}


def _layered(arrays: dict[str, np.ndarray]) -> dict[str, Entry]:
    text = {
        "value": "signature at the layer's best offset",
        "null": "closed-form chance value of the signature",
        "low": "lower 95 % bound of value over prompts",
        "high": "upper 95 % bound of value over prompts",
        "baseline": "signature of the randomised twin, all its queries, at its own best offset",
    }
    return {name: (LAYERED, array, text[name], "1") for name, array in arrays.items()}


def _parts(scores: Scores, canonical: Canonical) -> dict[str, Entry]:
    """Which heads carry the answer, which states match, and (Mamba-1) which channels bring the key to B."""
    head, family = canonical.head_dim, canonical.trace.attrs["family"]
    entries: dict[str, Entry] = {
        "carried": (("layer", head), scores.carried, "share of |L_{t,s*}[v*]| that runs through it", "1")
    }
    if family != "s4d":
        text = "share of the match, sum over queries of |C_t[n] B_s*[n]|"
        entries["matched"] = (("layer", "group", "state"), scores.matched, text, "1")
    if family == "mamba":
        text = "share of B's squared taps that is the channel's, at lag offset + 1"
        entries["shifted"] = (("layer", head), scores.shifted, text, "1")
    return entries


def _offsets(offset: Int[np.ndarray, " layer"], strongest: Bool[np.ndarray, " layer"]) -> dict[str, Entry]:
    return {
        "offset": (("layer",), offset, "tokens between a value and the write of its pair; -1: none", "token"),
        "strongest": (("layer",), strongest, "the layer with the largest S1 (then S6)", "1"),
    }


def _unsolved(
    verdict: str,
    trace: xr.Dataset,
    layers: np.ndarray,
    asked: Asked | None,
    offsets: tuple[int, ...],
    interventions: xr.Dataset | None = None,
) -> xr.Dataset:
    """A result that says that there is no circuit to score: every signature NaN."""
    nothing = {name: np.full((len(IDS), len(layers)), np.nan) for name in ("value", "null", "low", "high")}
    accuracy = _accuracy(asked, False, 0)
    entries = _layered(nothing) | _offsets(np.full(len(layers), -1), np.zeros(len(layers), bool)) | accuracy
    entries |= _causal(interventions, float(accuracy["chance"][1]), solved=False)
    return described(
        entries, _coords(trace, layers, interventions), _attrs(trace, verdict, offsets, interventions, None, True)
    )


def _result(
    canonical: Canonical, asked: Asked, scores: Scores, twin: Scores | None, n_scored: int, offsets: tuple[int, ...],
    interventions: xr.Dataset | None,
) -> xr.Dataset:  # fmt: skip
    arrays = {"value": scores.value, "null": scores.null, "low": scores.low, "high": scores.high}
    best = nearest_layer(scores)
    entries = _layered(arrays | ({"baseline": twin.value} if twin else {}))
    entries |= _offsets(scores.offset, np.arange(len(canonical.layers)) == best)
    entries |= _accuracy(asked, True, n_scored, is_found(scores, twin, best))
    for name, mass in scores.taps.items():
        entries[f"tap_mass_{name}"] = (
            ("layer", "lag"),
            mass,
            f"share of squared convolution weight that feeds {name}",
            "1",
        )
    entries |= _parts(scores, canonical)
    if twin:
        entries["baseline_offset"] = (("layer",), twin.offset, "best offset of the randomised twin", "token")
    if len(scores.identity):
        text = "largest error of sum_s o_{t,s} + D path = out at the last scored query of each prompt, over max |out|"
        entries["identity_error"] = (("layer",), scores.identity, text, "1")
    entries |= _causal(interventions, 1 / len(asked.values), solved=True)
    verdict = say(scores, twin, best, canonical.layers, asked)
    attrs = _attrs(canonical.trace, verdict, offsets, interventions, twin, bool(np.isnan(scores.low[0]).all()))
    return described(entries, _coords(canonical.trace, canonical.layers, interventions, canonical), attrs)


def _coords(
    trace: xr.Dataset, layers: np.ndarray, interventions: xr.Dataset | None, canonical: Canonical | None = None
) -> dict[str, object]:
    family = trace.attrs["family"]
    coords: dict[str, object] = {
        "layer": layers,
        "signature": list(IDS),
        "label": ("signature", [signature.label for signature in SIGNATURES]),
        "ideal": ("signature", ideals(family)),
        "absent": ("signature", absent(family, "u" in trace)),
    }
    if canonical is not None:
        coords[canonical.head_dim] = canonical.heads
    if interventions is not None:
        names = interventions["intervention"].values.tolist()
        coords["intervention"] = [name for name in names if name != "none"]
    return coords


def _attrs(
    trace: xr.Dataset, verdict: str, offsets: tuple[int, ...], interventions: xr.Dataset | None, twin: Scores | None,
    unbounded: bool,
) -> dict[str, str]:  # fmt: skip
    without = absent(trace.attrs["family"], "u" in trace)
    measured = [signature for signature, why in zip(SIGNATURES, without, strict=True) if not why]
    reasons = {why: ", ".join(s.id for s, w in zip(SIGNATURES, without, strict=True) if w == why) for why in without}
    shares = (
        "(acc_none - acc_edit) / (acc_none - chance), chance = 1 / values; Newcombe 95 % interval, denominator fixed"
    )
    return {
        "analysis": "recall_circuit",
        "family": trace.attrs["family"],
        "model": str(trace.attrs.get("model", "")),
        "verdict": verdict,
        "verdict_rule": RULE,
        "estimator": "; ".join(f"{s.id}: {s.estimator}" for s in measured),
        "absent": "; ".join(f"{names}: {why}" for why, names in reasons.items() if why),
        "null": "closed form, before the choice of the offset. " + "; ".join(f"{s.id}: {s.null}" for s in measured),
        "baseline_estimator": "randomised twin, all queries, own best offset" if twin else "none given",
        "interval": "none: fewer than two scored prompts" if unbounded else
        "95 %, percentiles of a bootstrap over prompts, offset held at its choice; S10, S12 and S13 have none",
        "reduces_over": "S1 to S6: correct queries; S7, S8, S9: valid tokens of the scored prompts; S11: writes and "
        "queries of those prompts; S12, S13: the keys and values of the task; all channels",
        "offset_choice": f"best of {', '.join(map(str, offsets))} in each layer: largest S1, then S6, then the first",
        "path": "direct attribution of each layer alone: W_out, then norm_f and unembedding; norms frozen at their "
        "scale (epsilon left out), a gated norm's weight multiplies W_out; what later layers make of it is not "
        "followed; S5, S6: groups of B and C are further states",
        "causal_estimator": "none: interventions=probe.intervene(task, edits)" if interventions is None else shares,
    }  # fmt: skip
