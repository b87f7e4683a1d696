"""Where a recording keeps its tensors: the same bits either way, whole calls only, nothing that a model can undo."""

import numpy as np
import pytest
import torch

import mamba_probe as mp
from mamba_probe import keeping
from mamba_probe.keeping import Courier, Kept
from mamba_probe.kernels.emission import EMITTABLE, Emit
from mamba_probe.listening import listen
from mamba_probe.trace.schema import VARIABLES

IDS = torch.randint(1, 61, (3, 21), generator=torch.Generator().manual_seed(7))
KEEPS = ["host", "device"]


class Executed:
    """A listener that copies what each layer executed, there and then: the oracle of every recording."""

    def __init__(self, names):
        self.names, self.arrays = names, {}

    def wants(self, layer, continues, length):
        return Emit(tuple(name for name in self.names if name in EMITTABLE))

    def receive(self, call):
        for name in self.names:
            tensor = call.tensors[name].detach()
            wide = tensor.to(torch.promote_types(tensor.dtype, torch.float32)).cpu().numpy().copy()
            self.arrays[call.layer, name] = wide


def executed(probe, ids, names, mask=None):
    listener = Executed(names)
    listen(probe._taps, listener)
    try:
        with torch.no_grad():
            probe.model(ids, attention_mask=mask)
    finally:
        listen(probe._taps, None)
    return listener.arrays


def steps(family):
    return tuple(name for name, spec in VARIABLES.items() if spec.dims(family) and not spec.static(family))


