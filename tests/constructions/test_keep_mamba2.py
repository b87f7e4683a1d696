"""keep_nth in Mamba-2: the same answer through one head, its gated norm undone at the last token."""

import numpy as np
import pytest
import torch

import mamba_probe as mp
from mamba_probe import blocks
from mamba_probe.constructions import keep_nth

GRID = [(16, 0), (16, 15), (64, 32), (256, 100), (1024, 512)]
PROFILES = ["ramp", "event"]
NOTED = {8.0: (5.3e-2, 7.8e-2), 16.0: (1.0e-3, 1.4e-3), 32.0: (3.5e-7, 4.6e-7), 64.0: (3.8e-14, 5.1e-14)}


def build(length=64, n=20, profile="ramp", dtype=torch.float64, **more):
    return keep_nth(length=length, n=n, profile=profile, dtype=dtype, mixer="mamba2", **more)


def tokens(length, n_tokens=16):
    """Rows in which the token before and after any kept one is another."""
    return (np.array([[3], [11]]) + np.arange(length)) % n_tokens


def one_hot(ids, n, n_tokens=16):
    return np.eye(n_tokens + 2)[ids[:, n]]


def last(construction, ids, evaluate):
    return evaluate(construction.model, construction.inputs(ids)).out[:, -1]


def native(model, hidden):
    with torch.no_grad():
        return model(hidden)[:, -1].double().numpy()


def own_block(construction, backend):
    """The same weights in our block, whose norm keeps float64, as transformers' does not."""
    weights = construction.model.state_dict()
    model, channel = weights["out_proj.weight"].shape
    block = blocks.Mamba2Block(model, n_heads=1, d_inner=channel, d_state=1, backend=backend).to(construction.dtype)
    block.load_state_dict(weights)
    return block


@pytest.mark.parametrize("profile", PROFILES)
@pytest.mark.parametrize(("length", "n"), GRID)
def test_float64_recurrence_returns_token_n(length, n, profile, evaluate):
    construction, ids = build(length, n, profile), tokens(length)
    assert np.abs(last(construction, ids, evaluate) - one_hot(ids, n)).max() <= 1e-12
    assert np.array_equal(construction.expected(ids), one_hot(ids, n))


