"""The weight table of S4D's memory: a channel writes where its value's feature comes right after its key's."""

import numpy as np
from jaxtyping import Float

from mamba_probe.constructions.recall_codes import Codes
from mamba_probe.constructions.recall_tables import GATE, LOG_DECAY, norms_of
from mamba_probe.constructions.tables import S4DTable, silu

__all__ = ["STEEP", "and_table", "s4d_table"]

STEEP = 80.0  # of the threshold: a write is STEEP / 2, anything else less than STEEP / 2 exp(-STEEP / 2)


def and_table(
    key: Float[np.ndarray, "channel model"],
    value: Float[np.ndarray, "channel model"],
    out: Float[np.ndarray, "model channel"],
) -> S4DTable:
    """Return channels x_t = silu(STEEP (k_{t-1} + v_t - k_t - v_{t-1} - 3/2)), summed over t and read where k is 1.

    in_proj gives a channel one scalar, k - v, and the convolution its difference: with taps of one sign, x would also
    write at a value before a key, and at two of a kind.

    Args:
        key: of the features, what is 1 (k) at the keys of a channel and 0 elsewhere.
        value: the same of the channel's values (v); no token has both.
        out: what each write adds to the features where it is read.
    """
    block = S4DTable.zeros(*out.shape, state=1)
    block.in_proj_x[:], block.in_proj_z[:] = STEEP * (key - value), GATE * key
    block.conv[:, 1], block.conv[:, 0], block.conv_bias[:] = 1, -1, -1.5 * STEEP
    block.log_A_real[:], block.C[:] = LOG_DECAY, 1 / 2
    block.out_proj[:] = out / (STEEP / 2 * silu(GATE))
    return block


def s4d_table(codes: Codes) -> tuple[S4DTable, list[str]]:
    """Return the weights, and what each channel is for: a key bit and a value bit each."""
    (n_keys, key_bits), bits, model = codes.key.shape, codes.value.shape[1], codes.model
    key_norm, value_norm = norms_of(codes)
    key = np.repeat(np.eye(key_bits, model), bits, axis=0)
    value = np.tile(np.eye(bits, model, k=key_bits), (key_bits, 1))
    block = and_table(key_norm * key, value_norm * value, value.T / codes.key_weight)
    unit = "key" if key_bits == n_keys else "key bit"
    return block, [f"{unit} and value bit [{a}, {b}]" for a in range(key_bits) for b in range(bits)]
