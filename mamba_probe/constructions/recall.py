"""A one-layer Mamba-1 language model that solves multi-query associative recall."""

import math
from functools import partial
from itertools import combinations, islice

import numpy as np
import torch
from jaxtyping import Float
from numpy.typing import ArrayLike
from torch import Tensor

from mamba_probe.constructions.block import INVERSE_SOFTPLUS_ONE, SILU_ONE, Block, check_dtype, pour, silu
from mamba_probe.constructions.construction import Construction

__all__ = ["mqar"]

GATE = 4.0  # z at a key token
WRITE = 40.0  # what a value token adds to the pre-activation of delta
LOG_DECAY = -40.0  # A_log: no decay
EPSILON = 1e-5  # of the RMS norms

CLAIM = """The convolution brings the previous token's key to B and the current token's key to C; a value token
has delta = 1, any other softplus(log(e - 1) - 40), and nothing decays: the states of a key hold the code of the value
that followed it. A key token opens the gate and reads them; lm_head compares the code with every value's, so that the
right logit exceeds the others by at least 1."""


def mqar(
    mixer: str = "mamba1",
    n_keys: int = 64,
    n_values: int = 64,
    key_code: str = "one-hot",
    dtype: torch.dtype = torch.float32,
) -> Construction:
    r"""Build the language model that answers every query of `mamba_probe.tasks.mqar`.

    With one-hot keys phi and value codes chi of constant weight w,

    .. math:: \mathrm{logit}_t(v) = \Bigl\langle \chi(v), \sum_{s \le t} \Delta_s\,
        \langle \phi(x_t), \phi(x_{s-1})\rangle \,\chi(x_s) \Bigr\rangle, \qquad
        \Delta_s = 1 \text{ at values},\ < 10^{-17} \text{ elsewhere}

    at a query t: w at the answer and at most w - 1 elsewhere. Source: ours (our construction of the claim of
    arXiv 2506.11891 on associative recall).

    Arguments:
        mixer: "mamba1".
        n_keys: token ids `0 .. n_keys - 1`; token 0 is the filler, which leaves `n_keys - 1` keys.
        n_values: token ids `n_keys .. n_keys + n_values - 1`; the task's halves are equal, `n_keys == n_values`.
        key_code: "one-hot".
        dtype: of the weights, float32 or float64.

    Returns:
        A construction around a `MambaForCausalLM`, its model size n_keys + d with d the least number of bits for which
        C(d, d // 2) >= n_values. `inputs` makes a tensor of token ids; the answers are the task's `target`.
        Each key may be followed by a value once in a sequence.

    Raises:
        ValueError: if there is no key or fewer than two values, or the mixer, key code or dtype is another one.

    Example:
        >>> import torch
        >>> from mamba_probe.tasks import mqar as task_of
        >>> construction = mqar(n_keys=8, n_values=8)
        >>> construction
        Construction(mqar: MambaForCausalLM, model=13, channel=26, state=8, rank=1, float32)
        >>> task = task_of(batch=4, length=16, n_pairs=3, vocab=16)
        >>> with torch.no_grad():
        ...     logits = construction.model(construction.inputs(task.input_ids)).logits
        >>> task.accuracy(logits.argmax(-1))
        (12, 12)
    """
    _check(mixer, n_keys, n_values, key_code)
    check_dtype(dtype)
    code = _constant_weight(n_values)
    block, channels = _block(n_keys, code)
    config = block.config(
        dtype,
        architectures=["MambaForCausalLM"],
        vocab_size=n_keys + n_values,
        layer_norm_epsilon=EPSILON,
        tie_word_embeddings=False,
    )
    return Construction(
        name="mqar",
        model=pour(config, _language_model(block, n_keys, code, dtype)),
        inputs=partial(_inputs, vocab=n_keys + n_values),
        expected=None,
        read_out=None,
        bound=(n_keys - 1) * math.exp(LOG_DECAY),
        channels=channels,
        claim=CLAIM,
    )


