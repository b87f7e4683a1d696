"""Edits change what they say, only there, and only inside their block."""

import numpy as np
import pytest
import torch

import mamba_probe as mp

IDS = torch.randint(1, 61, (2, 30), generator=torch.Generator().manual_seed(5))
MASK = torch.ones_like(IDS)
MASK[0, :4] = 0


def out(model, ids=IDS, mask=MASK):
    with torch.no_grad():
        return model(ids, attention_mask=mask).logits[mask.bool()].numpy()


@pytest.mark.parametrize("name", ["delta", "B", "C"])
def test_freezing_at_the_executed_values_changes_nothing_and_at_the_mean_holds_it(model, name):
    native = out(model)
    with mp.attach(model) as probe:
        trace = probe.record(IDS, MASK, layers=[1])
        executed = trace[name].isel(layer=0).fillna(0.0).values
        with probe.edit(mp.freeze(name, layer=1, value=torch.tensor(executed))):
            np.testing.assert_allclose(out(model), native, atol=2e-5 * abs(native).max())
        with probe.edit(mp.freeze(name, layer=1)):
            frozen = probe.record(IDS, MASK, layers=[1])
            changed = out(model)
    assert abs(changed - native).max() > 1e-3
    assert frozen.attrs["edits"] == f"freeze({name}, layer=1)"
    valid = MASK.bool().numpy()
    for row in range(2):
        expected = executed[row][valid[row]].mean(0)
        # B and C are recorded as the projection made them or as the scan received them: as received, so frozen
        np.testing.assert_allclose(
            frozen[name].isel(layer=0, batch=row).values[valid[row]],
            expected[None].repeat(valid[row].sum(), 0),
            rtol=2e-5,
            atol=1e-6,
        )


def test_ablated_conv_is_a_conv_that_passes_the_current_token(model, build):
    twin = build()
    with torch.no_grad():
        for block in twin.backbone.layers:
            block.mixer.conv1d.weight.zero_()[:, 0, -1] = 1.0
            block.mixer.conv1d.bias.zero_()
    with mp.attach(model) as probe, probe.edit(mp.ablate("conv")):
        np.testing.assert_allclose(out(model), out(twin), atol=1e-5)
        edited = model.generate(IDS, max_new_tokens=4, do_sample=False, pad_token_id=0)
    assert (edited == twin.generate(IDS, max_new_tokens=4, do_sample=False, pad_token_id=0)).all()


def test_ablated_c_leaves_the_skip_and_ablated_b_or_delta_writes_nothing(model):
    with mp.attach(model) as probe:
        skip = probe.weights()["D"]
        for name in ("C", "B", "delta"):
            with probe.edit(mp.ablate(name)):
                trace = probe.record(IDS, MASK, variables=["x", "y", "h"])
            expected = skip * trace["x"]
            assert float(abs(trace["y"] - expected).max()) <= 1e-5
            assert (float(abs(trace["h"]).max()) == 0) == (name != "C")


def test_without_decay_a_model_computes_as_with_a_of_zero(model, build):
    twin = build()
    with torch.no_grad():
        for block in twin.backbone.layers:
            block.mixer.A_log.fill_(-80.0)
    with mp.attach(model) as probe, probe.edit(mp.ablate("decay")):
        np.testing.assert_allclose(out(model), out(twin), atol=2e-5)
        trace = probe.record(IDS, MASK, variables=["A_bar", "delta"])
        assert float(trace["A_bar"].min()) == 1
        with pytest.raises(ValueError, match=r"under ablate\(decay\) A_bar is 1 whatever A says"):
            probe.record(IDS, MASK, variables=["A"])


def test_open_gate_passes_the_scan_output(model, float64_free_readout):
    with mp.attach(model) as probe, probe.edit(mp.ablate("gate")):
        trace = probe.record(IDS, MASK, variables=["y", "z", "out"])
    for block in model.backbone.layers:
        one = trace.sel(layer=block.mixer.layer_idx)
        expected = float64_free_readout(block.mixer, one["y"].values)
        difference = np.abs(one["out"].values - expected)[MASK.bool().numpy()]
        assert difference.max() <= 1e-5 * np.abs(one["out"].fillna(0)).values.max()
        assert np.nanstd(one["z"].values) > 0.1, "z is recorded as the model made it"


