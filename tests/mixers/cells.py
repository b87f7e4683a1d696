"""One cell of a grid of lengths and paddings: its prompt, a run of it, and the error of what came."""

import numpy as np
import torch


def prompt(length, padded, batch=3, seed=0):
    """Ids of 1 .. 60, and a mask with padding on the left of the first two rows, or None."""
    ids = torch.randint(1, 61, (batch, length), generator=torch.Generator().manual_seed(seed + length))
    if not padded:
        return ids, None
    mask = torch.ones_like(ids)
    mask[0, : min(length - 1, 7)] = 0
    mask[1, :1] = 0
    return ids, mask


def validity(ids, mask):
    return np.ones(ids.shape, bool) if mask is None else mask.bool().numpy()


def error(a, b, valid=...):
    """max|a - b| / max|b| over valid tokens, of finite numbers."""
    a, b = np.asarray(a, np.float64)[valid], np.asarray(b, np.float64)[valid]
    assert np.isfinite(a).all()
    return np.abs(a - b).max() / np.abs(b).max()


def run(model, ids, mask=None, **options):
    """Logits."""
    with torch.no_grad():
        return model(ids, attention_mask=mask, **options).logits.numpy()