def _constant_weight(n_values: int) -> Float[np.ndarray, "value bit"]:
    """Return the first `n_values` 0/1 codes of the least even weight split: C(d, d // 2) >= n_values."""
    bits = next(d for d in range(2, 64) if math.comb(d, d // 2) >= n_values)
    code = np.zeros((n_values, bits))
    for row, ones in zip(code, islice(combinations(range(bits), bits // 2), n_values), strict=True):
        row[list(ones)] = 1
    return code


def _block(n_keys: int, code: Float[np.ndarray, "value bit"]) -> tuple[Block, list[str]]:
    """Return the weights, and what each channel is for: previous key, current key, value bits, padding."""
    bits, weight = code.shape[1], code[0].sum()
    model = n_keys + bits
    block, keys = Block.zeros(model, 2 * model, state=n_keys, rank=1), np.arange(n_keys)
    previous, current, value = keys, n_keys + keys, 2 * n_keys + np.arange(bits)
    key_norm, value_norm = (math.sqrt(square / model + EPSILON) for square in (1, weight))  # undo the norm before
    block.in_proj_x[previous, keys] = block.in_proj_x[current, keys] = key_norm
    block.in_proj_x[value, n_keys + np.arange(bits)] = value_norm
    block.in_proj_z[np.ix_(value, keys)] = GATE * key_norm
    block.conv[previous, 1] = block.conv[current, 0] = block.conv[value, 0] = 1
    block.x_proj_dt[0, value] = 1 / (SILU_ONE * weight)
    block.x_proj_B[keys, previous] = block.x_proj_C[keys, current] = 1
    block.dt_proj[:, 0], block.dt_bias[:] = WRITE, INVERSE_SOFTPLUS_ONE - WRITE
    block.A_log[:] = LOG_DECAY
    block.out_proj[n_keys + np.arange(bits), value] = 1 / (SILU_ONE**3 * silu(GATE))
    labels = [f"previous key {key}" for key in keys] + [f"current key {key}" for key in keys]
    return block, labels + [f"value bit {bit}" for bit in range(bits)] + ["padding"] * bits


def _language_model(
    block: Block, n_keys: int, code: Float[np.ndarray, "value bit"], dtype: torch.dtype
) -> dict[str, Tensor]:
    """Return the block's weights inside a language model: one embedding a token, zero for the filler, and its head."""
    (n_values, bits), weight = code.shape, code[0].sum()
    embedding = np.zeros((n_keys + n_values, n_keys + bits))
    embedding[np.arange(1, n_keys), np.arange(1, n_keys)] = 1
    embedding[n_keys:, n_keys:] = code
    head = np.zeros_like(embedding)  # undoes the last norm at a query, where the residual adds the key to the answer
    head[n_keys:, n_keys:] = code * math.sqrt((1 + weight) / embedding.shape[1] + EPSILON)
    ones = np.ones(embedding.shape[1])
    around = {
        "backbone.embeddings.weight": embedding,
        "backbone.layers.0.norm.weight": ones,
        "backbone.norm_f.weight": ones,
        "lm_head.weight": head,
    }
    inside = {f"backbone.layers.0.mixer.{name}": array for name, array in block.state_dict(dtype).items()}
    return inside | {name: torch.tensor(array, dtype=dtype) for name, array in around.items()}


def _inputs(input_ids: ArrayLike, *, vocab: int) -> Tensor:
    """Return the token ids (batch, token) as a tensor."""
    ids = np.asarray(input_ids)
    if ids.ndim != 2 or ids.dtype.kind not in "iu":
        raise ValueError(f"mqar: input_ids must be integers (batch, token), got {ids.dtype} of shape {ids.shape}")
    if ids.size and not (ids.min() >= 0 and ids.max() < vocab):
        raise ValueError(f"mqar: input_ids must be in [0, {vocab}), got [{ids.min()}, {ids.max()}]")
    return torch.tensor(ids, dtype=torch.int64)


def _check(mixer: str, n_keys: int, n_values: int, key_code: str) -> None:
    if mixer != "mamba1":
        raise ValueError(f'mqar: mixer={mixer!r} is not supported; use mixer="mamba1"')
    if key_code != "one-hot":
        raise ValueError(f'mqar: key_code={key_code!r} is not supported; use key_code="one-hot"')
    needs = {
        f"n_keys >= 2, the filler and a key (got {n_keys})": n_keys >= 2,
        f"n_values >= 2 (got {n_values})": n_values >= 2,
    }
    failed = [need for need, met in needs.items() if not met]
    if failed:
        raise ValueError(f"mqar: needs {'; '.join(failed)}")
