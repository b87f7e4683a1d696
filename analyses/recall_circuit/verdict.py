"""Whether a layer recalls, in one sentence, by a rule that every family and kind of write can meet."""

import numpy as np

from mamba_probe.analyses.recall_circuit.asked import Asked
from mamba_probe.analyses.recall_circuit.scoring import Scores
from mamba_probe.analyses.recall_circuit.signatures import IDS

__all__ = ["RULE", "after", "is_found", "nearest_layer", "say"]

RULE = (
    "a circuit is found when S1 and S3 of the strongest layer, at their lower bounds (values, without bounds), "
    "lie nearer to 1 than to their nulls, the randomised twin's where those are higher; it matches in the state when "
    "S6 does so too, and elsewhere (in channels, gates, step sizes or decay) when S6 does not or is not defined"
)


MEANS = {
    "S1": "of all pairs the right one adds most to the answer",
    "S3": "that pair alone names the value",
    "S6": "the query's C matches its B best",
}


def after(offset: int) -> str:
    """Where a pair is written.

    >>> after(0), after(1), after(2)
    ('at the value', '1 token after the value', '2 tokens after the value')
    """
    return f"{offset} token{'s' * (offset > 1)} after the value" if offset else "at the value"


def nearest_layer(scores: Scores) -> int:
    """The layer with the largest S1, then S6, then the first."""
    pair, match = (np.nan_to_num(scores.value[IDS.index(name)], nan=-1.0) for name in ("S1", "S6"))
    return max(range(len(pair)), key=lambda i: (pair[i], match[i], -i))


def _nearer_to_one(scores: Scores, twin: Scores | None, best: int, name: str) -> bool:
    """Whether a signature, at its lower bound, is nearer to 1 than to its null; not where it is not defined."""
    row = IDS.index(name)
    value, low, null = (array[row, best] for array in (scores.value, scores.low, scores.null))
    if twin:
        null = max(null, twin.value[row, best])
    return bool((value if np.isnan(low) else low) > (1 + null) / 2)


def is_found(scores: Scores, twin: Scores | None, best: int) -> bool:
    """Whether the strongest layer shows the circuit, by `RULE`."""
    return all(_nearer_to_one(scores, twin, best, name) for name in ("S1", "S3"))


def say(scores: Scores, twin: Scores | None, best: int, layers: np.ndarray, asked: Asked) -> str:
    """What was found in the strongest layer, by `RULE`."""
    shown = [name for name in ("S1", "S3", "S6") if np.isfinite(scores.value[IDS.index(name), best])]
    parts = []
    for name in shown:
        value, null = (array[IDS.index(name), best] for array in (scores.value, scores.null))
        if twin:
            null = max(null, twin.value[IDS.index(name), best])
        parts.append(f"{MEANS[name]} ({name} {value:.2f}, null {null:.2f})")
    where = "in the state" if _nearer_to_one(scores, twin, best, "S6") else "outside the state (B and C do not tell)"
    head = f"recall circuit in layer {layers[best]}, written {after(int(scores.offset[best]))}"
    head = f"{head}, matched {where}"
    if not is_found(scores, twin, best):
        head = f"the task is solved, but no layer shows the key-value circuit; the nearest is layer {layers[best]}"
    accuracy = asked.correct.sum() / asked.query.sum()
    alone = f"; direct attribution of one of {len(layers)} layers" if len(layers) > 1 else ""
    return f"{head}: {', '.join(parts)}; accuracy {accuracy:.2f} on {asked.query.sum()} queries{alone}"
