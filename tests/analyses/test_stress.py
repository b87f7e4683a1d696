"""Models whose step sizes and decays are at the ends of float32: clean traces, or our error; and what is measured."""

import numpy as np
import pytest
import torch

import mamba_probe as mp
from mamba_probe.analyses import hidden_attention, memory_horizon, state_dynamics

IDS = torch.randint(1, 61, (2, 8), generator=torch.Generator().manual_seed(0))
VARIABLES = ("delta", "A", "B", "C", "A_bar", "h", "y", "delta_cumsum")


def recorded(model, bias=None, A_log=None):
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if bias is not None and name.endswith(("dt_bias", "dt_proj.bias")):
                parameter.fill_(bias)
            if A_log is not None and name.endswith("A_log"):
                parameter.fill_(A_log)
    with mp.attach(model) as probe:
        return probe.record(IDS, variables=VARIABLES)


@pytest.mark.filterwarnings("ignore:overflow encountered in multiply:RuntimeWarning")  # delta A = -inf: A_bar is 0
@pytest.mark.parametrize(("bias", "A_log"), [(-1e4, 0.0), (-1e4, 88.0), (1e4, -104.0), (1e4, 88.0)])
def test_a_trace_is_finite_and_its_decay_is_the_recorded_one(model, bias, A_log):
    trace = recorded(model, bias, A_log)
    for name in VARIABLES:
        assert np.isfinite(trace[name]).all(), name
    lazy = trace.drop_vars("A_bar").probe.A_bar.compute()
    np.testing.assert_allclose(lazy, trace["A_bar"], atol=2e-7)


@pytest.mark.parametrize("bias", [None, -1e4])
def test_an_infinite_A_is_refused_by_name(model, bias):
    with pytest.raises(ValueError, match=r"`A` of layer 0 holds \d+ NaN or infinite values.*A_log"):
        recorded(model, bias, 100.0)


def test_nothing_is_written_and_nothing_forgotten(build):
    """delta = 0: every horizon is past the recording, and what would divide by nothing is NaN, as its page says."""
    trace = recorded(build(time_step_limit=(0.0, float("inf"))) if build.__name__ == "tiny_mamba2" else build(), -1e4)
    assert not trace["delta"].any()
    assert (trace["A_bar"] == 1).all()
    horizon = memory_horizon.measure(trace)
    for name in ("forward_horizon", "backward_horizon", "lti_horizon", "half_life"):
        assert np.isposinf(horizon[name]).all(), name
    assert horizon["selectivity_gain"].isnull().all(), "inf over inf"
    assert np.isposinf(state_dynamics.measure(trace)["half_life"]).all()
    assert hidden_attention.measure(trace)["entropy"].isnull().all(), "shares of nothing"


def test_everything_is_forgotten_at_once(model):
    """A_bar = 0 or next to it: a horizon is one token."""
    trace = recorded(model, 1e4, 0.0) if model.config.model_type == "mamba" else recorded(model, 1e4, 20.0)
    assert not trace["A_bar"].any()
    horizon = memory_horizon.measure(trace)
    assert (horizon["forward_horizon"].sel(quantile=0.5) == 1).all()
    assert (horizon["lti_horizon"] < 1).all()
    assert np.isfinite(horizon["half_life"]).all()
    assert (hidden_attention.measure(trace)["mean_distance"] == 0).all()
