"""Blocks evaluated from their weights alone, one token at a time in float64; rows that tasks do not draw."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
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


def evaluate_mamba2_block(weights, hidden, heads, epsilon=1e-5):
    """Return the same of a Mamba-2 block of one group, delta by head, with its gated norm."""
    w = {name: np.asarray(weight, dtype=np.float64) for name, weight in weights.items()}
    (batch, length, _), channel = hidden.shape, w["out_proj.weight"].shape[1]
    taps, decay, skip = w["conv1d.weight"][:, 0], np.exp(w["A_log"]), w["D"]
    state, per_head = (len(taps) - channel) // 2, channel // heads
    window, h = np.zeros((batch, *taps.shape)), np.zeros((batch, heads, per_head, state))
    out, delta = [], []
    for t in range(length):
        z, xbc, low = np.split(hidden[:, t] @ w["in_proj.weight"].T, [channel, channel + len(taps)], axis=1)
        window = np.concatenate([window[..., 1:], xbc[..., None]], axis=-1)
        x, b, c = np.split(silu((window * taps).sum(-1) + w["conv1d.bias"]), [channel, channel + state], axis=1)
        x, step = x.reshape(batch, heads, per_head), softplus(low + w["dt_bias"])
        written = step[..., None, None] * x[..., None] * b[:, None, None]
        h = np.exp(-decay * step)[..., None, None] * h + written
        y = ((h @ c[:, None, :, None])[..., 0] + skip[:, None] * x).reshape(batch, channel) * silu(z)
        out.append((w["norm.weight"] * y / np.sqrt((y**2).mean(-1, keepdims=True) + epsilon)) @ w["out_proj.weight"].T)
        delta.append(step)
    return SimpleNamespace(out=np.stack(out, axis=1), delta=np.stack(delta, axis=1))


def evaluate_s4d_block(weights, hidden):
    """Return out (batch, token, model) of an S4D block: complex A and C, B = 1, zero-order hold."""
    w = {name: np.asarray(weight, dtype=np.float64) for name, weight in weights.items()}
    step, taps = np.exp(w["kernel.log_dt"])[:, None], w["conv1d.weight"][:, 0]
    a, c = -np.exp(w["kernel.log_A_real"]) + 1j * w["kernel.A_imag"], w["kernel.C"] @ [1, 1j]
    kept, written = np.exp(step * a), np.expm1(step * a) / a
    (batch, length, _), channel = hidden.shape, len(taps)
    window, h, out = np.zeros((batch, *taps.shape)), np.zeros((batch, *a.shape), dtype=complex), []
    for t in range(length):
        projected = hidden[:, t] @ w["in_proj.weight"].T
        window = np.concatenate([window[..., 1:], projected[:, :channel, None]], axis=-1)
        x = silu((window * taps).sum(-1) + w["conv1d.bias"])
        h = kept * h + written * x[..., None]
        y = 2 * (c * h).sum(-1).real + w["D"] * x
        out.append((y * silu(projected[:, channel:])) @ w["out_proj.weight"].T)
    return SimpleNamespace(out=np.stack(out, axis=1))


def evaluate_language_model(weights, input_ids, epsilon=1e-5):
    """Return the logits (batch, token, vocab) of a language model."""
    w = {name: np.asarray(weight, dtype=np.float64) for name, weight in weights.items()}

    def normed(hidden, scale):
        return scale * hidden / np.sqrt((hidden**2).mean(-1, keepdims=True) + epsilon)

    hidden = w["backbone.embeddings.weight"][input_ids]
    for layer in range(sum(name.endswith("mixer.in_proj.weight") for name in w)):
        prefix = f"backbone.layers.{layer}.mixer."
        block = {name.removeprefix(prefix): weight for name, weight in w.items() if name.startswith(prefix)}
        taken = normed(hidden, w[f"backbone.layers.{layer}.norm.weight"])
        if "kernel.C" in block:
            hidden = hidden + evaluate_s4d_block(block, taken).out
        elif "norm.weight" in block:
            hidden = hidden + evaluate_mamba2_block(block, taken, block["A_log"].size, epsilon).out
        else:
            hidden = hidden + evaluate_block(block, taken).out
    return normed(hidden, w["backbone.norm_f.weight"]) @ w["lm_head.weight"].T


def logits_of(construction, input_ids, rows=1):
    """Return the model's logits, float64 (batch, token, vocab), `rows` rows at a time."""
    model = construction.model
    options = {"use_cache": False} if hasattr(model, "config") else {}  # ours have no cache
    with torch.no_grad():
        pieces = construction.inputs(input_ids).split(rows)
        return np.concatenate([model(ids, **options).logits.double().numpy() for ids in pieces])


