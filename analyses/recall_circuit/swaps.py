"""What the mixer's input does to B, C and x, lag by lag: S11 to S13. Recomputed from weights, in float64."""

from collections.abc import Callable, Iterable, Sequence

import numpy as np
from jaxtyping import Float, Int

from mamba_probe.analyses.recall_circuit.core import Questions, ratio, silu
from mamba_probe.analyses.recall_circuit.static import Path

__all__ = ["and_index", "convolved", "gate_correlation", "input_error", "lag_changes", "lag_swap"]

N_SWAPS = 8
"""Other tokens that each lag's input is replaced by."""

SWAPPED_BYTES = 2**25
"""Most bytes of features of the tokens and of those that replace them, worked on at once."""

Inputs = Callable[[Int[np.ndarray, " token"]], Float[np.ndarray, "token model"]]


def convolved(features: Float[np.ndarray, "token feature"], path: Path) -> Float[np.ndarray, "token feature"]:
    """The causal convolution before its SiLU: sum_l conv[l] features[t - l] + bias, nothing before the first token.

    >>> path = Path(None, np.array([[1.0, 10.0]]), np.zeros(1), np.ones(1))
    >>> convolved(np.array([[1.0], [2.0]]), path).ravel().tolist()
    [1.0, 12.0]
    """
    total = np.broadcast_to(path.bias, features.shape).copy()
    for lag, taps in enumerate(path.conv.T):
        total[lag:] += taps * features[: len(features) - lag]
    return total


def input_error(
    runs: Iterable[tuple[Float[np.ndarray, "token model"], Float[np.ndarray, "token feature"]]], path: Path
) -> float:
    """max |x from the mixer's input - x recorded| / max |x|: S11 to S13 hold for what was recorded, or not at all.

    Args:
        runs: the mixer's input and x, of one run of tokens after another.
        path: of x.
    """
    assert path.in_proj is not None
    kept, error, size = np.zeros((0, path.in_proj.shape[1])), 0.0, float(np.finfo(np.float64).tiny)
    for inputs, x in runs:
        seen = np.concatenate([kept, inputs])
        found = np.asarray(silu(convolved(seen @ path.in_proj.T, path)[len(kept) :]))
        error, size = max(error, float(np.abs(found - x).max())), max(size, float(np.abs(x).max()))
        kept = seen[max(0, len(seen) + 1 - path.conv.shape[1]) :].copy()
    return error / size


