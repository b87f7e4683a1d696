"""One direction of a trace of several: in the order of its scan, or refused."""

import copy

import numpy as np
import pytest
import torch
from two_ways import WIDTH, BiMambaWrapper, Mamba
from two_ways_oracle import apart, built, ids_of, logits

import mamba_probe as mp
from mamba_probe.analyses import hidden_attention, memory_horizon
from mamba_probe.analyses.common import Canonical
from mamba_probe.analyses.recall_circuit.static import check_weights
from mamba_probe.trace import open_trace, require

BOUND = 2e-6


def swapped(mixer):
    """The layer with its two directions exchanged."""
    other = copy.deepcopy(mixer)
    if isinstance(mixer, BiMambaWrapper):
        other.mamba_fwd, other.mamba_rev = other.mamba_rev, other.mamba_fwd
        return other
    for name in ("A_log", "D", "conv1d", "x_proj", "dt_proj"):
        back = "A_b_log" if name == "A_log" else f"{name}_b"
        first, second = getattr(mixer, name), getattr(mixer, back)
        setattr(other, name, copy.deepcopy(second))
        setattr(other, back, copy.deepcopy(first))
    return other


@pytest.mark.parametrize("kind", ["vim", "caduceus"])
def test_the_backward_direction_is_the_forward_one_of_the_flipped_sequence(kind):
    mixer = built(kind).layers[0].mixer
    hidden = torch.randn(2, 11, WIDTH, generator=torch.Generator().manual_seed(1))
    names = ("delta", "A", "B", "C", "h", "x", "y", "delta_cumsum")
    with mp.attach(mixer) as probe:
        trace, weights = probe.record(hidden, variables=names), probe.weights()
    with mp.attach(swapped(mixer)) as probe:
        expected = probe.record(hidden.flip(1), variables=names).sel(direction="forward")
    back = trace.probe.along("backward")
    for name in names:
        assert apart(back[name].values, expected[name].values) <= BOUND, name
    assert back["token"].values.tolist() == list(range(11))
    assert back["position"].values.tolist() == [list(range(11))] * 2
    found, wanted = (memory_horizon.measure(each, n_bootstrap=5) for each in (back, expected))
    for name in ("forward_horizon", "lti_horizon"):
        np.testing.assert_allclose(found[name], wanted[name], rtol=1e-4)
    attended = hidden_attention.measure(back, weights=weights.sel(direction="backward"), query_tokens=[10])
    assert attended.attrs["identity"].startswith("asserted at every query")
    with pytest.raises(ValueError, match="weights are of direction forward, backward, the trace of backward"):
        check_weights(weights, Canonical(back, "delta", "A"))
    with pytest.raises(ValueError, match="weights are of direction forward, the trace of backward"):
        hidden_attention.measure(back, weights=weights.sel(direction="forward"), query_tokens=[10])


def recorded(kind="vim", **options):
    with mp.attach(built(kind)) as probe:
        return probe.record(ids_of(), **options)


def test_an_analysis_refuses_what_is_not_in_the_order_of_time():
    trace = recorded()
    with pytest.raises(ValueError, match=r"2 direction\(s\), forward, backward.*trace.sel\(direction=\"forward\"\)"):
        memory_horizon.measure(trace)
    with pytest.raises(ValueError, match=r"from the last to the first.*trace.probe.along\(\"backward\"\)"):
        memory_horizon.measure(trace.sel(direction="backward"))
    for one_way in (trace.sel(direction="forward"), trace.probe.along("forward"), trace.probe.along("backward")):
        require(one_way, "delta", "A")
    again = trace.sel(direction="backward").probe.along("backward")
    assert again.identical(trace.probe.along("backward"))
    with pytest.raises(ValueError, match="in the order of its direction, backward, already"):
        again.probe.along("backward")
    with pytest.raises(ValueError, match="unknown direction 'backwards': did you mean 'backward'"):
        trace.probe.along("backwards")
    with pytest.raises(ValueError, match="unknown direction 'forward'"):
        trace.sel(direction="backward").probe.along("forward")
    with pytest.raises(ValueError, match="needs names among"):
        require(trace.assign_coords(direction=["forward", "sideways"]))
    with pytest.raises(ValueError, match="needs names among"):
        require(trace.drop_vars("direction"))
    with pytest.raises(ValueError, match="lost the coordinate `direction`"):
        memory_horizon.measure(trace.sel(direction="backward", drop=True))
    with mp.attach(Mamba(WIDTH)) as probe, pytest.raises(ValueError, match="has no direction"):
        probe.record(torch.randn(1, 4, WIDTH)).probe.along("forward")


def test_reverse_complements_say_which_way_they_went():
    trace = recorded("rcps")
    require(trace.sel(direction="rc_backward"), "delta")
    with pytest.raises(ValueError, match="holds direction rc_forward"):
        require(trace.sel(direction="rc_forward"), "delta")
    back = trace.probe.along("rc_forward")
    np.testing.assert_array_equal(back["delta"].values, trace["delta"].values[:, :, ::-1, :, 2])


def test_rows_of_unequal_length_are_reversed_each_from_its_own_end():
    model = built("caduceus")
    with mp.attach(model) as probe:
        with probe.recording(variables=("delta", "A", "delta_cumsum")) as recorder:
            for length in (5, 9):
                logits(model, ids_of(length, batch=1))
        alone = probe.record(ids_of(5, batch=1), variables=("delta", "A"))
    back = recorder.dataset.probe.along("backward")
    assert back["valid"].values.tolist() == [[False] * 4 + [True] * 5, [True] * 9]
    assert back["position"].values.tolist() == [[-1] * 4 + list(range(5)), list(range(9))]
    assert back["token"].values.tolist() == list(range(9))
    np.testing.assert_array_equal(back["delta"].values[:, 0, 4:], alone.probe.along("backward")["delta"].values[:, 0])
    assert np.all(np.diff(back["delta_cumsum"].values[:, 1], axis=1) > 0)
    measured = memory_horizon.measure(back.isel(batch=[0]), n_bootstrap=5)["lti_horizon"]
    wanted = memory_horizon.measure(alone.probe.along("backward"), n_bootstrap=5)["lti_horizon"]
    np.testing.assert_array_equal(measured, wanted)


def test_a_task_is_asked_in_the_order_of_the_direction():
    trace = recorded()
    source = np.full((2, 9), -1)
    source[:, 7] = 2
    back = trace.assign_coords(source_token=(("batch", "token"), source)).probe.along("backward")
    assert back["source_token"].values[:, 1].tolist() == [6, 6]
    assert (back["source_token"] == -1).sum() == 16
    np.testing.assert_array_equal(back["token_id"].values, trace["token_id"].values[:, ::-1])


@pytest.mark.parametrize("suffix", [".zarr", ".nc"])
def test_a_store_keeps_the_directions(tmp_path, suffix):
    trace = recorded("rcps")
    trace.probe.save(tmp_path / f"trace{suffix}")
    opened = open_trace(tmp_path / f"trace{suffix}")
    assert opened.load().identical(trace)
    back = trace.probe.along("backward")
    back.probe.save(tmp_path / f"back{suffix}")
    again = open_trace(tmp_path / f"back{suffix}")
    require(again, "delta")
    np.testing.assert_array_equal(again["delta"].values, back["delta"].values)
