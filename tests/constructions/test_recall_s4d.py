"""Associative recall without selection: S4D's channels, one for each key bit and value bit."""

import numpy as np
import pytest
import torch

import mamba_probe
from mamba_probe.blocks import S4DBlock
from mamba_probe.constructions import induction, mqar
from mamba_probe.tasks import mqar as task_of

CELLS = [(4, 64, 128, 512), (8, 64, 256, 1280), (16, 128, 512, 2816)]  # pairs, length, vocab, channels
CODES = ["one-hot", "constant-weight"]
WEIGHT = {128: 4, 256: 5, 512: 5, 1024: 6}  # ones in each constant-weight key
BROKEN = {"in_proj.weight": 0.0, "conv1d.bias": -1e3, "kernel.log_A_real": 3.0}


def mixer_of(construction):
    return construction.model.backbone.layers[0].mixer


def read_by(construction, input_ids):
    """Return what the mixer of each token adds to the features, float64 (batch, token, model)."""
    caught = []
    handle = mixer_of(construction).register_forward_hook(lambda module, inputs, output: caught.append(output))
    with torch.no_grad():
        construction.model(construction.inputs(input_ids))
    handle.remove()
    return caught[0].double().numpy()


def test_evaluator_agrees_with_a_random_block(evaluate):
    """Complex A and C, every weight perturbed, and taps that the plain integrator does not have."""
    torch.manual_seed(0)
    block = S4DBlock(5, d_inner=7, d_state=3).double()
    with torch.no_grad():
        for weight in block.parameters():
            weight += 0.3 * torch.randn_like(weight)
        hidden = torch.randn(2, 30, 5, dtype=torch.float64)
        native = block(hidden).numpy()
    assert block.kernel.A_imag.abs().min() > 0
    assert np.abs(evaluate(block, hidden).out - native).max() < 1e-12 * np.abs(native).max()


@pytest.mark.long
@pytest.mark.parametrize("code", CODES)
def test_every_query_is_answered_at_size(code, tool):
    check(code, 32, 256, 1024, 6144, torch.float32, tool)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("code", CODES)
@pytest.mark.parametrize(("n_pairs", "length", "vocab", "channels"), CELLS)
def test_every_query_is_answered(code, n_pairs, length, vocab, channels, dtype, tool):
    check(code, n_pairs, length, vocab, channels, dtype, tool)


