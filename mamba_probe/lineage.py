"""Which earlier row each row of a step continues: the one that left, bit for bit, the state that it carries in.

Beam search orders a cache's rows anew between two steps. It is told by the states alone, in all recorded layers.
"""

from collections.abc import Sequence
from functools import lru_cache

import numpy as np
import torch
from torch import Tensor

__all__ = ["fingerprint", "parents"]

_BITS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def fingerprint(states: Tensor) -> Tensor:
    r"""A number a row that equal states share and others do not: $\sum_i w_i\, b_i$ modulo 2^64, of the state's bits b
    as integers and fixed random w. Two states that differ have the same with a probability of at most 2^-33 (ours).

    Args:
        states: (batch, ...), of any dtype.

    Returns:
        (batch,) int64, on the device of the states.

    >>> one, other, _ = fingerprint(torch.tensor([[1.0, 2.0], [2.0, 1.0], [0.0, 0.0]]))
    >>> bool(one == other), bool(fingerprint(torch.tensor([[2.0, 1.0]])) == other)
    (False, True)
    """
    plain = torch.view_as_real(states.detach()) if states.is_complex() else states.detach()
    bits = plain.contiguous().view(_BITS[plain.element_size()]).flatten(1)
    return (bits * _weights(bits.shape[1], bits.device)).sum(1)


@lru_cache(maxsize=4)
def _weights(n: int, device: torch.device) -> Tensor:
    with torch.inference_mode(False):
        drawn = torch.randint(-(2**63), 2**63 - 1, (n,), generator=torch.Generator().manual_seed(n))
        return drawn.to(device)


def parents(came: Sequence[Tensor], left: Sequence[Tensor]) -> np.ndarray:
    """The row that each row continues: itself if it can be, else the first that left its state in every layer.

    Args:
        came: fingerprints (batch,) of the states carried into a step, one a layer.
        left: those of the states that the step before it left.

    Raises:
        ValueError: a row whose state no row has left.

    >>> parents([torch.tensor([7, 7, 5])], [torch.tensor([5, 7, 7])])
    array([1, 1, 0])
    """
    device = came[0].device
    pairs = torch.stack([torch.stack((new, old)).to(device) for new, old in zip(came, left, strict=True)])
    new, old = pairs.cpu().numpy().swapaxes(0, 1)  # one answer from the device for all layers
    rows = np.arange(new.shape[1])
    if (new == old).all():
        return rows
    equal = (new[:, :, None] == old[:, None, :]).all(0)
    lost = np.flatnonzero(~equal.any(1))
    if len(lost):
        raise ValueError(
            f"the state that row {lost[0]} of this step carries in was left by no row of the step before: the cache was"
            " edited, or is that of other prompts than the last call's. Give each generation a `recording` of its own"
        )
    return np.where(equal.diagonal(), rows, equal.argmax(1))
