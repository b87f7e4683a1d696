"""Associative recall with more keys than states: random codes of +1 and -1, answered up to chance overlaps."""

import math
from collections.abc import Callable

import numpy as np
from jaxtyping import Float
from scipy.special import lambertw

from mamba_probe.constructions.recall_and import and_table
from mamba_probe.constructions.recall_language import EPSILON
from mamba_probe.constructions.recall_tables import GATE, LOG_DECAY, WRITE
from mamba_probe.constructions.tables import INVERSE_SOFTPLUS_ONE, SILU_ONE, Mamba2Table, MambaTable, Table, silu

__all__ = ["random_codes", "random_tables"]

SIGN = 2.0  # silu(1) - silu(-1) = 1, so that SIGN silu(+-1) - MEAN = +-1
MEAN = silu(1.0) + silu(-1.0)
LEAST = float(lambertw(1 / math.e).real)  # silu is least, -LEAST, at -1 - LEAST

Block = tuple[Table, list[str]]


def random_codes(
    n_keys: int, n_values: int, key_bits: int, value_bits: int, seed: int, balanced: bool
) -> Float[np.ndarray, "token model"]:
    """Return the embedding: key bits, value bits, 1 at a key, 1 at a value; the filler has none.

    Balanced keys have as many +1 as -1.
    """
    rng, model = np.random.default_rng(seed), key_bits + value_bits + 2
    embedding = np.zeros((n_keys + n_values, model))
    if balanced:
        halves = np.tile(np.repeat([1.0, -1.0], key_bits // 2), (n_keys - 1, 1))
        embedding[1:n_keys, :key_bits] = rng.permuted(halves, axis=1)
    else:
        embedding[1:n_keys, :key_bits] = rng.choice([-1.0, 1.0], (n_keys - 1, key_bits))
    embedding[n_keys:, key_bits:-2] = rng.choice([-1.0, 1.0], (n_values, value_bits))
    embedding[1:n_keys, -2] = embedding[n_keys:, -1] = 1
    return embedding


def random_tables(
    mixer: str, n_keys: int, n_values: int, key_bits: int, value_bits: int, seed: int
) -> tuple[Table, Float[np.ndarray, "token model"], Float[np.ndarray, "token model"], list[str]]:
    """Return the weights of the block, the embedding, lm_head, and what each channel is for."""
    embedding = random_codes(n_keys, n_values, key_bits, value_bits, seed, balanced=mixer == "mamba2")
    head = np.zeros_like(embedding)
    head[n_keys:, key_bits:-2] = embedding[n_keys:, key_bits:-2]
    head *= math.sqrt((key_bits + 1 + value_bits) / embedding.shape[1] + EPSILON)
    block, labels = BLOCKS[mixer](key_bits, value_bits)
    return block, embedding, head, labels


def mamba1(key_bits: int, value_bits: int) -> Block:
    """B, C and the output subtract the mean of silu(+-1), which the flags of a key and a value give."""
    model, keys, values = key_bits + value_bits + 2, np.arange(key_bits), np.arange(value_bits)
    block, features = MambaTable.zeros(model, 2 * model, state=key_bits, rank=1), key_bits + values
    previous, current, value = keys, key_bits + keys, 2 * key_bits + values
    after_key, at_key, at_value = 2 * key_bits + value_bits + np.arange(3)
    key_norm, value_norm = _norms(key_bits, value_bits)
    block.in_proj_x[previous, keys] = block.in_proj_x[current, keys] = key_norm
    block.in_proj_x[[after_key, at_key], -2] = key_norm
    block.in_proj_x[value, features] = block.in_proj_x[at_value, -1] = value_norm
    block.in_proj_z[value, -2] = block.in_proj_z[at_value, -2] = GATE * key_norm
    block.conv[previous, 1] = block.conv[after_key, 1] = 1
    block.conv[current, 0] = block.conv[at_key, 0] = block.conv[value, 0] = block.conv[at_value, 0] = 1
    block.x_proj_dt[0, at_value] = 1 / SILU_ONE
    block.x_proj_B[keys, previous] = block.x_proj_C[keys, current] = SIGN
    block.x_proj_B[:, after_key] = block.x_proj_C[:, at_key] = -MEAN / SILU_ONE
    block.dt_proj[:, 0], block.dt_bias[:] = WRITE, INVERSE_SOFTPLUS_ONE - WRITE
    block.A_log[:] = LOG_DECAY
    block.out_proj[features, value] = SIGN / (silu(GATE) * key_bits)
    block.out_proj[features, at_value] = -MEAN / SILU_ONE / (silu(GATE) * key_bits)
    labels = [f"{when} key bit {bit}" for when in ("previous", "current") for bit in range(key_bits)]
    labels += [f"value bit {bit}" for bit in range(value_bits)] + ["after a key", "at a key", "at a value"]
    return block, labels + ["padding"] * (value_bits + 1)


def mamba2(key_bits: int, value_bits: int) -> Block:
    """Balanced keys overlap by <C, B> = N MEAN^2 / 4 + <phi, phi'> / 4, of which one more state takes the first off."""
    model, keys, values = key_bits + value_bits + 2, np.arange(key_bits), np.arange(value_bits)
    block, features = Mamba2Table.zeros(model, model, state=key_bits + 1, head=1), key_bits + values
    key_norm, value_norm = _norms(key_bits, value_bits)
    block.in_proj_B[keys, keys] = block.in_proj_C[keys, keys] = key_norm
    block.in_proj_B[-1, -2] = _inverse_silu(key_bits * MEAN**2 / (4 * LEAST)) * key_norm
    block.in_proj_C[-1, -2] = -(1 + LEAST) * key_norm
    block.in_proj_x[values, features] = block.in_proj_x[value_bits, -1] = value_norm
    block.in_proj_z[: value_bits + 1, -2] = GATE * key_norm
    block.in_proj_dt[0, -1] = WRITE * value_norm
    block.conv_B[:, 1] = block.conv_C[:, 0] = block.conv_x[: value_bits + 1, 0] = 1
    block.dt_bias[:], block.A_log[:] = INVERSE_SOFTPLUS_ONE - WRITE, LOG_DECAY
    read = silu(GATE) * key_bits / 4
    square = value_bits * (silu(1.0) ** 2 + silu(-1.0) ** 2) / 2 + SILU_ONE**2  # of a value read alone, balanced
    root_mean_square = math.sqrt(read**2 * square / model + EPSILON)
    block.out_proj[features, values] = SIGN * root_mean_square / read
    block.out_proj[features, value_bits] = -MEAN / SILU_ONE * root_mean_square / read
    labels = [f"value bit {bit}" for bit in range(value_bits)] + ["at a value"]
    return block, labels + ["padding"] * (key_bits + 1)


def s4d(key_bits: int, value_bits: int) -> Block:
    """A channel for each sign of a key bit and of a value bit, read where the key bit has that sign.

    Their difference is (N + <phi, phi'>) / 2 times the value; a channel for each sign of a value bit, which any key
    writes and reads, takes N / 2 off.
    """
    model, (plus, minus) = key_bits + value_bits + 2, (1, -1)
    is_key, is_value = np.eye(model)[-2:]
    key_norm, value_norm = _norms(key_bits, value_bits)
    keys = [(is_key + sign * np.eye(model)[bit]) / 2 for bit in range(key_bits) for sign in (plus, minus)]
    bits = key_bits + np.repeat(np.arange(value_bits), 2)
    signs = np.tile([[1.0], [-1.0]], (value_bits, 1))
    values, written = (is_value + signs * np.eye(model)[bits]) / 2, signs * np.eye(model)[bits]
    key = np.repeat([*keys, is_key], 2 * value_bits, axis=0)
    weight = np.repeat([*np.full(2 * key_bits, 2 / key_bits), -1.0], 2 * value_bits)
    value, out = (np.tile(rows, (2 * key_bits + 1, 1)) for rows in (values, written))
    block = and_table(key_norm * key, value_norm * value, weight * out.T)
    labels = [f"signs of key bit and value bit [{a}, {b}]" for a in range(2 * key_bits) for b in range(2 * value_bits)]
    return block, labels + [f"any key and sign of value bit [{b}]" for b in range(2 * value_bits)]


BLOCKS: dict[str, Callable[[int, int], Block]] = {"mamba1": mamba1, "mamba2": mamba2, "s4d": s4d}


def _norms(key_bits: int, value_bits: int) -> tuple[float, float]:
    """Return the root mean squares of a key's and of a value's embedding."""
    model = key_bits + value_bits + 2
    key, value = (math.sqrt((bits + 1) / model + EPSILON) for bits in (key_bits, value_bits))
    return key, value


def _inverse_silu(value: float) -> float:
    """Return a > 0 with silu(a) = `value` > 0: value + W(value exp(-value)), W Lambert's function."""
    return value + float(lambertw(value * math.exp(-value)).real)