def check(code, n_pairs, length, vocab, channels, dtype, tool):
    task = task_of(2, length, n_pairs, vocab, seed=n_pairs)
    construction = mqar("s4d", vocab // 2, vocab // 2, code, dtype=dtype)
    assert construction.sizes == {"model": construction.sizes["model"], "channel": channels, "state": 1}
    logits = tool.logits_of(construction, task.input_ids)
    assert task.accuracy(logits.argmax(-1)) == (task.n_query, task.n_query)
    if code == "one-hot":
        assert tool.least_margin(logits, task.target) >= 0.999
    else:
        read = read_by(construction, task.input_ids)[..., -vocab // 2 :]
        overlap = np.concatenate([np.zeros_like(read), read], axis=-1)
        assert tool.least_margin(overlap, task.target) >= 0.99 / WEIGHT[vocab]


@pytest.mark.parametrize("code", CODES)
def test_numpy_recurrence_gives_the_same_logits(code, evaluate_lm, tool):
    construction, task = mqar("s4d", 16, 16, code, dtype=torch.float64), task_of(2, 32, 5, 32)
    exact = evaluate_lm(construction.model, task.input_ids)
    assert np.abs(tool.logits_of(construction, task.input_ids) - exact).max() < 1e-12
    assert task.accuracy(exact.argmax(-1)) == (10, 10)


@pytest.mark.parametrize("code", CODES)
def test_the_memory_is_that_of_mamba(code, evaluate_lm):
    """The same outer product, in channels instead of states; every token's logits agree."""
    task = task_of(2, 32, 5, 32)
    one, other = (mqar(mixer, 16, 16, code, dtype=torch.float64) for mixer in ("mamba1", "s4d"))
    logits = [evaluate_lm(each.model, task.input_ids) for each in (one, other)]
    assert np.abs(logits[0] - logits[1]).max() < 1e-12


def same_sign(construction):
    """Let a channel add its key and its value, on both tokens: the kernel without the antisymmetry."""
    mixer = mixer_of(construction)
    with torch.no_grad():
        mixer.in_proj.weight.abs_()
        mixer.conv1d.weight.abs_()
    return construction


@pytest.mark.parametrize(("code", "filler"), [("one-hot", "zero"), ("one-hot", "value"), ("constant-weight", "value")])
def test_without_the_antisymmetric_kernel_it_fails(code, filler, tool):
    """A value before a key writes too; of 0.27 to 0.5 of the queries the answer is left."""
    task = task_of(8, 64, 8, 256, seed=3)
    values = np.random.default_rng(0).integers(128, 256, task.input_ids.shape)
    ids = np.where((task.role == "filler") & (filler == "value"), values, task.input_ids)
    construction = same_sign(mqar("s4d", 128, 128, code))
    assert tool.share(tool.logits_of(construction, ids, rows=4).argmax(-1), task.target) < 0.5


def test_writing_at_a_value_before_a_key_is_what_breaks_it(tool):
    """The first pair's value comes before the second pair's key."""
    ids, target = np.array([[3, 20, 5, 27, 3, 0, 5]]), np.array([[-1, -1, -1, -1, 20, -1, 27]])
    assert tool.share(tool.logits_of(mqar("s4d", 16, 16), ids).argmax(-1), target) == 1
    logits = tool.logits_of(same_sign(mqar("s4d", 16, 16)), ids)
    assert logits[0, 6, 20] > 0.9 * logits[0, 6, 27], "the value before key 5 is read as its value too"


def test_adding_fails_on_repeated_keys(tool):
    ids, target = tool.repeated_keys(n_keys=9, n_values=64, n_pairs=24, batch=16)
    assert tool.share(tool.logits_of(mqar("s4d", 9, 64), ids, rows=16).argmax(-1), target) < 0.5


@pytest.mark.parametrize("code", CODES)
def test_random_filler_pollutes_it(code, tool):
    """As in ungated Mamba: about 0.96 and 0.84 at these sizes."""
    task = task_of(48, 64, 4, 128, seed=7)
    logits = tool.logits_of(mqar("s4d", 64, 64, code), tool.random_filler(task), rows=16)
    assert 0.6 < tool.share(logits.argmax(-1), task.target) < (1 if code == "one-hot" else 0.95)


def test_values_that_repeat_break_constant_weight_keys_alone(tool):
    task = task_of(batch=4, length=128, n_pairs=16, vocab=256, seed=3)
    shared = np.where(task.input_ids >= 128, 128 + task.input_ids % 4, task.input_ids)
    target = np.where(task.target >= 0, 128 + task.target % 4, -1)
    accuracy = [tool.share(tool.logits_of(mqar("s4d", 128, 128, c), shared).argmax(-1), target) for c in CODES]
    assert accuracy[0] == 1
    assert accuracy[1] < 0.85


@pytest.mark.parametrize("broken", ["conv1d.weight", *BROKEN])
def test_one_broken_weight_breaks_it(broken, tool):
    """What key 1 reads of itself, its taps, its threshold, its lack of decay."""
    ids, target = np.array([[1, 12, 0, 0, 1]]), np.array([[-1, -1, -1, -1, 12]])
    construction = mqar("s4d", 8, 8)
    of_key = slice(5, 10)  # the channels of its value bits
    with torch.no_grad():
        weight = dict(mixer_of(construction).named_parameters())[broken][of_key]
        weight.copy_(-weight if broken == "conv1d.weight" else torch.tensor(BROKEN[broken]).expand_as(weight))
    assert tool.least_margin(tool.logits_of(construction, ids), target) < 0.5


@pytest.mark.parametrize("seed", range(2))
def test_randomised_twin_is_at_chance(seed, tool):
    task = task_of(batch=8, length=32, n_pairs=6, vocab=64, seed=2)
    twin = mqar("s4d", 32, 32).randomised(seed)
    correct, total = task.accuracy(tool.logits_of(twin, task.input_ids, rows=8).argmax(-1))
    assert total == 48
    assert correct <= 12


BUILDERS = {
    "one-hot": lambda dtype: mqar("s4d", 8, 8, dtype=dtype),
    "constant-weight": lambda dtype: mqar("s4d", 8, 8, "constant-weight", dtype=dtype),
    "random": lambda dtype: mqar("s4d", 8, 8, "random", bits=(6, 5), seed=0, dtype=dtype),
    "induction, special": lambda dtype: induction("special", "s4d", 5, dtype=dtype),
    "induction, every": lambda dtype: induction("every", "s4d", 5, dtype=dtype),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("name", BUILDERS)
def test_what_is_saved_loads_with_equal_logits(name, dtype, tmp_path):
    construction = BUILDERS[name](dtype)
    loaded = mamba_probe.load(construction.save(tmp_path))
    ids = construction.inputs(np.random.default_rng(0).integers(0, 5, (2, 20)))
    with torch.no_grad():
        first, second = construction.model(ids).logits, loaded(ids).logits
    assert first.dtype == dtype
    assert torch.equal(first, second)


@pytest.mark.parametrize("name", BUILDERS)
def test_a_label_for_each_channel_and_state(name):
    construction = BUILDERS[name](torch.float32)
    assert len(construction.channels) == construction.sizes["channel"]
    assert len(construction.states) == construction.sizes["state"] == 1
    assert "S9 1" in construction.describe() or name == "induction, every"
    assert not mixer_of(construction).D.any()


def test_channels_pair_every_key_with_every_value_bit():
    construction = mqar("s4d", 4, 6)
    assert construction.channels[:5] == [f"key and value bit [0, {bit}]" for bit in range(4)] + [
        "key and value bit [1, 0]"
    ]
    assert "16 x key and value bit" in construction.describe()
