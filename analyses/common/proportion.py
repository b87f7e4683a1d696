"""Accuracies: their intervals, and what an edit takes from them."""

import numpy as np

__all__ = ["causal_share", "wilson"]

QUANTILE = 1.959963984540054
"""Of the standard normal at 0.975: both intervals are 95 % ones."""


def wilson(successes: int, trials: int) -> tuple[float, float]:
    """95 % score interval of a proportion (Wilson 1927).

    (p + z^2/2n -+ z sqrt(p(1-p)/n + z^2/4n^2)) / (1 + z^2/n), p = successes / trials, z the normal quantile.

    Raises:
        ValueError: not 0 <= successes <= trials, or no trial.

    >>> [round(bound, 3) for bound in wilson(9, 10)]
    [0.596, 0.982]
    """
    if trials < 1 or not 0 <= successes <= trials:
        raise ValueError(f"a proportion needs 0 <= successes <= trials and a trial; got {successes} of {trials}")
    share, z2 = successes / trials, QUANTILE**2
    centre = share + z2 / (2 * trials)
    half = QUANTILE * float(np.sqrt(share * (1 - share) / trials + z2 / (4 * trials**2)))
    return max(0.0, (centre - half) / (1 + z2 / trials)), min(1.0, (centre + half) / (1 + z2 / trials))


def causal_share(intact: tuple[int, int], edited: tuple[int, int], chance: float) -> tuple[float, float, float]:
    """Share of the accuracy above chance that an edit takes away (ours), and its 95 % interval.

    share = (acc_none - acc_edit) / (acc_none - chance): 1 when the edit leaves chance, 0 when it changes nothing. The
    interval is the score interval of a difference (Newcombe 1998, method 10) over the same denominator held fixed.

    Args:
        intact: (n_correct, n_query) without an edit.
        edited: (n_correct, n_query) under the edit.
        chance: accuracy of guessing.

    Returns:
        share, low, high; NaN when the intact model does not beat chance: there is nothing to share.

    >>> causal_share((100, 100), (10, 100), 0.1)[0]
    1.0
    """
    before, after = intact[0] / intact[1], edited[0] / edited[1]
    (low_before, high_before), (low_after, high_after) = wilson(*intact), wilson(*edited)
    drop, room = before - after, before - chance
    if room <= 0:
        return float("nan"), float("nan"), float("nan")
    low = drop - float(np.hypot(before - low_before, high_after - after))
    high = drop + float(np.hypot(high_before - before, after - low_after))
    return drop / room, low / room, high / room
