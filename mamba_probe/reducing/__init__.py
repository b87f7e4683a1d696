"""Reductions of what the scans execute on a corpus, made while the model runs: `mp.reduce.mean("delta")` and others.

Each is made anew by its function here and given to `probe.reduce` (or `probe.record(..., reduce=[...])`).
"""

from collections.abc import Sequence

import numpy as np

from mamba_probe.reducing.histogram import Histogram
from mamba_probe.reducing.horizon import Horizon
from mamba_probe.reducing.moments import Mean
from mamba_probe.reducing.picture import draw
from mamba_probe.reducing.reduction import Reduction

__all__ = ["Reduction", "draw", "histogram", "horizon", "mean"]


def mean(variable: str, *, name: str | None = None, n_bootstrap: int = 200, seed: int = 0) -> Mean:
    r"""Mean and variance of a variable over the tokens of each class.

    $\bar v = \frac1n \sum_t v_t$ and $\frac1n \sum_t (v_t - \bar v)^2$, in two passes within a row and merged between
    rows by the rule of Chan, Golub and LeVeque (1979), which cancels nothing.

    Args:
        variable: of the schema, with tokens: delta, x, y, B, C, h, ...
        name: in place of the variable's in the result.
        n_bootstrap, seed: of the intervals.

    Returns:
        A reduction that gives `NAME_mean` and `NAME_variance` (class, layer, channel or head, ...), and
        `layer_NAME_mean`.

    Raises:
        ValueError: fewer than 2 replicates.

    >>> mean("delta")
    Mean('delta', name='delta', n_bootstrap=200, seed=0)
    """
    return Mean(variable, name=name, n_bootstrap=n_bootstrap, seed=seed)


def histogram(
    variable: str, *, bins: Sequence[float] | np.ndarray, name: str | None = None, n_bootstrap: int = 200, seed: int = 0
) -> Histogram:
    """Counts of a variable's values by log2: bin [e, e') counts 2^e <= v < 2^e', exactly.

    Args:
        variable: of the schema, with tokens.
        bins: increasing edges of log2, such as `np.arange(-12, 4)`. What lies outside is counted too, in `NAME_below`,
            `NAME_above` and `NAME_not_positive`.
        name: in place of the variable's in the result.
        n_bootstrap, seed: of the intervals.

    Returns:
        A reduction that gives `NAME_count` (class, layer, channel or head, ..., NAME_bin) and `layer_NAME_share`.

    Raises:
        ValueError: fewer than two edges, or some that do not increase.

    >>> histogram("delta", bins=[-1, 0, 1])
    Histogram('delta', bins=[-1.0, 0.0, 1.0], name='delta', n_bootstrap=200, seed=0)
    """
    return Histogram(variable, bins, name=name, n_bootstrap=n_bootstrap, seed=seed)


def horizon(
    level: float | str = "1/e", *, by_channel: bool = False, name: str | None = None, n_bootstrap: int = 200,
    seed: int = 0,
) -> Horizon:  # fmt: skip
    """How many tokens a write survives, by the class of the token that is written: memory_horizon, online.

    The horizon, its censoring and its null (delta at each row's mean) are those of `analyses.memory_horizon`, and of
    the class "all" so are its numbers: `layer_forward_horizon`, `layer_null_lti_horizon`, `layer_selectivity_gain`.

    Args:
        level: retention below which a write counts as forgotten: "1/e", "1/2" or a number in (0, 1).
        by_channel: count by channel or head too: classes x layers x channels x (tokens of a row + 3) x 16 bytes.
        name: before every name of the result, for a second level.
        n_bootstrap, seed: of the intervals.

    Raises:
        ValueError: a level outside (0, 1).

    >>> horizon("1/2")
    Horizon(0.5, by_channel=False, name='', n_bootstrap=200, seed=0)
    """
    return Horizon(level, by_channel=by_channel, name=name, n_bootstrap=n_bootstrap, seed=seed)