def lag_changes(
    inputs: Inputs, n_tokens: int, path: Path, tokens: Int[np.ndarray, " asked"], seed: int
) -> Float[np.ndarray, "asked lag"]:
    """Squared change of what `path` feeds at `tokens` when the input at one lag becomes another token's (ours).

    Summed over the same `N_SWAPS` other tokens for all lags (every one, where there are fewer), which lie at random
    distances around the prompt. `tokens` see all lags, t >= k - 1; so many at a time that what they need of the
    mixer's input fits `SWAPPED_BYTES`.

    Args:
        inputs: gives the mixer's input at some tokens, in ascending order.
        n_tokens: of the prompt.
        path: what follows.
        tokens: where it is read.
        seed: of the distances.
    """
    distances = np.random.default_rng(seed).permutation(np.arange(1, n_tokens))[:N_SWAPS]
    width = path.conv.shape[1]
    most = max(1, SWAPPED_BYTES // (8 * len(path.conv) * width * (1 + len(distances))))
    parts = [tokens[start : start + most] for start in range(0, len(tokens), most)]
    return np.concatenate([np.zeros((0, width)), *(_changes(inputs, n_tokens, path, at, distances) for at in parts)])


def _changes(
    inputs: Inputs, n_tokens: int, path: Path, tokens: Int[np.ndarray, " asked"], distances: Int[np.ndarray, " other"]
) -> Float[np.ndarray, "asked lag"]:
    """`lag_changes` of a few tokens."""
    assert path.in_proj is not None
    here = tokens - np.arange(path.conv.shape[1])[:, None]
    needed, place = np.unique(np.stack([here, *((here + by) % n_tokens for by in distances)]), return_inverse=True)
    features, (own, *others) = inputs(needed) @ path.in_proj.T, place.reshape(1 + len(distances), *here.shape)
    before = path.bias + sum(taps * features[at] for taps, at in zip(path.conv.T, own, strict=True))
    found, unmoved = np.zeros(here.T.shape), silu(before)
    for other in others:
        for lag, taps in enumerate(path.conv.T):
            change = silu(before + taps * (features[other[lag]] - features[own[lag]])) - unmoved
            read = change * path.read if path.read.ndim == 1 else change @ path.read.T
            found[:, lag] += (read**2).sum(axis=1)
    return found


def lag_swap(
    inputs: Inputs, n_tokens: int, paths: dict[str, Path], asked: Questions, offsets: Sequence[int], seed: int
) -> Float[np.ndarray, "offset kind=2 path=3 part=2"]:
    """S11 of one prompt: for B, C and x the change at the lag made for it, over the change at all lags.

    Returns:
        kind: measured, closed-form null. path: B, C, x. part: numerator, denominator; NaN for a path that is not.
    """
    found = np.full((len(offsets), 2, 3, 2), np.nan)
    for j, name in enumerate("BCx"):
        if name not in paths:
            continue
        width = paths[name].conv.shape[1]
        read = [asked.query if name == "C" else asked.pairs + offset for offset in offsets]
        read = [at[(at >= width - 1) & (at < n_tokens)] for at in read]
        every = np.unique(np.concatenate(read))
        changes = lag_changes(inputs, n_tokens, paths[name], every, seed)
        for i, (offset, at) in enumerate(zip(offsets, read, strict=True)):
            found[i, :, j] = _share(changes[np.searchsorted(every, at)].sum(axis=0), name, len(paths), offset)
    return found


def _share(
    changes: Float[np.ndarray, " lag"], name: str, n_paths: int, offset: int
) -> Float[np.ndarray, "kind=2 part=2"]:
    """S11 of one path at one offset, and its null; a query reads C, wherever its pair was written."""
    lags = {"B": [offset + 1], "C": [0], "x": [offset] + [offset + 1] * (n_paths == 1)}[name]
    lags = [lag for lag in lags if lag < len(changes)]
    return np.array([[changes[lags].sum(), changes.sum()], [len(lags) / len(changes), 1.0]])


def and_index(
    path: Path, keys: Float[np.ndarray, "key feature"], values: Float[np.ndarray, "value feature"], offset: int
) -> tuple[Float[np.ndarray, " feature"], Float[np.ndarray, " feature"], Float[np.ndarray, "key feature"]]:
    """S12: does a channel write only where its key is followed by its value (ours)?

    (x11 - x10 - x01 + x00) / (|x11 - x00| + |x10 - x00| + |x01 - x00|), where x sees the channel's best key at lag
    `offset` + 1 and its best value at lag `offset`, each there (1) or no input (0). 1: both or nothing; 0: they add up.

    Args:
        path: of x.
        keys, values: in_proj times the mixer's input at each key and value.
        offset: tokens between a value and the write of its pair; `offset` + 1 below the convolution's width.

    Returns:
        The index; the weight of each channel, |W_out|^2 x11^2; x of each key before the channel's best value.

    >>> path = Path(None, np.ones((1, 2)), np.array([-30.0]), np.ones(1))
    >>> and_index(path, np.full((1, 1), 20.0), np.full((1, 1), 20.0), 0)[0].round(3).tolist()
    [1.0]
    """
    given = {"key": path.conv[:, offset + 1] * keys, "value": path.conv[:, offset] * values}
    best = {name: each.max(axis=0) for name, each in given.items()}  # silu(a + b) is largest where a and b are
    both, key, value, neither = (
        np.asarray(silu(path.bias + part)) for part in (best["key"] + best["value"], best["key"], best["value"], 0.0)
    )
    spread = abs(both - neither) + abs(key - neither) + abs(value - neither)
    written = np.asarray(silu(path.bias + given["key"] + best["value"]))
    return ratio(both - key - value + neither, spread), path.mass * both**2, written


def gate_correlation(
    written: Float[np.ndarray, "key feature"], gate: Float[np.ndarray, "key feature"]
) -> Float[np.ndarray, " feature"]:
    """S13: a channel's correlation, over the keys, of what it writes with its gate when the key is asked for (ours).

    NaN where one of them is the same for all keys.

    >>> gate_correlation(np.array([[0.0], [1.0]]), np.array([[0.0], [4.0]])).round(6).tolist()
    [1.0]
    """
    centred = [each - each.mean(axis=0) for each in (written, gate)]
    norms = [np.sqrt((each**2).sum(axis=0)) for each in centred]
    return ratio((centred[0] * centred[1]).sum(axis=0), norms[0] * norms[1])