def least_margin(logits, target):
    """How far the answer stands above the best other one, at the least of the queries."""
    asked, answers = logits[target >= 0], target[target >= 0][:, None]
    answer = np.take_along_axis(asked, answers, axis=1)[:, 0]
    np.put_along_axis(asked, answers, -np.inf, axis=1)
    return (answer - asked.max(1)).min()


def share(predicted, target):
    """Return the share of the queries that are answered."""
    return (predicted == target)[target >= 0].mean()


def repeated_keys(n_keys, n_values, n_pairs, batch, seed=0):
    """Pairs whose keys come again, then each key that came, asked after a filler: the answer is its last value."""
    rng = np.random.default_rng(seed)
    ids = np.zeros((batch, 2 * n_pairs + 2 * (n_keys - 1)), dtype=int)
    target = np.full_like(ids, -1)
    ids[:, : 2 * n_pairs : 2] = rng.integers(1, n_keys, (batch, n_pairs))
    ids[:, 1 : 2 * n_pairs : 2] = rng.integers(n_keys, n_keys + n_values, (batch, n_pairs))
    for row in range(batch):
        last = dict(zip(ids[row, : 2 * n_pairs : 2], ids[row, 1 : 2 * n_pairs : 2], strict=True))
        for index, key in enumerate(rng.permutation(list(last))):
            ids[row, 2 * n_pairs + 2 * index], target[row, 2 * n_pairs + 2 * index] = key, last[key]
    return ids, target


def random_filler(task, seed=0):
    """Return the task's ids with any token of the vocabulary in the place of every filler."""
    drawn = np.random.default_rng(seed).integers(0, task.vocab, task.input_ids.shape)
    return np.where(task.role == "filler", drawn, task.input_ids)


def successors(n_tokens, length, batch, seed=0):
    """Random tokens; at each that came before, the one after its last occurrence."""
    ids = np.random.default_rng(seed).integers(0, n_tokens, (batch, length))
    target = np.full_like(ids, -1)
    for row, answers in zip(ids, target, strict=True):
        after = {}
        for t, token in enumerate(row):
            answers[t] = after.get(token, -1)
            after[token] = row[t + 1] if t + 1 < length else -1
    return ids, target


def after_special(n_tokens, length, occurrences, batch, special=0, seed=0):
    """Random tokens among which `special` is strewn, and comes last: the answer there is what followed it last."""
    rng = np.random.default_rng(seed)
    ids = rng.choice(np.delete(np.arange(n_tokens), special), (batch, length))
    target = np.full_like(ids, -1)
    for row, answers in zip(ids, target, strict=True):
        at = 2 * np.sort(rng.choice(length // 2 - 1, occurrences, replace=False))
        row[at] = row[-1] = special
        answers[-1] = row[at[-1] + 1]
    return ids, target


@pytest.fixture(scope="session")
def tool():
    names = (logits_of, least_margin, share, repeated_keys, random_filler, successors, after_special)
    return SimpleNamespace(**{function.__name__: function for function in names})


@pytest.fixture(scope="session")
def evaluate():
    def run(module, hidden):
        weights, hidden = module.state_dict(), np.asarray(hidden, np.float64)
        if "kernel.C" in weights:
            return evaluate_s4d_block(weights, hidden)
        if "norm.weight" in weights:
            return evaluate_mamba2_block(weights, hidden, module.num_heads)
        return evaluate_block(weights, hidden)

    return run


@pytest.fixture(scope="session")
def evaluate_lm():
    return lambda module, input_ids: evaluate_language_model(module.state_dict(), input_ids)
