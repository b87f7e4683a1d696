"""The probe on a GPU: our Triton scan inside transformers' models, against the same recording on the CPU."""

import numpy as np
import pytest
import torch

import mamba_probe as mp

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
