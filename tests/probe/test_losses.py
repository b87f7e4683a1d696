"""Losses by token: against transformers' own, a softmax written out, and a task's own count."""

import numpy as np
import pytest
import torch
from transformers import MambaConfig, MambaModel

import mamba_probe as mp
from mamba_probe.losses import losses


@pytest.fixture
def ids():
    return torch.randint(1, 61, (3, 12), generator=torch.Generator().manual_seed(4))


def test_the_mean_is_transformers_own_loss(model, ids):
    mask = torch.ones_like(ids)
    mask[1, 9:], mask[2, 4:] = 0, 0
    with torch.no_grad():
        native = model(ids, attention_mask=mask, labels=ids.masked_fill(mask == 0, -100)).loss.item()
    with mp.attach(model) as probe:
        found = losses(probe, ids, mask)
    assert int(found["loss"].count()) == 11 + 8 + 3
    assert found["loss"].mean().item() == pytest.approx(native, rel=1e-6)


def test_each_token_is_a_softmax_written_out_and_padding_is_nan(model, ids):
    mask = torch.ones_like(ids)
    mask[0, :5] = 0
    with torch.no_grad():
        logits = model(ids, attention_mask=mask).logits.double().numpy()
    with mp.attach(model) as probe:
        found = losses(probe, ids, mask)
    for row in range(3):
        for token in range(12):
            scored = token < 11 and mask[row, token] == 1
            loss, correct = found["loss"].values[row, token], found["correct"].values[row, token]
            if not scored:
                assert np.isnan(loss)
                assert np.isnan(correct)
                assert found["target"].values[row, token] == -1
                continue
            each, wanted = logits[row, token], ids[row, token + 1].item()
            assert loss == pytest.approx(np.log(np.exp(each - each[wanted]).sum()), abs=1e-5)
            assert correct == (each.argmax() == wanted)
    assert found["position"].values[0].tolist() == [-1] * 5 + list(range(7))
    assert found.attrs["model_hash"]
    assert found.attrs["scored"] == "every token that another follows"


def test_a_task_is_scored_at_its_queries_alone():
    task = mp.tasks.mqar(batch=8, length=64, seed=3)
    with mp.attach(mp.load("zoo:trained-mqar-mamba1-small")) as probe:
        found, counts = losses(probe, task), probe.intervene(task, [])
    asked = task.target >= 0
    assert np.array_equal(~np.isnan(found["loss"].values), asked)
    assert np.array_equal(~np.isnan(found["correct"].values), asked)
    assert found["correct"].sum().item() == counts["n_correct"].item()
    assert 0 < found["correct"].mean().item() < 1
    assert np.array_equal(found["role"].values, task.role)
    assert found.attrs["task"] == "mqar"
    assert found.attrs["scored"] == "the task's queries"


def test_pieces_of_a_batch_are_the_whole(model, ids):
    with mp.attach(model) as probe:
        whole, pieces = losses(probe, ids), losses(probe, ids, batch_size=2)
    np.testing.assert_allclose(pieces["loss"].values, whole["loss"].values, atol=1e-5)


def test_edits_and_hooks_change_what_is_scored(model, ids):
    with mp.attach(model) as probe:
        plain = losses(probe, ids)
        edited = losses(probe, ids, edits=[mp.zero("y", layer=1)])
        hooked = losses(probe, ids, fwd_hooks=[("blocks.1.mixer.hook_ssm_output", lambda y, hook: 0 * y)])
        again = losses(probe, ids)
    np.testing.assert_allclose(edited["loss"].values, hooked["loss"].values, atol=1e-6)
    assert np.nanmax(np.abs(edited["loss"].values - plain["loss"].values)) > 1e-2
    assert np.array_equal(again["loss"].values, plain["loss"].values, equal_nan=True)
    assert edited.attrs["edits"] == "zero(y, layer=1)"


def test_what_cannot_be_scored_is_refused(model, ids):
    with mp.attach(model) as probe:
        with pytest.raises(ValueError, match="losses needs token ids or a Task"):
            losses(probe, {"inputs_embeds": torch.randn(1, 4, 24)})
        with pytest.raises(ValueError, match="nothing to predict: a row needs two tokens"):
            losses(probe, ids[:, :1])
        with pytest.raises(ValueError, match="unknown layer"):
            losses(probe, ids, edits=[mp.zero("y", layer=7)])
    with pytest.raises(ValueError, match="detached"):
        losses(probe, ids)
    torch.manual_seed(0)
    backbone = MambaModel(MambaConfig(vocab_size=61, hidden_size=24, state_size=4, num_hidden_layers=1)).eval()
    with mp.attach(backbone) as probe, pytest.raises(ValueError, match="MambaModel gives no logits"):
        losses(probe, ids)