@pytest.fixture
def float64_free_readout():
    def readout(mixer, y):
        w = {name: tensor.double().numpy() for name, tensor in mixer.state_dict().items()}
        y = y.reshape(*y.shape[:2], -1).astype(np.float64)
        if "norm.weight" in w:
            by_group = "group_size" in vars(mixer.norm)  # transformers 5.23 and newer
            grouped = y.reshape(*y.shape[:2], mixer.n_groups if by_group else 1, -1)
            grouped = grouped / np.sqrt((grouped**2).mean(-1, keepdims=True) + mixer.layer_norm_epsilon)
            y = grouped.reshape(y.shape) * w["norm.weight"]
        return y @ w["out_proj.weight"].T

    return readout


def test_edits_nest_and_end_with_their_block(model):
    native = out(model)
    with mp.attach(model) as probe:
        with probe.edit(mp.ablate("B", layer=0)):
            outer = out(model)
            with probe.edit(mp.ablate("conv", layer=1)):
                inner = out(model)
                assert "ablate(B, layer=0), ablate(conv, layer=1)" in repr(probe)
            assert (out(model) == outer).all()
        assert not np.allclose(inner, outer)
        with pytest.raises(KeyError), probe.edit(mp.ablate("C")):
            raise KeyError
        assert "edits" not in repr(probe)
        np.testing.assert_allclose(out(model), native, atol=2e-5 * abs(native).max())


def test_edits_inside_a_recording_are_written_down_with_their_values(model):
    with mp.attach(model) as probe, probe.recording(variables=["delta"]) as recorder:
        out(model)
        with probe.edit(mp.freeze("delta", layer=1, value=0.5), mp.ablate("gate")):
            out(model)
    trace = recorder.dataset
    assert trace.attrs["edits"] == "ablate(gate); freeze(delta, layer=1, value=0.5)"
    assert (trace["delta"].sel(layer=1).values[2:][trace["valid"].values[2:]] == 0.5).all()
    assert repr(mp.freeze("B", value=torch.ones(3))) == "freeze(B, value=a tensor (3,))"


def test_edit_errors(model):
    with pytest.raises(ValueError, match=r"unknown quantity to freeze 'conv'.*can be ablated"):
        mp.freeze("conv")
    with pytest.raises(ValueError, match=r"unknown quantity to ablate 'gat': did you mean 'gate'"):
        mp.ablate("gat")
    with pytest.raises(ValueError, match=r"one edit a layer"):
        mp.ablate("conv", layer=[0, 1])
    with mp.attach(model) as probe:
        with pytest.raises(ValueError, match=r"unknown layer 7"), probe.edit(mp.ablate("conv", layer=7)):
            pass
        with pytest.raises(ValueError, match=r"edit takes mp.freeze"), probe.edit("conv"):
            pass
        with pytest.raises(ValueError, match=r"cannot be negative"), probe.edit(mp.freeze("delta", value=-1.0)):
            out(model)
        with (
            pytest.raises(ValueError, match=r"broadcasts to \(batch, token"),
            probe.edit(mp.freeze("B", value=torch.ones(5))),
        ):
            out(model)
        with pytest.raises(ValueError, match=r"one token.*value="), probe.edit(mp.freeze("delta")):
            model.generate(IDS, max_new_tokens=3, pad_token_id=0)
        with probe.edit(mp.ablate("conv")), pytest.raises(ValueError, match=r"parity .*leave the `edit` block"):
            probe.parity(IDS)
        task = mp.tasks.mqar(batch=2, length=16, n_pairs=2, vocab=60)
        with probe.edit(mp.ablate("conv")), pytest.raises(ValueError, match=r"intervene .*leave the `edit` block"):
            probe.intervene(task, [])
        with pytest.raises(ValueError, match="NaN or infinity"), probe.edit(mp.freeze("delta", value=float("nan"))):
            out(model)
    with pytest.raises(ValueError, match="detached"), probe.edit(mp.ablate("conv")):
        pass


def test_intervene_counts_answers_with_and_without_the_part():
    model = mp.load("zoo:mqar-mamba1")
    task = mp.tasks.mqar(batch=16, length=64, n_pairs=8, vocab=256, seed=11)
    with mp.attach(model) as probe:
        result = probe.intervene(
            task, [mp.ablate("conv"), mp.ablate("gate"), [mp.ablate("B"), mp.ablate("gate")]], batch_size=5
        )
        with pytest.raises(ValueError, match="takes a Task"):
            probe.intervene(IDS, [])
    assert result["intervention"].values.tolist() == [
        "none",
        "ablate(conv)",
        "ablate(gate)",
        "ablate(B) + ablate(gate)",
    ]
    assert (result["n_query"] == 16 * 8).all()
    n_correct = dict(zip(result["intervention"].values, result["n_correct"].values, strict=True))
    assert n_correct["none"] == 128
    assert n_correct["ablate(conv)"] < 16
    assert n_correct["ablate(B) + ablate(gate)"] < 16
