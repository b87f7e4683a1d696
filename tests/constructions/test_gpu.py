"""Every construction on a CUDA device, through our Triton scan: the tolerances that were given for them.

Never skips: without a CUDA device these fail. Run them with `pytest -m gpu`.
"""

import numpy as np
import pytest
import torch

import mamba_probe as mp
from mamba_probe.constructions import haar, induction, keep_nth, mqar, mqar_gated, window_sums
from mamba_probe.tasks import mqar as task_of

pytestmark = pytest.mark.gpu
DEVICE, BACKEND = "cuda", "triton"
PRECISIONS = [torch.float32, torch.float64]

BLOCKS = {  # construction, then its tolerance in float32 and in float64, relative to the largest output of a row
    "flat-x": (lambda **more: haar(256, 3, **more), 1e-6, 1e-12),
    "flat-B": (lambda **more: haar(256, 3, variant="flat-B", **more), 1e-6, 1e-12),
    "ramps": (lambda **more: haar(256, 3, variant="ramps", **more), 1e-3, 1e-8),
    "ramps, mamba2": (lambda **more: haar(256, 3, variant="ramps", mixer="mamba2", **more), 1e-3, 1e-8),
    "decay": (lambda **more: haar(256, 8, variant="decay", **more), 1e-6, 1e-12),
    "window_sums": (lambda **more: window_sums(1000, 8, **more), 1e-6, 1e-12),
}
KEPT = {"mamba1": 1e-12, "mamba2": 1e-6}  # in float64; transformers computes Mamba-2's norm in float32
RECALL = {  # construction of (n_keys, n_values), pairs, length, least accuracy, least margin
    "mamba1": ({}, 8, 64, 1.0, 0.999),
    "mamba2": ({"mixer": "mamba2"}, 8, 64, 1.0, 0.999),
    "mamba1, constant-weight": ({"key_code": "constant-weight"}, 16, 128, 1.0, 0.0),
    "mamba2, constant-weight": ({"mixer": "mamba2", "key_code": "constant-weight"}, 16, 128, 1.0, 0.0),
    "mamba1, random": ({"key_code": "random", "bits": (256, 32), "seed": 0}, 16, 128, 0.99, -np.inf),
    "mamba2, random": ({"mixer": "mamba2", "key_code": "random", "bits": (256, 32), "seed": 0}, 16, 128, 0.99, -np.inf),
}
REWRITES = [("mamba1", "overwrite"), ("mamba1", "last"), ("mamba2", "last")]


@pytest.fixture(autouse=True)
def _device():
    assert DEVICE == "cpu" or torch.cuda.is_available(), "these tests need a CUDA device"


def outputs(construction, given, backend=None):
    """What the model returns for every token, computed on the device by `backend` of our scan."""
    model, backend = construction.model.to(DEVICE), backend or BACKEND
    inputs = construction.inputs(given).to(DEVICE)
    with mp.attach(model, backend=backend) as probe, torch.no_grad():
        assert probe.backend == backend
        out = model(inputs, **({} if inputs.is_floating_point() else decoding_off(model)))
    out = getattr(out, "logits", out)
    assert out.device.type == DEVICE
    return out.double().cpu().numpy()


def decoding_off(model):
    """transformers' language models keep a cache unless told not to; ours have none."""
    return {"use_cache": False} if hasattr(model, "config") else {}


def worst(out, want):
    return (np.abs(out - want).max(1) / np.abs(want).max(1)).max()


@pytest.mark.parametrize("dtype", PRECISIONS, ids=str)
@pytest.mark.parametrize("name", BLOCKS)
def test_haar(name, dtype):
    build, single, double = BLOCKS[name]
    construction = build(dtype=dtype)
    u = np.random.default_rng(0).standard_normal((4, 1000 if name == "window_sums" else 256))
    error = worst(outputs(construction, u)[:, -1], construction.expected(u))
    print(name, dtype, f"{error:.1e}")
    assert error <= (single if dtype == torch.float32 else double)


def test_haar_through_delta():
    """For float64 alone."""
    construction = haar(256, 3, 128.0, "delta", torch.float64)
    u = np.random.default_rng(0).standard_normal((4, 256)).clip(-3, 3)
    assert worst(outputs(construction, u)[:, -1], construction.expected(u)) <= 1e-9


@pytest.mark.parametrize("dtype", PRECISIONS, ids=str)
@pytest.mark.parametrize("profile", ["ramp", "event"])
@pytest.mark.parametrize("mixer", KEPT)
@pytest.mark.parametrize(("length", "n"), [(256, 0), (256, 128), (256, 255), (16384, 8192)])
def test_keep(length, n, mixer, profile, dtype):
    construction = keep_nth(length=length, n=n, profile=profile, dtype=dtype, mixer=mixer)
    ids = np.random.default_rng(1).integers(0, 16, (2, length))
    out = outputs(construction, ids)[:, -1]
    error = np.abs(out - construction.expected(ids)).max()
    print(length, n, mixer, profile, dtype, f"{error:.1e}")
    assert error <= (KEPT[mixer] if dtype == torch.float64 else 1e-6)
    assert (out[:, :16].argmax(1) == ids[:, n]).all()


