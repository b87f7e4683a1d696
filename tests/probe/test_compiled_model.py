"""A probed model under torch.compile: one graph, in which each layer's scan is one operator."""

import warnings

import numpy as np
import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend

import mamba_probe as mp

FAMILIES = ("mamba", "mamba2")


@pytest.fixture(autouse=True)
def _fresh():
    torch._dynamo.reset()


@pytest.fixture(params=["mamba", pytest.param("mamba2", marks=pytest.mark.long)])
def model(request):
    from transformers import Mamba2Config, Mamba2ForCausalLM, MambaConfig, MambaForCausalLM

    torch.manual_seed(0)
    if request.param == "mamba":
        made = MambaForCausalLM(MambaConfig(vocab_size=31, hidden_size=16, state_size=4, num_hidden_layers=2))
    else:
        sizes = {"num_heads": 4, "head_dim": 8, "n_groups": 2, "state_size": 8, "chunk_size": 8}
        made = Mamba2ForCausalLM(Mamba2Config(vocab_size=31, hidden_size=16, num_hidden_layers=2, **sizes))
    with torch.no_grad():
        for parameter in made.parameters():
            parameter += 0.3 * torch.randn_like(parameter)
    return made.eval()


def ids(length, batch=2):
    return torch.randint(0, 31, (batch, length), generator=torch.Generator().manual_seed(length))


def compiled(model, **options):
    counter = CompileCounterWithBackend("aot_eager")
    return torch.compile(model, backend=counter, **options), counter


def scans(graph):
    return sum("mamba_probe.scan" in str(node.target) for node in graph.graph.nodes)


def test_one_graph_serves_ten_lengths(model):
    with mp.attach(model), torch.no_grad():
        run, counter = compiled(model, fullgraph=True)
        for length in (12, 7, 9, 16, 17, 31, 33, 40, 64, 65):
            expected = model(ids(length), use_cache=False).logits
            torch.testing.assert_close(run(ids(length), use_cache=False).logits, expected, rtol=1e-5, atol=1e-5)
        assert counter.frame_count <= 2
        assert all(scans(graph) == 2 for graph in counter.graphs)


def test_gradients_are_those_of_the_model_uncompiled(model):
    def gradients(run):
        model.zero_grad()
        run(ids(12), use_cache=False).logits.square().sum().backward()
        return {name: parameter.grad.clone() for name, parameter in model.named_parameters()}

    untouched = gradients(model)
    with mp.attach(model):
        run, _ = compiled(model, fullgraph=True)
        found = gradients(run)
    for name, value in untouched.items():
        assert value.abs().max() > 0
        torch.testing.assert_close(found[name], value, rtol=1e-4, atol=1e-5 * value.abs().max().item())


def test_a_prompt_and_its_continuation(model):
    def generate(run):
        answer = run(ids(9), use_cache=True)
        logits = [answer.logits]
        for _ in range(3):
            token = logits[-1][:, -1:].argmax(-1)
            answer = run(token, cache_params=answer.cache_params, use_cache=True)
            logits.append(answer.logits)
        return torch.cat(logits, 1)

    with mp.attach(model), torch.no_grad():
        run, counter = compiled(model, fullgraph=True)
        torch.testing.assert_close(generate(run), generate(model), rtol=1e-5, atol=1e-5)
        assert counter.frame_count <= 2


def native(run):
    """Logits of the untouched model, in whose own scan torch warns of a functools.lru_cache; of ours it may not."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*functools.lru_cache")
        return run(ids(12), use_cache=False).logits


def test_attaching_editing_and_detaching_reach_the_compiled_model(model):
    with torch.no_grad():
        run, counter = compiled(model, fullgraph=True)
        untouched = native(run)
        with mp.attach(model) as probe:
            torch.testing.assert_close(run(ids(12), use_cache=False).logits, untouched, rtol=1e-4, atol=1e-4)
            with probe.edit(mp.ablate("B", layer=0), mp.freeze("delta", layer=1)):
                expected = model(ids(12), use_cache=False).logits
                found = run(ids(12), use_cache=False).logits
            torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
            assert (found - untouched).abs().max() > 1e-2
        assert torch.equal(native(run), untouched)
        assert [scans(graph) for graph in counter.graphs] == [0, 2, 2]


def test_recording_breaks_the_graph_and_records_the_same(model):
    def recorded(run):
        with probe.recording(variables=["delta", "B", "h"]) as recorder, torch.no_grad():
            run(ids(12), use_cache=False)
        return recorder.dataset

    with mp.attach(model) as probe:
        expected, found = recorded(model), recorded(compiled(model)[0])
        for name in ("delta", "B", "h", "prediction"):
            np.testing.assert_allclose(found[name], expected[name], rtol=1e-4, atol=1e-5)
        with pytest.raises(torch._dynamo.exc.Unsupported, match=r"Recorder\.wants"):
            recorded(compiled(model, fullgraph=True)[0])