@pytest.mark.parametrize("profile", PROFILES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize(("length", "n"), GRID)
def test_transformers_returns_token_n(length, n, dtype, profile):
    """In float64, too, its scan and norm are computed in float32."""
    construction, ids = build(length, n, profile, dtype), tokens(length)
    assert type(construction.model).__name__ == "Mamba2Mixer"
    out = native(construction.model, construction.inputs(ids))
    assert np.abs(out - one_hot(ids, n)).max() <= 1e-6
    assert (out[:, :16].argmax(1) == ids[:, n]).all()


@pytest.mark.parametrize("profile", PROFILES)
@pytest.mark.parametrize("backend", ["naive", "cpu"])
def test_our_block_holds_the_weights_and_float64(backend, profile):
    construction, ids = build(256, 100, profile), tokens(256)
    out = native(own_block(construction, backend), construction.inputs(ids))
    assert np.abs(out - one_hot(ids, 100)).max() <= 1e-12


@pytest.mark.long
@pytest.mark.parametrize("n", [0, 8192, 16383])
@pytest.mark.parametrize("profile", PROFILES)
def test_long_sequences(n, profile, evaluate):
    ids, single = tokens(16384), build(16384, n, profile, torch.float32)
    assert np.abs(last(build(16384, n, profile), ids, evaluate) - one_hot(ids, n)).max() <= 1e-12
    out = native(single.model, single.inputs(ids))
    assert np.abs(out - one_hot(ids, n)).max() <= 1e-6
    assert (out[:, :16].argmax(1) == ids[:, n]).all()


@pytest.mark.parametrize("mixer", ["mamba1", "mamba2"])
@pytest.mark.parametrize("beta", NOTED)
def test_the_noted_errors_and_bounds(beta, mixer, evaluate):
    """The first token, with none before it to outlive, errs less."""
    (error, bound), ids, errors = NOTED[beta], tokens(1024), []
    for n in (0, 512, 1023):
        construction = keep_nth(length=1024, n=n, beta=beta, dtype=torch.float64, mixer=mixer)
        errors.append(np.abs(last(construction, ids, evaluate) - one_hot(ids, n)).max())
        assert errors[-1] <= construction.bound
        assert construction.bound == pytest.approx(bound, rel=0.1)
    assert max(errors) == pytest.approx(error, rel=0.1)
    assert errors[0] < error / 3


@pytest.mark.parametrize("beta", [8.0, 16.0, 24.0])
def test_bound_of_the_event_holds(beta, evaluate):
    """It counts an error of the kept channel, which the norm takes away, as if it stayed."""
    construction, ids = build(64, 0, "event", beta=beta), np.r_[7, np.full(63, 2)][None]
    error = np.abs(last(construction, ids, evaluate) - one_hot(ids, 0)).max()
    assert construction.bound / (3 * beta) < error <= construction.bound


def test_no_bound_where_the_error_exceeds_what_is_kept():
    assert build(beta=1.0).bound is None
    assert "error bound: none" in build(beta=1.0).describe()
    assert keep_nth(beta=1.0).bound > 1


def test_up_to_n_each_token_returns_its_own_code(evaluate):
    """The norm makes up for the size of delta; it is the last token's output that is claimed."""
    construction, ids = build(64, 20), tokens(64)
    out = evaluate(construction.model, construction.inputs(ids)).out
    assert np.abs(out[:, :21] - np.eye(18)[ids[:, :21]]).max() < 1e-4
    assert np.abs(out[:, 21:] - one_hot(ids, 20)[:, None]).max() < 1e-12
    event = build(64, 20, "event")
    assert np.abs(evaluate(event.model, event.inputs(ids)).out[:, :20]).max() < 1e-12


def test_it_describes_itself():
    construction = build()
    assert repr(construction) == "Construction(keep_nth: Mamba2Mixer, model=18, channel=18, state=1, head=1, float64)"
    assert "16 x token, 2 x padding" in construction.describe()
    assert "only the last token's is claimed" in construction.describe()
    assert "norm" not in keep_nth().describe()


@pytest.mark.parametrize("profile", PROFILES)
def test_it_loads_from_a_directory(profile, tmp_path):
    construction, ids = build(64, 20, profile, torch.float32), tokens(64)
    loaded = mp.load(construction.save(tmp_path))
    hidden = construction.inputs(ids)
    assert type(loaded) is type(construction.model)
    assert np.array_equal(native(loaded, hidden), native(construction.model, hidden))


@pytest.mark.parametrize("profile", PROFILES)
def test_randomised_twin_fails(profile, evaluate):
    construction, ids = build(64, 20, profile), tokens(64)
    assert np.abs(last(construction.randomised(1), ids, evaluate) - one_hot(ids, 20)).max() > 0.3


@pytest.mark.parametrize("name", ["in_proj.weight", "dt_bias", "out_proj.weight", "norm.weight"])
def test_one_broken_weight_breaks_it(name, evaluate):
    construction, ids = build(64, 32), tokens(64)
    weight = dict(construction.model.named_parameters())[name]
    with torch.no_grad():
        if name == "in_proj.weight":
            weight[-1] *= 0.9  # of the one head's dt
        else:
            weight *= 0.9
    assert np.abs(last(construction, ids, evaluate) - one_hot(ids, 32)).max() > 1e-3


@pytest.mark.parametrize(
    ("mixer", "message"),
    [
        ("mamba", r"keep_nth: mixer='mamba' is not supported, expected one of \['mamba1', 'mamba2'\]$"),
        ("s4d", r"mixer='s4d' is not supported.*a time-invariant one keeps no token of its choice"),
    ],
)
def test_other_mixers_are_refused(mixer, message):
    with pytest.raises(ValueError, match=message):
        keep_nth(mixer=mixer)
