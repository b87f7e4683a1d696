"""Associative recall amid random filler: a Mamba-1 block that writes during the pairs only."""

import math
from functools import partial

import numpy as np
import torch
from jaxtyping import Int
from numpy.typing import ArrayLike
from torch import Tensor

from mamba_probe.constructions.construction import Construction
from mamba_probe.constructions.recall_codes import Codes, codes_of
from mamba_probe.constructions.recall_language import as_ids
from mamba_probe.constructions.recall_signatures import gated_signatures, recall_states
from mamba_probe.constructions.recall_tables import LOG_DECAY, WRITE, mamba1_table
from mamba_probe.constructions.tables import MambaTable, check_dtype, mixer_of

__all__ = ["mqar_gated"]

CLAIM = """As mqar, and a ramp silu(beta (t - 2 n_pairs + 1/2)) lowers the pre-activation of delta: nothing is written
from token 2 n_pairs on, so that keys and values met by chance in the filler leave the memory alone."""


def mqar_gated(
    n_keys: int = 64,
    n_values: int = 64,
    n_pairs: int = 8,
    length: int = 64,
    key_code: str = "one-hot",
    beta: float = 64.0,
    dtype: torch.dtype = torch.float32,
) -> Construction:
    r"""Build the block that answers every query although the filler is random keys and values.

    The features are those of `mqar`'s embeddings and t/T, with no norm before the block, which would spoil the
    position; so there is no language model around it. With s_t = 1 at values and 0 elsewhere,

    .. math:: \Delta_t = \mathrm{softplus}\bigl(\log(e - 1) - 40 (1 - s_t)
        - \mathrm{SiLU}(\beta (t - 2 n_\mathrm{pairs} + \tfrac12))\bigr)

    Source: ours.

    Arguments:
        n_keys: token ids `0 .. n_keys - 1`; token 0 is the empty filler.
        n_values: token ids `n_keys .. n_keys + n_values - 1`.
        n_pairs: pairs at the head of a row.
        length: tokens T of a row.
        key_code: "one-hot", or "constant-weight" for values that do not repeat among the pairs.
        beta: steepness of the ramp; a write at token 2 n_pairs + k is about exp(-beta (k + 1/2)).
        dtype: of the weights, float32 or float64.

    Returns:
        A construction around a bare `MambaMixer`: `inputs(input_ids)` makes hidden states (batch, token, model), and
        `answer(output)` predicts token ids (batch, token).

    Raises:
        ValueError: if the sizes do not fit each other, or the key code or dtype is another one.

    Example:
        >>> import numpy as np, torch
        >>> construction = mqar_gated(n_keys=8, n_values=8, n_pairs=1, length=8)
        >>> ids = np.array([[3, 9, 3, 12, 3, 14, 0, 3]])
        >>> with torch.no_grad():
        ...     output = construction.model(construction.inputs(ids))
        >>> construction.answer(output)[0, [2, 4, 7]].tolist()
        [9, 9, 9]
    """
    _check(n_keys, n_values, n_pairs, length, key_code, beta)
    check_dtype(dtype)
    codes = codes_of(key_code, n_keys, n_values)
    table, labels = mamba1_table(codes, LOG_DECAY, norms=(1.0, 1.0))
    block = _gated(table, n_pairs, length, beta)
    return Construction(
        name="mqar_gated",
        model=mixer_of(block, dtype),
        inputs=partial(_inputs, codes=codes, length=length, dtype=dtype),
        expected=None,
        read_out=None,
        bound=None,
        channels=[*labels, "ramp", "padding"],
        claim=CLAIM,
        answer=partial(_answer, codes=codes),
        states=recall_states("mamba1", key_code, "add", codes.key.shape[1]),
        signatures=gated_signatures(key_code),
    )


def _gated(table: MambaTable, n_pairs: int, length: int, beta: float) -> MambaTable:
    """Return the table with a feature t/T, a channel for the ramp and one of padding."""
    more, arrays = {"model": 1, "channel": 2}, {}
    for name, hint in MambaTable.__annotations__.items():
        arrays[name] = np.pad(getattr(table, name), [(0, more.get(dim, 0)) for dim in hint.dim_str.split()])
    block = MambaTable(**arrays)
    ramp, position = table.D.size, table.out_proj.shape[0]
    block.in_proj_x[ramp, position], block.conv_bias[ramp] = beta * length, beta * (0.5 - 2 * n_pairs)
    block.conv[ramp, 0] = 1
    block.x_proj_dt[0, ramp] = -1 / WRITE
    block.dt_proj[ramp:], block.dt_bias[ramp:], block.A_log[ramp:] = table.dt_proj[0], table.dt_bias[0], table.A_log[0]
    return block


def _inputs(input_ids: ArrayLike, *, codes: Codes, length: int, dtype: torch.dtype) -> Tensor:
    """Return the embedding and t/T for each token, (batch, token, model)."""
    ids = as_ids(input_ids, name="mqar_gated", vocab=len(codes.embedding)).numpy()
    if ids.shape[1] != length:
        raise ValueError(f"mqar_gated: input_ids must have {length} tokens in a row, got {ids.shape[1]}")
    position = np.broadcast_to(np.arange(length)[:, None] / length, (*ids.shape, 1))
    return torch.tensor(np.concatenate([codes.embedding[ids], position], axis=-1), dtype=dtype)


def _answer(output: Tensor, *, codes: Codes) -> Int[np.ndarray, "batch token"]:
    """Return the value whose code overlaps most with what each token read."""
    read = output.detach().double().cpu().numpy()[..., codes.key.shape[1] : codes.model]
    return len(codes.key) + (read @ codes.value.T).argmax(-1)


def _check(n_keys: int, n_values: int, n_pairs: int, length: int, key_code: str, beta: float) -> None:
    if key_code not in ("one-hot", "constant-weight"):
        raise ValueError(f'mqar_gated: key_code={key_code!r} is not supported; use "one-hot" or "constant-weight"')
    needs = {
        f"n_keys >= 2, the filler and a key (got {n_keys})": n_keys >= 2,
        f"n_values >= 2 (got {n_values})": n_values >= 2,
        f"n_pairs >= 1 (got {n_pairs})": n_pairs >= 1,
        f"length > 2 * n_pairs (got {length} <= {2 * n_pairs})": length > 2 * n_pairs,
        f"beta > 0 and finite (got {beta})": 0 < beta < math.inf,
    }
    failed = [need for need, met in needs.items() if not met]
    if failed:
        raise ValueError(f"mqar_gated: needs {'; '.join(failed)}")