@pytest.mark.parametrize("keep", KEEPS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_trace_has_the_bits_that_were_executed(build, family, keep, dtype):
    model, names = build(num_hidden_layers=3).to(dtype), steps(family)
    with mp.attach(model) as probe:
        expected = executed(probe, IDS, names)
        with torch.no_grad(), probe.recording(variables=names, layers=[2, 0], keep=keep) as recorder:
            model(IDS)
    assert recorder.dataset["layer"].values.tolist() == [0, 2]
    for name in names:
        for layer in (0, 2):
            found, wanted = recorder.dataset[name].sel(layer=layer).values, expected[layer, name]
            np.testing.assert_array_equal(found, wanted.reshape(found.shape))
            assert found.dtype == wanted.dtype, name


def test_both_ways_make_one_trace_of_rows_steps_and_padding(model):
    mask = torch.ones_like(IDS)
    mask[1, 16:] = 0
    traces = []
    for keep in KEEPS:
        recording = {"variables": ["delta", "x", "h", "delta_cumsum"], "keep": keep}
        with mp.attach(model) as probe, torch.no_grad(), probe.recording(**recording) as recorder:
            model.generate(IDS, max_new_tokens=4, pad_token_id=0, do_sample=False)
            model(IDS, attention_mask=mask)
            model.backbone(IDS[:1, :4])
        traces.append(recorder.dataset)
    host, device = traces
    assert host.drop_attrs(deep=False).identical(device.drop_attrs(deep=False))
    assert host["valid"].values.sum(1).tolist() == [24, 24, 24, 21, 16, 21, 4]
    total = host["delta"].values[:, :3, :24].astype(np.float64).cumsum(2)
    np.testing.assert_allclose(host["delta_cumsum"].values[:, :3, :24], total, rtol=1e-6)


def test_tensors_stay_on_the_device_as_they_were_executed(build):
    model = build().to(torch.bfloat16)
    with mp.attach(model) as probe, torch.no_grad():
        with probe.recording(variables=["delta", "B", "out"], keep="device") as recorder:
            model(IDS)
            model(IDS.flip(1))
            with pytest.raises(ValueError, match="nothing recorded yet"):
                recorder.dataset  # noqa: B018
        first, second = recorder.tensors
        before = {key: tensor.clone() for key, tensor in first.items()}
        model(IDS)
    assert set(first) == set(second) == {(layer, name) for layer in (0, 1) for name in ("delta", "B", "out")}
    assert (first[0, "delta"].dtype, first[0, "out"].dtype) == (torch.float32, torch.bfloat16)
    trace = recorder.dataset
    assert trace is recorder.dataset
    assert trace.sizes["batch"] == 6
    for (layer, name), tensor in recorder.tensors[0].items():
        assert torch.equal(tensor, before[layer, name]), "readable after the trace was made"
        found = trace[name].sel(layer=layer).values[:3]
        np.testing.assert_array_equal(found, tensor.float().numpy().reshape(found.shape))


@pytest.mark.parametrize("keep", KEEPS)
def test_what_the_model_writes_over_stays_as_it_was(model, keep):
    with mp.attach(model) as probe:
        expected = executed(probe, IDS, ("out", "u"))
        handles = [
            layer.mixer.register_forward_hook(lambda _m, _a, out: out.zero_()) for layer in model.backbone.layers
        ]
        with torch.no_grad(), probe.recording(variables=["out", "u"], layers=[0], keep=keep) as recorder:
            model(IDS)
        for handle in handles:
            handle.remove()
    for name in ("out", "u"):
        np.testing.assert_array_equal(recorder.dataset[name].values[0], expected[0, name])


@pytest.mark.parametrize("keep", KEEPS)
def test_an_exception_in_a_forward_leaves_whole_calls_and_nothing_open(model, keep, tmp_path):
    outcomes = iter([None, RuntimeError("planned"), None])

    def fail(*_args):
        error = next(outcomes)
        if error is not None:
            raise error

    with mp.attach(model) as probe, torch.no_grad():
        alone = probe.record(IDS, variables=["delta"])
        handle = model.backbone.layers[1].register_forward_pre_hook(fail)
        with probe.recording(variables=["delta"], keep=keep, store=tmp_path / "run.nc") as recorder:
            model(IDS)
            with pytest.raises(RuntimeError, match="planned"):
                model(IDS[:1])
            assert all(tap.call is None for tap in probe._taps.values())
            model(IDS)
        handle.remove()
        assert recorder.n_calls == 2
        assert all(tap.listener is None for tap in probe._taps.values())
        again = probe.record(IDS, variables=["delta"])
    np.testing.assert_array_equal(again["delta"], alone["delta"])
    for trace in (recorder.dataset, mp.open_trace(tmp_path / "run.nc")):
        np.testing.assert_array_equal(trace["delta"], np.concatenate([alone["delta"]] * 2, axis=1))


@pytest.mark.parametrize("keep", KEEPS)
def test_a_broken_call_is_named_and_left_out(model, keep):
    with mp.attach(model) as probe, torch.no_grad(), probe.recording(variables=["out", "B"], keep=keep) as recorder:
        model(IDS)
        model.backbone.layers[1].norm.weight[0] = float("inf")
        with pytest.raises(ValueError, match=r"`out` of layer 1 is NaN or infinite at token 0 of row 0 \(63 tokens"):
            model(IDS)
    assert recorder.dataset.sizes["batch"] == 3


def test_a_sum_that_overflows_is_a_suspect_and_no_more():
    kept = Kept([4], Courier(), "host")
    kept.put(4, {"x": torch.full((1, 2, 3), 3e38), "z": torch.ones(1, 2, 3), "y": torch.tensor([[[float("nan")]]])})
    assert kept.suspects() == [(4, "x"), (4, "y")]
    assert np.isfinite(kept.array(4, "x")).all()
    assert kept.take("z").shape == (1, 1, 2, 3)


@pytest.mark.parametrize("keep", KEEPS)
@pytest.mark.parametrize("order", [(3, 5, 8, 9), (8, 9, 3, 5), (9, 8, 5, 3)])
@pytest.mark.parametrize("parcel", [1, 100, 200, 2**30])
def test_layers_that_travel_together_arrive_each_at_its_place(monkeypatch, parcel, order, keep):
    monkeypatch.setattr(keeping, "PARCEL", parcel)
    made = {layer: torch.randn(2, 3, 4).to(torch.bfloat16 if layer == 8 else torch.float32) for layer in order}
    made[5][1, 2, 3], made[9][0, 0, 0] = float("nan"), float("inf")
    kept = Kept((3, 5, 8, 9), Courier(), keep)
    for layer in order:
        kept.put(layer, {"x": made[layer], "z": -made[layer].transpose(1, 2)})
    assert set(kept.suspects()) == {(layer, name) for layer in (5, 9) for name in "xz"}
    assert kept.suspects() == []
    expected = np.stack([made[layer].float().numpy() for layer in (3, 5, 8, 9)])
    np.testing.assert_array_equal(kept.array(8, "x"), expected[2])
    np.testing.assert_array_equal(kept.take("x"), expected)
    np.testing.assert_array_equal(kept.take("z"), -expected.swapaxes(2, 3))


def test_of_several_broken_layers_the_first_is_named(model):
    with mp.attach(model) as probe, torch.no_grad(), probe.recording(variables=["B", "out"]):
        model.backbone.layers[0].mixer.out_proj.weight[0, 0] = float("nan")
        with pytest.raises(ValueError, match="`out` of layer 0 is NaN or infinite"):
            model(IDS)


def test_refusals(model):
    with mp.attach(model) as probe:
        with (
            pytest.raises(ValueError, match=r"unknown keep 'devise': did you mean 'device'\?"),
            probe.recording(keep="devise"),
        ):
            pass
        with torch.no_grad(), probe.recording() as recorder:
            model(IDS)
        with pytest.raises(ValueError, match=r'went to the host, see `dataset`.*keep="device"'):
            recorder.tensors  # noqa: B018