@pytest.mark.parametrize("dtype", PRECISIONS, ids=str)
@pytest.mark.parametrize("name", RECALL)
def test_recall(name, dtype, tool):
    more, n_pairs, length, accuracy, margin = RECALL[name]
    task = task_of(batch=8, length=length, n_pairs=n_pairs, vocab=256, seed=7)
    logits = outputs(mqar(n_keys=128, n_values=128, dtype=dtype, **more), task.input_ids)
    assert tool.share(logits.argmax(-1), task.target) >= accuracy
    assert tool.least_margin(logits, task.target) >= margin


@pytest.mark.parametrize("dtype", PRECISIONS, ids=str)
def test_recall_of_a_large_vocabulary(dtype):
    """4,095 keys in 15 states, 64 pairs in 512 tokens."""
    task = task_of(batch=2, length=512, n_pairs=64, vocab=8192, seed=7)
    construction = mqar(n_keys=4096, n_values=4096, key_code="constant-weight", dtype=dtype)
    assert task.accuracy(outputs(construction, task.input_ids).argmax(-1)) == (128, 128)


@pytest.mark.parametrize("dtype", PRECISIONS, ids=str)
@pytest.mark.parametrize(("mixer", "writes"), REWRITES)
def test_recall_of_keys_that_come_again(mixer, writes, dtype, tool):
    ids, target = tool.repeated_keys(n_keys=9, n_values=64, n_pairs=24, batch=16)
    logits = outputs(mqar(mixer, 9, 64, writes=writes, dtype=dtype), ids)
    assert tool.share(logits.argmax(-1), target) == 1
    assert tool.share(outputs(mqar(mixer, 9, 64, dtype=dtype), ids).argmax(-1), target) < 0.5, "adding must fail"


@pytest.mark.parametrize("dtype", PRECISIONS, ids=str)
def test_recall_among_random_filler(dtype, tool):
    task = task_of(batch=8, length=64, n_pairs=8, vocab=128, seed=7)
    construction = mqar_gated(64, 64, n_pairs=8, length=64, dtype=dtype)
    out = torch.tensor(outputs(construction, tool.random_filler(task)))
    assert tool.share(construction.answer(out), task.target) == 1


@pytest.mark.parametrize("dtype", PRECISIONS, ids=str)
@pytest.mark.parametrize("mixer", ["mamba1", "mamba2"])
def test_induction(mixer, dtype, tool):
    ids, target = tool.successors(16, 512, batch=2)
    logits = outputs(induction("every", mixer, 16, dtype=dtype), ids)
    assert tool.share(logits.argmax(-1), target) == 1
    assert tool.least_margin(logits, target) >= 0.999
    for occurrences in (1, 8):
        ids, target = tool.after_special(16, 1024, occurrences, batch=8)
        assert tool.share(outputs(induction("special", mixer, 16, dtype=dtype), ids).argmax(-1), target) == 1


@pytest.mark.parametrize("dtype", PRECISIONS, ids=str)
def test_s4d_runs_on_the_device_by_the_cpu_backend(dtype, tool):
    """Plain torch on CUDA tensors; Triton has no complex A yet."""
    construction = mqar("s4d", 32, 32, dtype=dtype)
    task = task_of(batch=4, length=64, n_pairs=8, vocab=64, seed=7)
    logits = outputs(construction, task.input_ids, backend="cpu")
    assert tool.share(logits.argmax(-1), task.target) == 1
    assert tool.least_margin(logits, task.target) >= 0.999


@pytest.mark.parametrize("dtype", PRECISIONS, ids=str)
def test_s4d_counts_on_the_device(dtype, tool):
    """One earlier occurrence is answered; of many successors the most frequent wins, not the last."""
    ids, target = tool.after_special(8, 256, 1, batch=8)
    predicted = outputs(induction("special", "s4d", 8, dtype=dtype), ids, backend="cpu").argmax(-1)
    assert tool.share(predicted, target) == 1
    ids, target = tool.successors(8, 64, batch=2)
    predicted = outputs(induction("every", "s4d", 8, dtype=dtype), ids, backend="cpu").argmax(-1)
    assert tool.share(predicted, target) < 0.9


def test_s4d_is_refused_by_triton():
    model = mqar("s4d", 8, 8).model.to(DEVICE)
    with pytest.raises(ValueError, match=r'backend "triton" does not support.*Use backend="cpu", on any device'):
        mp.attach(model, backend="triton")
