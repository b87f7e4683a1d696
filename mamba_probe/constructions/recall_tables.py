"""The weight tables of associative recall: previous token's key to B, current token's key to C, value to x."""

import math

import numpy as np

from mamba_probe.constructions.recall_codes import Codes
from mamba_probe.constructions.recall_language import EPSILON
from mamba_probe.constructions.tables import INVERSE_SOFTPLUS_ONE, SILU_ONE, Mamba2Table, MambaTable, silu

__all__ = ["GATE", "LOG_DECAY", "WRITE", "mamba1_table", "mamba2_table", "norms_of", "overwrite_table"]

GATE = 4.0  # z at a key token
WRITE = 40.0  # what a value token adds to the pre-activation of delta
LOG_DECAY = -40.0  # A_log: no decay
ERASE = 40.0  # delta of a write that erases, with A = -1


def mamba1_table(
    codes: Codes, log_decay: float, norms: tuple[float, float] | None = None
) -> tuple[MambaTable, list[str]]:
    """Return the weights, and what each channel is for: previous key, current key, value bits, padding.

    `norms` are those by which the norm before the block has divided a key and a value: the language model's, if None.
    """
    (n_keys, key_bits), bits, model = codes.key.shape, codes.value.shape[1], codes.model
    block, keys = MambaTable.zeros(model, 2 * model, state=key_bits, rank=1), np.arange(key_bits)
    previous, current, value = keys, key_bits + keys, 2 * key_bits + np.arange(bits)
    key_norm, value_norm = norms_of(codes) if norms is None else norms
    block.in_proj_x[previous, keys] = block.in_proj_x[current, keys] = key_norm
    block.in_proj_x[value, key_bits + np.arange(bits)] = value_norm
    block.in_proj_z[np.ix_(value, keys)] = GATE / codes.key_weight * key_norm
    block.conv[previous, 1] = block.conv[current, 0] = block.conv[value, 0] = 1
    block.x_proj_dt[0, value] = 1 / (SILU_ONE * codes.value_weight)
    block.x_proj_B[keys, previous] = block.x_proj_C[keys, current] = 1
    block.dt_proj[:, 0], block.dt_bias[:] = WRITE, INVERSE_SOFTPLUS_ONE - WRITE
    block.A_log[:] = log_decay
    block.out_proj[key_bits + np.arange(bits), value] = 1 / (SILU_ONE**3 * silu(GATE) * codes.key_weight)
    unit = "key" if key_bits == n_keys else "key bit"
    labels = [f"{when} {unit} {key}" for when in ("previous", "current") for key in keys]
    return block, labels + [f"value bit {bit}" for bit in range(bits)] + ["padding"] * bits


def mamba2_table(codes: Codes, log_decay: float) -> tuple[Mamba2Table, list[str]]:
    """Return the weights of one head, and what each channel is for: value bits, padding."""
    key_bits, bits, model = codes.key.shape[1], codes.value.shape[1], codes.model
    block, keys, value = Mamba2Table.zeros(model, model, state=key_bits, head=1), np.arange(key_bits), np.arange(bits)
    key_norm, value_norm = norms_of(codes)
    block.in_proj_B[keys, keys] = block.in_proj_C[keys, keys] = key_norm
    block.in_proj_x[value, key_bits + value] = value_norm
    block.in_proj_z[np.ix_(value, keys)] = GATE / codes.key_weight * key_norm
    block.in_proj_dt[0, key_bits + value] = WRITE / codes.value_weight * value_norm
    block.conv_B[:, 1] = block.conv_C[:, 0] = block.conv_x[value, 0] = 1
    block.dt_bias[:], block.A_log[:] = INVERSE_SOFTPLUS_ONE - WRITE, log_decay
    read = SILU_ONE**3 * silu(GATE) * codes.key_weight  # of one value bit, before the gated norm
    root_mean_square = math.sqrt(read**2 * codes.value_weight / model + EPSILON)  # of a value read alone
    block.out_proj[key_bits + value, value] = root_mean_square / read
    return block, [f"value bit {bit}" for bit in range(bits)] + ["padding"] * key_bits


def overwrite_table(codes: Codes) -> tuple[MambaTable, list[str]]:
    """Return the weights, and what each channel is for: a bit of a key's value, previous key, one, padding.

    Channel (i, j) holds bit j of key i's value; delta is ERASE at a value that follows key i, e^-ERASE elsewhere.
    """
    n_keys, bits, model = codes.key.shape[1], codes.value.shape[1], codes.model
    asked, stored = np.arange(1, n_keys), (n_keys - 1) * bits
    expand = -(-(stored + n_keys) // model)
    block = MambaTable.zeros(model, expand * model, state=1, rank=n_keys)
    held = np.arange(stored).reshape(n_keys - 1, bits)
    previous, one = stored + np.arange(n_keys - 1), stored + n_keys - 1
    key_norm, value_norm = norms_of(codes)
    for key, channels in zip(asked, held, strict=True):
        block.in_proj_x[channels, n_keys + np.arange(bits)] = value_norm
        block.in_proj_z[channels, key] = GATE * key_norm
        block.dt_proj[channels, key - 1] = block.dt_proj[channels, n_keys - 1] = 2 * ERASE
        block.out_proj[n_keys + np.arange(bits), channels] = 1 / (ERASE * SILU_ONE * silu(GATE))
    block.in_proj_x[previous, asked] = key_norm
    block.conv[held, 0] = block.conv[previous, 1] = block.conv_bias[one] = 1
    block.x_proj_dt[asked - 1, previous] = 1 / SILU_ONE
    block.x_proj_dt[n_keys - 1, held[0]] = 1 / (SILU_ONE * codes.value_weight)  # whether the token is a value
    block.x_proj_B[0, one] = block.x_proj_C[0, one] = 1 / SILU_ONE
    block.dt_bias[:] = -3 * ERASE
    labels = [f"value bit {bit} of key {key}" for key in asked for bit in range(bits)]
    labels += [f"previous key {key}" for key in asked] + ["one"]
    return block, labels + ["padding"] * (expand * model - len(labels))


def norms_of(codes: Codes) -> tuple[float, float]:
    """Return the root mean squares of a key's and of a value's embedding, which undo the norm before the block."""
    key, value = (math.sqrt(square / codes.model + EPSILON) for square in (codes.key_weight, codes.value_weight))
    return key, value
