"""The weight tables of the induction heads. Tokens are one-hot; every block's norm before it is undone."""

import math
from collections.abc import Sequence

import numpy as np

from mamba_probe.constructions.recall_and import STEEP, and_table
from mamba_probe.constructions.recall_language import EPSILON
from mamba_probe.constructions.tables import SILU_ONE, Mamba2Table, MambaTable, S4DTable, silu

__all__ = ["GAIN", "counting_s4d", "every_mamba1", "every_mamba2", "special_mamba1", "special_mamba2"]

GAIN = 2.0  # of the answer, beside the 1 that the residual gives to the token itself
GATE = 4.0  # z where the memory is read
ERASE = 40.0  # delta of a write that erases, with A = -1; elsewhere delta = e^-ERASE
SMALL = 1e-9  # delta where Mamba-2 is to keep what it holds
KEPT = 0.25  # share of the memory that the special token leaves in Mamba-2; below 1/2, so that the newest wins


def special_mamba1(n_tokens: int, special: int) -> tuple[MambaTable, list[str]]:
    """Return the weights that keep the token after `special`, and what each channel is for."""
    block, tokens, norm = (
        MambaTable.zeros(n_tokens, 2 * n_tokens, state=1, rank=1),
        np.arange(n_tokens),
        _norm(1, n_tokens),
    )
    after, one = n_tokens, n_tokens + 1
    block.in_proj_x[tokens, tokens] = block.in_proj_x[after, special] = norm
    block.in_proj_z[tokens, special] = GATE * norm
    block.conv[tokens, 0] = block.conv[after, 1] = block.conv_bias[one] = 1
    block.x_proj_dt[0, after] = block.x_proj_B[0, one] = block.x_proj_C[0, one] = 1 / SILU_ONE
    block.dt_proj[:, 0], block.dt_bias[:] = 2 * ERASE, -ERASE
    block.out_proj[tokens, tokens] = GAIN / (ERASE * SILU_ONE * silu(GATE))
    labels = [f"token {token}" for token in tokens] + [f"after token {special}", "one"]
    return block, labels + ["padding"] * (n_tokens - 2)


def special_mamba2(n_tokens: int, special: int) -> tuple[Mamba2Table, list[str]]:
    """Return the weights of one head: `special` shrinks the memory, the token after it is added; and the channels.

    What is read is so small (SMALL) that the gated norm only divides it by the square root of its epsilon.
    """
    block, norm = Mamba2Table.zeros(n_tokens, n_tokens, state=1, head=1), _norm(1, n_tokens)
    others = np.delete(np.arange(n_tokens), special)
    block.in_proj_x[others, others] = block.in_proj_B[0, special] = norm
    block.in_proj_z[others, special] = GATE * norm
    block.conv_x[others, 0] = block.conv_B[0, 1] = block.conv_C_bias[0] = 1
    keep, shrink = (math.log(math.expm1(delta)) for delta in (SMALL, -math.log(KEPT)))  # inverse softplus
    block.in_proj_dt[0, special], block.dt_bias[0] = (shrink - keep) * norm, keep
    read = SMALL * KEPT * SILU_ONE**3 * silu(GATE) / math.sqrt(EPSILON)
    block.out_proj[others, others] = GAIN / read
    labels = [f"token {token}" for token in range(n_tokens)]
    labels[special] = "padding"
    return block, labels


def every_mamba1(n_tokens: int) -> tuple[MambaTable, list[str]]:
    """Return the weights that keep, for each token, the one after its last occurrence; and what each channel is for.

    Channel (i, j) holds whether j followed i; delta is ERASE after i, e^-ERASE elsewhere.
    """
    stored, tokens = n_tokens**2, np.arange(n_tokens)
    block, norm = MambaTable.zeros(n_tokens, (n_tokens + 2) * n_tokens, state=1, rank=n_tokens), _norm(1, n_tokens)
    after, one = stored + tokens, stored + n_tokens
    for token, channels in enumerate(np.arange(stored).reshape(n_tokens, n_tokens)):
        block.in_proj_x[channels, tokens] = norm
        block.in_proj_z[channels, token] = GATE * norm
        block.dt_proj[channels, token] = 2 * ERASE
        block.out_proj[tokens, channels] = GAIN / (ERASE * SILU_ONE * silu(GATE))
    block.in_proj_x[after, tokens] = norm
    block.conv[:stored, 0] = block.conv[after, 1] = block.conv_bias[one] = 1
    block.x_proj_dt[tokens, after] = block.x_proj_B[0, one] = block.x_proj_C[0, one] = 1 / SILU_ONE
    block.dt_bias[:] = -ERASE
    labels = [f"token {token} after token {key}" for key in tokens for token in tokens]
    labels += [f"after token {token}" for token in tokens] + ["one"]
    return block, labels + ["padding"] * (n_tokens - 1)


