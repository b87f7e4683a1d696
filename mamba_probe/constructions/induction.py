"""Language models that are induction heads: what followed this token the last time?"""

from collections.abc import Sequence
from difflib import get_close_matches
from functools import partial

import numpy as np
import torch

from mamba_probe.constructions.construction import Construction
from mamba_probe.constructions.induction_signatures import induction_signatures, induction_states
from mamba_probe.constructions.induction_tables import (
    GAIN,
    counting_s4d,
    every_mamba1,
    every_mamba2,
    special_mamba1,
    special_mamba2,
)
from mamba_probe.constructions.recall_language import EPSILON, as_ids, language_model
from mamba_probe.constructions.tables import Table, check_dtype

__all__ = ["induction"]

CHOICES = {"kind": ("special", "every"), "mixer": ("mamba1", "mamba2", "s4d")}
CLAIMS = {
    ("special", "mamba1"): """The convolution tells the token after the special one; there delta = 40 erases the state
of A = -1 and writes the token, and elsewhere delta = e^-40. The special token opens the gate.""",
    ("special", "mamba2"): """delta sees the current token alone: the special token has delta = log 4, which leaves a
quarter of the state, and any other 1e-9; the convolution lets B add the token after it. The newest outweighs all older
ones together, 1/4 + 1/16 + ... = 1/3 of it. The special token opens the gate.""",
    ("every", "mamba1"): """Each token has its own channels, with A = -1: the convolution tells that it was the previous
one, and then delta = 40 erases what was held there and writes the current token; elsewhere delta = e^-40. A token opens
the gate of its own channels.""",
    ("every", "mamba2"): """The first layer adds the previous token to the features, through the convolution and D. In
the second each token has its own head, with A = -1: after the token delta = 40 erases what was held there and writes
the current token; elsewhere delta = e^-40. A token opens the gate of its own head.""",
    ("special", "s4d"): """Nothing is erased: A, B, C and delta are constant. Each channel is one token: the convolution
and a threshold let it write where the token comes right after the special one, and it counts its writes. The special
token opens the gate. With one earlier occurrence the count is the answer; with more, the most frequent wins.""",
    ("every", "s4d"): """Nothing is erased: A, B, C and delta are constant. Each channel is one pair of tokens: the
convolution and a threshold let it write where the second comes right after the first, and it counts its writes. A token
opens the gate of its own pairs. The most frequent successor wins: the last one, where each token has only one.""",
}


def induction(
    kind: str = "every",
    mixer: str = "mamba1",
    n_tokens: int = 16,
    special: int = 0,
    dtype: torch.dtype = torch.float32,
) -> Construction:
    r"""Build the language model that predicts what followed the current token when it came last.

    At a token x_t with an earlier occurrence, the last of them at s,

    .. math:: \mathrm{logit}_t(v) = 2 \cdot 1[v = x_{s+1}] + 1[v = x_t]

    up to the last norm: the answer's stands above any other by 1 or more. S4D is time-invariant and forgets nothing: in
    the place of 1[v = x_{s+1}] it has the number of times that v followed x_t, so that the answer is right where x_t
    was always followed by the same token, or came once before; elsewhere the most frequent successor wins, and ties go
    to x_t or to any. Of random tokens out of 16, that answers about 0.59 of the queries in 64 and 0.24 in 512; of the
    special token's about 0.34 after 4 occurrences, 0.27 after 8. Source: ours (our construction of the
    claim of arXiv 2506.11891 on induction heads).

    Arguments:
        kind: "special": asked at the token `special` alone. "every": at every token.
        mixer: "mamba1": one layer. "mamba2": one layer for "special", two for "every". "s4d": one layer, which counts.
        n_tokens: number of token ids V. The model size is V, with V + 2 of 2 V channels used for "special" and
            V^2 + V + 1 for "every"; Mamba-2's two layers have model size 2 V and V heads; S4D has V and V^2 channels.
        special: the token asked about; with "every" it must stay 0. It does not follow itself: in Mamba-2 nothing is
            written there.
        dtype: of the weights, float32 or float64.

    Returns:
        A construction around a `MambaForCausalLM` or `Mamba2ForCausalLM`, or for S4D our own language model. `inputs`
        makes a tensor of token ids.

    Raises:
        ValueError: if the sizes do not fit each other, or the kind, mixer or dtype is another one.

    Example:
        >>> import torch
        >>> construction = induction(n_tokens=4)
        >>> construction
        Construction(induction: MambaForCausalLM, model=4, channel=24, state=1, rank=4, float32)
        >>> with torch.no_grad():
        ...     logits = construction.model(construction.inputs([[0, 2, 3, 0, 1, 3, 0]])).logits
        >>> logits[0, [3, 5, 6]].argmax(-1).tolist()
        [2, 0, 1]
    """
    _check(kind, mixer, n_tokens, special)
    check_dtype(dtype)
    blocks, channels = _tables(kind, mixer, n_tokens, special)
    features = 2 * n_tokens if len(blocks) == 2 else n_tokens
    embedding = np.eye(n_tokens, features)
    residual = 1.0 * len(blocks)  # one for the token itself, one for the previous token
    return Construction(
        name="induction",
        model=language_model(blocks, embedding, embedding * _scale(residual + GAIN**2, features), dtype),
        inputs=partial(as_ids, name="induction", vocab=n_tokens),
        expected=None,
        read_out=None,
        bound=None,
        channels=channels,
        claim=CLAIMS[kind, mixer],
        states=induction_states(kind, mixer),
        signatures=induction_signatures(kind, mixer),
    )


def _scale(square: float, features: int) -> float:
    """Return what undoes the last norm where the answer is another token than the one that asks."""
    return float(np.sqrt(square / features + EPSILON))


def _tables(kind: str, mixer: str, n_tokens: int, special: int) -> tuple[Sequence[Table], list[str]]:
    if mixer == "s4d":
        block, channels = counting_s4d(n_tokens, range(n_tokens) if kind == "every" else [special])
    elif kind == "every" and mixer == "mamba2":
        return every_mamba2(n_tokens)
    elif kind == "every":
        block, channels = every_mamba1(n_tokens)
    else:
        block, channels = (special_mamba1 if mixer == "mamba1" else special_mamba2)(n_tokens, special)
    return [block], channels


def _check(kind: str, mixer: str, n_tokens: int, special: int) -> None:
    for name, given in {"kind": kind, "mixer": mixer}.items():
        if given not in CHOICES[name]:
            near = get_close_matches(str(given), CHOICES[name], n=1, cutoff=0.75)
            hint = f"; did you mean {near[0]!r}?" if near else ""
            known = ", ".join(f'"{choice}"' for choice in CHOICES[name])
            raise ValueError(f"induction: {name}={given!r} is not supported{hint}; use one of {known}")
    if kind == "every" and special != 0:
        raise ValueError(f'induction: special={special} goes with kind="special" alone')
    needs = {
        f"n_tokens >= 2 (got {n_tokens})": n_tokens >= 2,
        f"0 <= special < n_tokens (got special = {special}, n_tokens = {n_tokens})": 0 <= special < n_tokens,
    }
    failed = [need for need, met in needs.items() if not met]
    if failed:
        raise ValueError(f"induction: needs {'; '.join(failed)}")
