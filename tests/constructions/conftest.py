"""A Mamba-1 block evaluated from its weights alone: one token at a time, float64, numpy only."""

from types import SimpleNamespace

import numpy as np
import pytest
from scipy.special import expit


def silu(a):
    return a * expit(a)


def softplus(a):
    return np.logaddexp(0, a)


def evaluate_block(weights, hidden):
    """Return out (batch, token, model) and delta (batch, token, channel) of a block for hidden states."""
    w = {name: np.asarray(weight, dtype=np.float64) for name, weight in weights.items()}
    (batch, length, _), (channel, state), rank = hidden.shape, w["A_log"].shape, w["dt_proj.weight"].shape[1]
    taps, decay = w["conv1d.weight"][:, 0], np.exp(w["A_log"])
    window, h = np.zeros((batch, channel, taps.shape[1])), np.zeros((batch, channel, state))
    out, delta = [], []
    for t in range(length):
        projected = hidden[:, t] @ w["in_proj.weight"].T
        window = np.concatenate([window[..., 1:], projected[:, :channel, None]], axis=-1)
        x = silu((window * taps).sum(-1) + w["conv1d.bias"])
        low, b, c = np.split(x @ w["x_proj.weight"].T, [rank, rank + state], axis=1)
        step = softplus(low @ w["dt_proj.weight"].T + w["dt_proj.bias"])
        h = np.exp(-decay * step[..., None]) * h + step[..., None] * b[:, None] * x[..., None]
        y = (h * c[:, None]).sum(-1) + w["D"] * x
        out.append((y * silu(projected[:, channel:])) @ w["out_proj.weight"].T)
        delta.append(step)
    return SimpleNamespace(out=np.stack(out, axis=1), delta=np.stack(delta, axis=1))


def evaluate_language_model(weights, input_ids, epsilon=1e-5):
    """Return the logits (batch, token, vocab) of a one-layer language model."""
    prefix = "backbone.layers.0.mixer."
    w = {name: np.asarray(weight, dtype=np.float64) for name, weight in weights.items()}
    block = {name.removeprefix(prefix): weight for name, weight in w.items() if name.startswith(prefix)}

    def normed(hidden, scale):
        return scale * hidden / np.sqrt((hidden**2).mean(-1, keepdims=True) + epsilon)

    hidden = w["backbone.embeddings.weight"][input_ids]
    hidden = hidden + evaluate_block(block, normed(hidden, w["backbone.layers.0.norm.weight"])).out
    return normed(hidden, w["backbone.norm_f.weight"]) @ w["lm_head.weight"].T


@pytest.fixture(scope="session")
def evaluate():
    return lambda module, hidden: evaluate_block(module.state_dict(), np.asarray(hidden, np.float64))


@pytest.fixture(scope="session")
def evaluate_lm():
    return lambda module, input_ids: evaluate_language_model(module.state_dict(), input_ids)