def every_mamba2(n_tokens: int) -> tuple[list[Mamba2Table], list[str]]:
    """Return the weights of two layers, one head a token, and what each channel of the first and second is for.

    The features are the current token and, after the first layer, the previous one.
    """
    head_dim = 2 * -(-n_tokens // 2)
    layers = [Mamba2Table.zeros(2 * n_tokens, n_tokens * head_dim, state=1, head=n_tokens) for _ in range(2)]
    _shift(layers[0], n_tokens)
    _hold(layers[1], n_tokens, head_dim)
    padding = ["padding"] * (head_dim - n_tokens)
    labels = [f"previous token {token}" for token in range(n_tokens)]
    labels += ["padding"] * (n_tokens * head_dim - n_tokens)
    for key in range(n_tokens):
        labels += [f"token {token} after token {key}" for token in range(n_tokens)] + padding
    return layers, labels


def counting_s4d(n_tokens: int, keys: Sequence[int]) -> tuple[S4DTable, list[str]]:
    """Return the weights that count, for each key, how often each token came after it; and what each channel is for.

    Channel (i, j) writes where j comes after i; for a token after itself the difference is 0, and both taps are +1.
    """
    tokens, norm = np.eye(n_tokens), _norm(1, n_tokens)
    key, value = np.repeat(tokens[keys], n_tokens, axis=0), np.tile(tokens, (len(keys), 1))
    block, same = and_table(norm * key, norm * value, GAIN * value.T), (key == value).all(axis=1)
    block.in_proj_x[same], block.conv[same, 0] = STEEP * norm * key[same], 1
    return block, [f"token {token} after token {key}" for key in keys for token in range(n_tokens)]


def _shift(block: Mamba2Table, n_tokens: int) -> None:
    """Write a layer that adds the previous token's code to the features: the convolution's lag 1, past the state."""
    tokens, channel, model = np.arange(n_tokens), block.norm.size, 2 * n_tokens
    norm = _norm(1, model)
    block.in_proj_x[tokens, tokens] = norm
    block.in_proj_z[np.ix_(tokens, tokens)] = GATE * norm
    block.conv_x[tokens, 1] = 1
    block.D[0] = 1
    read = SILU_ONE * silu(GATE)
    block.out_proj[n_tokens + tokens, tokens] = _norm(read**2, channel) / read


def _hold(block: Mamba2Table, n_tokens: int, head_dim: int) -> None:
    """Write a layer whose head i keeps the token after i: delta is ERASE after i, e^-ERASE elsewhere."""
    tokens, channel, model = np.arange(n_tokens), block.norm.size, 2 * n_tokens
    norm = _norm(2, model)
    block.in_proj_dt[tokens, n_tokens + tokens], block.dt_bias[:] = 2 * ERASE * norm, -ERASE
    block.conv_B_bias[0] = block.conv_C_bias[0] = 1
    read = ERASE * SILU_ONE**3 * silu(GATE)
    for key in tokens:
        channels = key * head_dim + tokens
        block.in_proj_x[channels, tokens] = norm
        block.conv_x[channels, 0] = 1
        block.in_proj_z[channels, key] = GATE * norm
        block.out_proj[tokens, channels] = GAIN * _norm(read**2, channel) / read


def _norm(square: float, size: int) -> float:
    """Return the root mean square by which a norm divides `size` numbers whose squares sum to `square`."""
    return math.sqrt(square / size + EPSILON)
