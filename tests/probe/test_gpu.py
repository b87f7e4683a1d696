"""The probe on a GPU: our Triton scan inside transformers' models, against the same recording on the CPU."""

from typing import Any

import numpy as np
import pytest
import torch

import mamba_probe as mp
from mamba_probe import recorder as recorder_module
from mamba_probe.keeping import Courier
from mamba_probe.kernels.emission import EMITTABLE, Emit
from mamba_probe.listening import listen

pytestmark = pytest.mark.gpu
VARIABLES = ("delta", "A_bar", "B", "C", "x", "z", "y", "h", "out")


@pytest.mark.parametrize("padded", [False, True])
def test_a_cuda_recording_is_the_cpu_recording(model, padded):
    ids = torch.randint(1, 61, (3, 200), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids)
    mask[0, :9] = 0 if padded else 1
    with mp.attach(model) as probe:
        cpu, text = probe.record(ids, mask, variables=VARIABLES), model.generate(ids, max_new_tokens=5, pad_token_id=0)
    model.cuda()
    with mp.attach(model) as probe:
        assert probe.backend == "triton"
        gpu, parity = probe.record(ids, mask, variables=VARIABLES), probe.parity(ids, mask)
        steps = model.generate(ids.cuda(), max_new_tokens=5, pad_token_id=0).cpu()
    assert (text == steps).all()
    assert float(parity["out_vs_native"].max()) <= 2e-6
    for name in VARIABLES:
        a, b = gpu[name].values, cpu[name].values
        assert np.nanmax(np.abs(a - b)) <= 2e-5 * np.nanmax(np.abs(b)), name


def test_the_main_job_on_cuda():
    model = mp.load("zoo:mqar-mamba1", device="cuda")
    task = mp.tasks.mqar(batch=16, length=64, n_pairs=8, vocab=256, seed=3)
    with mp.attach(model) as probe:
        edits = probe.intervene(task, [mp.ablate("conv")])
    assert edits["n_correct"].values[0] == edits["n_query"].values[0]
    assert edits["n_correct"].values[1] < 16


def test_bf16_model_at_a_real_size():
    from transformers import MambaConfig, MambaForCausalLM

    torch.manual_seed(0)
    config = MambaConfig(vocab_size=1000, hidden_size=768, num_hidden_layers=4)
    model = MambaForCausalLM(config).eval().to("cuda", torch.bfloat16)
    ids = torch.randint(1, 1000, (2, 1024), generator=torch.Generator().manual_seed(0))
    with mp.attach(model) as probe:
        parity = probe.parity(ids)
        trace = probe.record(ids)
    assert trace["delta"].dtype == np.float32
    assert (parity["out_vs_oracle"] <= 2 * parity["native_vs_oracle"]).all()


def _wide(layers=6) -> Any:
    from transformers import MambaConfig, MambaForCausalLM

    torch.manual_seed(0)
    config = MambaConfig(vocab_size=1000, hidden_size=256, num_hidden_layers=layers)
    return MambaForCausalLM(config).eval().to("cuda", torch.bfloat16)


def _written_over(out):
    """The same numbers, in fresh memory; the old is filled with others."""
    fresh = out.clone()
    out.fill_(7.0)
    return fresh


def _executed(probe, ids, names):
    """What each layer executed, copied there and then while the device waits: the oracle of every recording."""
    arrays = {}

    class Listener:
        def wants(self, layer, continues, length):
            return Emit(tuple(name for name in names if name in EMITTABLE))

        def receive(self, call):
            torch.cuda.synchronize()
            arrays.update({(call.layer, name): call.tensors[name].float().cpu().numpy() for name in names})

    listen(probe._taps, Listener())
    try:
        probe.model(ids)
    finally:
        listen(probe._taps, None)
    return arrays


@pytest.mark.parametrize("keep", ["host", "device"])
@pytest.mark.parametrize("in_flight", [1, 2**20, 2**40])
@torch.no_grad()
def test_copies_beside_the_model_have_the_bits_that_were_executed(keep, in_flight, monkeypatch):
    monkeypatch.setattr(recorder_module, "Courier", lambda: Courier(in_flight))
    model, names = _wide(), ("delta", "B", "C", "x", "z", "out")
    ids = torch.randint(1, 1000, (2, 2048), device="cuda")
    with mp.attach(model) as probe:
        expected = _executed(probe, ids, names)
        for layer in model.backbone.layers:  # the model writes over its output as soon as the recorder has it
            layer.mixer.register_forward_hook(lambda _m, _a, out: _written_over(out))
        for _ in range(3):
            with probe.recording(variables=names, keep=keep) as recorder:
                model(ids)
            model(ids.flip(1))  # what was freed is used again
            for (layer, name), wanted in expected.items():
                found = recorder.dataset[name].sel(layer=layer).values
                np.testing.assert_array_equal(found, wanted.reshape(found.shape), err_msg=f"{name} {layer}")
    if keep == "device":
        assert all(tensor.is_cuda for tensor in recorder.tensors[0].values())
        assert recorder.tensors[0][0, "B"].dtype == torch.bfloat16


@torch.no_grad()
def test_what_waits_for_its_copy_is_bounded(monkeypatch):
    model, ids = _wide(layers=24), torch.randint(1, 1000, (2, 4096), device="cuda")
    one = 2 * 4096 * 512 * 4

    def peak(in_flight):
        monkeypatch.setattr(recorder_module, "Courier", lambda: Courier(in_flight))
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        with probe.recording(variables=["delta"]):
            model(ids)
        return torch.cuda.max_memory_allocated() - before

    with mp.attach(model) as probe:
        model(ids)
        assert peak(2 * one) <= peak(0) + 3 * one


@torch.no_grad()
def test_an_exception_while_copies_are_under_way():
    model, ids = _wide(), torch.randint(1, 1000, (2, 2048), device="cuda")
    outcomes = iter([None, RuntimeError("planned"), None])

    def fail(*_args):
        error = next(outcomes)
        if error is not None:
            raise error

    with mp.attach(model) as probe:
        alone = probe.record(ids)
        handle = model.backbone.layers[4].register_forward_pre_hook(fail)
        with probe.recording() as recorder:
            model(ids)
            with pytest.raises(RuntimeError, match="planned"):
                model(ids[:1])
            model(ids)
        handle.remove()
    for name in ("delta", "B", "C"):
        both = np.concatenate([alone[name].values] * 2, axis=1)
        np.testing.assert_array_equal(recorder.dataset[name].values, both)


def test_the_jacobian_on_cuda_is_the_cpus(model):
    """Reverse mode goes through the Triton scan's own backward."""
    ids = torch.randint(1, 61, (2, 20), generator=torch.Generator().manual_seed(0))
    with mp.attach(model) as probe:
        cpu = probe.jacobian(ids, layer=probe.layers[0], query_tokens=[5, 19])["jacobian"].values
    model.cuda()
    with mp.attach(model) as probe:
        gpu = probe.jacobian(ids, layer=probe.layers[0], query_tokens=[5, 19])["jacobian"].values
        with pytest.raises(ValueError, match="no forward-mode derivative"):
            probe.jacobian(ids, layer=probe.layers[0], source_tokens=[3])
    assert np.abs(gpu - cpu).max() <= 2e-5 * np.abs(cpu).max()
