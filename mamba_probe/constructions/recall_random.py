"""Associative recall with more keys than states: random codes of +1 and -1, answered up to chance overlaps."""

import math

import numpy as np
from jaxtyping import Float

from mamba_probe.constructions.recall_language import EPSILON
from mamba_probe.constructions.recall_tables import GATE, LOG_DECAY, WRITE
from mamba_probe.constructions.tables import INVERSE_SOFTPLUS_ONE, SILU_ONE, MambaTable, silu

__all__ = ["random_tables"]

SIGN = 2.0  # silu(1) - silu(-1) = 1, so that SIGN silu(+-1) - MEAN = +-1
MEAN = silu(1.0) + silu(-1.0)


def random_tables(
    n_keys: int, n_values: int, key_bits: int, value_bits: int, seed: int
) -> tuple[MambaTable, Float[np.ndarray, "token model"], Float[np.ndarray, "token model"], list[str]]:
    """Return the weights of the block, the embedding, lm_head, and what each channel is for.

    The features are key bits, value bits, 1 at a key, 1 at a value; the filler has none.
    """
    rng, model = np.random.default_rng(seed), key_bits + value_bits + 2
    embedding = np.zeros((n_keys + n_values, model))
    embedding[1:n_keys, :key_bits] = rng.choice([-1.0, 1.0], (n_keys - 1, key_bits))
    embedding[n_keys:, key_bits:-2] = rng.choice([-1.0, 1.0], (n_values, value_bits))
    embedding[1:n_keys, -2] = embedding[n_keys:, -1] = 1
    head = np.zeros_like(embedding)
    head[n_keys:, key_bits:-2] = embedding[n_keys:, key_bits:-2]
    head *= math.sqrt((key_bits + 1 + value_bits) / model + EPSILON)
    return _block(key_bits, value_bits), embedding, head, _labels(key_bits, value_bits)


def _block(key_bits: int, value_bits: int) -> MambaTable:
    model, keys, values = key_bits + value_bits + 2, np.arange(key_bits), np.arange(value_bits)
    block, features = MambaTable.zeros(model, 2 * model, state=key_bits, rank=1), key_bits + values
    previous, current, value = keys, key_bits + keys, 2 * key_bits + values
    after_key, at_key, at_value = 2 * key_bits + value_bits + np.arange(3)
    key_norm, value_norm = (math.sqrt((bits + 1) / model + EPSILON) for bits in (key_bits, value_bits))
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
    return block


def _labels(key_bits: int, value_bits: int) -> list[str]:
    labels = [f"{when} key bit {bit}" for when in ("previous", "current") for bit in range(key_bits)]
    labels += [f"value bit {bit}" for bit in range(value_bits)] + ["after a key", "at a key", "at a value"]
    return labels + ["padding"] * (value_bits + 1)
