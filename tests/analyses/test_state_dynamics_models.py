"""State dynamics of models whose answer is known, of random ones, and of the zoo; what is refused; what it costs."""

import tracemalloc

import matplotlib.pyplot as plt
import numpy as np
import pytest
import torch
import xarray as xr

import mamba_probe as mp
from mamba_probe import blocks
from mamba_probe.analyses import state_dynamics
from mamba_probe.analyses.common.analysis import analyses
from mamba_probe.analyses.state_dynamics import core
from mamba_probe.kernels.emission import Emit
from mamba_probe.kernels.scan import selective_scan
from mamba_probe.run import Run, vocabulary

TASK = mp.tasks.mqar(batch=4, length=64, n_pairs=8, vocab=64, seed=5)
VARIABLES = ("delta", "A", "B", "C", "x")
WIDTH = 5
"""Standard deviations on either side of the mean that a random model may lie away: growth has long tails."""
CHANCE = {
    "mamba": {
        "size": (3.771619, 0.638932),
        "rank": (12.645312, 0.556000),
        "size over lti": (2.335640, 0.628677),
        "size over shuffle": (0.000128, 0.010770),
        "log half-life": (2.332036, 0.224096),
        "growth": (0.730715, 0.194890),
        "growth over order": (0.256667, 0.141315),
        "closed": (0.006680, 0.007416),
    },
    "mamba2": {
        "size": (3.175526, 0.632581),
        "rank": (8.954688, 0.883155),
        "size over lti": (2.175526, 0.632581),
        "size over shuffle": (0.047600, 0.121776),
        "log half-life": (1.819546, 0.806992),
        "growth": (0.493499, 0.200430),
        "growth over order": (0.320413, 0.160114),
        "closed": (0.053638, 0.047451),
    },
    "s4d": {
        "size": (2.811377, 0.449131),
        "rank": (5.275000, 0.513950),
        "log half-life": (4.899906, 0.256294),
        "growth": (0.734680, 0.066717),
        "growth over order": (0.114004, 0.041328),
        "held": (0.157031, 0.040784),
    },
}
"""Mean and standard deviation of a layer's summaries over the models of seeds 0 to 19; `over` less that null's."""
MIXERS = {
    "mamba": lambda: blocks.MambaBlock(64, d_state=16),
    "mamba2": lambda: blocks.Mamba2Block(64, n_heads=8, d_state=16),
    "s4d": lambda: blocks.S4DBlock(64, d_state=4),
}


def traced(model, inputs, variables=VARIABLES):
    with mp.attach(model) as probe:
        return probe.record(inputs, variables=variables)


def random_trace(family, seed, task=TASK):
    torch.manual_seed(seed)
    return traced(blocks.LanguageModel([MIXERS[family]()], vocab_size=64).eval(), task)


def summarised(found):
    median = found.sel(quantile=0.5).isel(layer=0)
    size, growth = median["layer_ess_entropy"].item(), median["layer_growth"].item()
    return {
        "size": size,
        "rank": median["layer_ess_rank"].item(),
        "size over lti": size - median["layer_null_lti_ess_entropy"].item(),
        "size over shuffle": size - median["layer_null_shuffle_ess_entropy"].item(),
        "log half-life": np.log(median["layer_half_life"].item()),
        "growth": growth,
        "growth over order": growth - median["layer_null_order_growth"].item(),
        "closed": median["layer_closed_share"].item(),
        "held": median["layer_held_share"].item(),
    }


@pytest.mark.parametrize("family", sorted(MIXERS))
@pytest.mark.parametrize("seed", range(20, 25))
def test_a_random_model_lies_in_the_range_of_chance(family, seed):
    found = summarised(state_dynamics.measure(random_trace(family, seed), every=4, n_bootstrap=2))
    for name, (mean, spread) in CHANCE[family].items():
        assert abs(found[name] - mean) < WIDTH * spread, name


@pytest.mark.long
def test_what_was_learned_lies_outside_it():
    task = mp.tasks.mqar(batch=4, length=64, n_pairs=8, vocab=256, seed=5)
    both = ("closed", "log half-life")
    for name, family, outside in (("mqar-mamba1", "mamba", both), ("mqar-mamba2", "mamba2", both[:1])):
        found = summarised(state_dynamics.measure(traced(mp.load(f"zoo:trained-{name}"), task), every=4, n_bootstrap=2))
        for which in outside:
            mean, spread = CHANCE[family][which]
            assert found[which] - mean > WIDTH * spread, (name, which)


@pytest.mark.parametrize(("mixer", "at"), [("mamba1", 16), ("mamba1", 30), ("mamba2", 16), ("mamba2", 40)])
def test_recall_with_one_hot_keys_uses_a_state_for_each_pair_that_is_open(mixer, at):
    """Written before the split and asked for after it. Each pair is asked for once, so that all weigh alike."""
    task = mp.tasks.mqar(batch=3, length=64, n_pairs=8, vocab=32, seed=1)
    construction = mp.constructions.mqar(mixer, n_keys=16, n_values=16)
    found = state_dynamics.measure(traced(construction.model, construction.inputs(task.input_ids)), every=8, at=[at])
    open_pairs = [((source < at) & (source >= 0) & (np.arange(64) >= at)).sum() for source in task.source_token]
    if at == 16:
        assert open_pairs == [8, 8, 8]
    else:
        assert len(set(open_pairs)) > 1
    for row, pairs in enumerate(open_pairs):
        one = found.isel(batch=row)
        np.testing.assert_allclose(one["ess_entropy"], pairs, rtol=1e-5)
        assert (one["ess_rank"] == pairs).all()
        assert (one["null_lti_ess_rank"] == 1).all(), "frozen, all keys are one"


def test_recall_without_selection_has_one_state_a_channel():
    task = mp.tasks.mqar(batch=2, length=32, n_pairs=4, vocab=32, seed=1)
    construction = mp.constructions.mqar("s4d", n_keys=16, n_values=16)
    found = state_dynamics.measure(traced(construction.model, construction.inputs(task.input_ids)), every=8)
    np.testing.assert_allclose(found["ess_entropy"], 1, rtol=1e-6)
    for null in ("null_lti", "null_shuffle"):
        np.testing.assert_allclose(found[f"{null}_ess_entropy"], found["ess_entropy"], rtol=1e-12)


@pytest.mark.parametrize("mixer", ["mamba1", "mamba2"])
def test_what_is_erased_is_no_state_by_rank(mixer):
    """Up to the kept token every step erases, after it none does; the entropy form, free of scale, sees all."""
    construction = mp.constructions.keep_nth(n_tokens=4, length=64, n=20, mixer=mixer)
    inputs = construction.inputs(np.random.default_rng(0).integers(0, 4, (2, 64)))
    found = state_dynamics.measure(traced(construction.model, inputs), every=8, at=[5, 20, 21, 50])
    for i, (rank, entropy) in enumerate([(0, 0), (0, 1), (1, 1), (1, 1)]):  # exp(-960) is 0, exp(-32) is not
        assert (found["ess_rank"].isel(query_token=i) == rank).all()
        np.testing.assert_allclose(found["ess_entropy"].isel(query_token=i), entropy, rtol=1e-9)
    np.testing.assert_allclose(found["erased_share"], 21 / 64)  # tokens 0 to 20
    assert (found["held_share"] > 0.65).all()


def test_a_mamba2_head_with_constant_selection_has_one_state():
    """All its states share one decay, so that its kernel is one exponential."""
    found = state_dynamics.measure(random_trace("mamba2", 0), at=[1, 20, 63], every=8)
    np.testing.assert_allclose(found["null_lti_ess_entropy"], 1, rtol=1e-9)
    assert (found["ess_entropy"].isel(query_token=1) > 1.2).all()
    np.testing.assert_allclose(found["ess_entropy"].isel(query_token=[0, 2]), 1, rtol=1e-9)  # one source, one reader


REFUSED = {
    "every": ({"every": 65}, "every must be 1 to 64 tokens"),
    "nothing read": ({"at": [0]}, r"at \[0\] must be distinct positions 1 to 63 of row 0"),
    "nothing reads": ({"at": [64]}, "distinct positions 1 to 63"),
    "rows of splits": ({"at": [[3], [4]]}, r"integers \(query_token,\) or \(batch = 4, query_token\)"),
    "splits of a kind": ({"at": np.array([0.5])}, "float64"),
    "heads": ({"heads": [3, 999]}, r"heads \[999\] are not in `channel`"),
    "heads twice": ({"heads": [3, 3]}, "distinct integers"),
    "tolerance": ({"tolerance": 0.0}, r"tolerance must lie in \(0, 1\)"),
    "saturation": ({"saturation": 0.7}, r"saturation in \(0, 0.5\)"),
    "weights": ({"weights": 1}, "does not use weights"),
    "bootstrap": ({"n_bootstrap": 1}, "n_bootstrap must be at least 2"),
    "loss": ({"loss": xr.Dataset({"nll": (("batch", "token"), np.ones((4, 64)))})}, 'a variable "loss" over'),
    "loss shape": ({"loss": xr.Dataset({"loss": (("batch", "token"), np.ones((4, 63)))})}, r"loss has shape \(4, 63\)"),
    "loss inf": ({"loss": xr.Dataset({"loss": (("batch", "token"), np.full((4, 64), np.inf))})}, "loss is infinite"),
}


@pytest.fixture(scope="module")
def trace():
    return random_trace("mamba", 0)


@pytest.mark.parametrize("name", sorted(REFUSED))
def test_what_cannot_be_is_refused(trace, name):
    given, words = REFUSED[name]
    with pytest.raises(ValueError, match=words):
        state_dynamics.measure(trace, **given)


def test_gaps_other_baselines_and_huge_results_are_refused(trace, monkeypatch):
    with pytest.raises(ValueError, match="not contiguous: a state holds every token before it"):
        state_dynamics.measure(trace.isel(token=[0, 1, 2, 5, 6]), every=1)
    with pytest.raises(ValueError, match="begin at position 3"):
        state_dynamics.measure(trace.isel(token=slice(3, None)), every=1)
    with pytest.raises(ValueError, match="1 valid token"):
        state_dynamics.measure(trace.isel(token=[0]), every=1)
    with pytest.raises(ValueError, match="baseline needs the trace's family, layers, heads and states: mamba"):
        state_dynamics.measure(trace, every=4, baseline=random_trace("mamba2", 0))
    with pytest.raises(ValueError, match="their `valid` differ"):
        state_dynamics.measure(trace, every=4, baseline=trace.isel(batch=[0, 1, 2]))
    with pytest.raises(ValueError, match="the trace lacks `C`"):
        state_dynamics.measure(trace.drop_vars("C"))
    monkeypatch.setattr("mamba_probe.analyses.state_dynamics.rows.RESULT_BYTES", 1000)
    with pytest.raises(ValueError, match="give a larger every="):
        state_dynamics.measure(trace, every=4)


def test_without_x_and_h_the_states_are_left_out_and_it_is_said(trace):
    found = state_dynamics.measure(trace.drop_vars("x"), every=4)
    assert found.attrs["states"] == "not measured: neither h nor x was recorded"
    assert "null_order: not measured" in found.attrs["null"]
    assert not [name for name in found.data_vars if "growth" in str(name) or "rms" in str(name)]
    whole = state_dynamics.measure(trace, every=4)
    xr.testing.assert_equal(found["ess_entropy"], whole["ess_entropy"])
    with pytest.raises(ValueError, match=r"no states .*: name x or h"):
        state_dynamics.plot(found, kind="state")


def test_a_run_is_said_and_drawn(trace):
    run = Run(trace, xr.Dataset(), xr.Dataset(), twin=(random_trace("mamba", 1), xr.Dataset()))
    entry = analyses()["state_dynamics"]
    result = entry.of_run(run, 0)
    assert entry.lacks(run) == ""
    assert result.attrs["every"] == "4"
    sentence, rows = entry.says(result)
    assert sentence.startswith("At its mean step the median state halves after ")
    assert {row.detail for row in rows} == {"; 4 rows: the interval is too narrow"}
    assert "its untrained twin" in sentence
    assert {row.quantity for row in rows} >= {"median half-life, tokens", "growth of the state, exponent"}
    assert all(row.value != "none" for row in rows)
    panels = entry.panels([result])
    figure, axes = plt.subplots(len(panels))
    for panel, ax in zip(panels, axes, strict=True):
        panel.draw(result, ax)
        assert ax.get_ylabel()
    plt.close(figure)
    assert set(entry.notes) <= set(result.attrs)


def test_a_half_life_beyond_the_row_is_said_to_be():
    given = steps(64, 2).isel(batch=[0, 0, 0])
    result = state_dynamics.measure(given, every=4, n_bootstrap=20, baseline=given)
    sentence, rows = analyses()["state_dynamics"].says(result)
    assert "the median state halves after more than the row's 64 tokens in layer 0;" in sentence
    assert (rows[0].value, rows[0].interval, rows[0].null) == (
        "more than 64",
        "more than 64",
        "untrained twin more than 64",
    )


def steps(n_tokens, n_channels, n_states=16):
    """A planted trace, one row, all decays slow: no source is left out."""
    generator = np.random.default_rng(0)
    place = ("layer", "batch", "token")
    shape = (1, 1, n_tokens)
    return xr.Dataset(
        {
            "delta": ((*place, "channel"), np.full((*shape, n_channels), 1e-2, "float32")),
            "x": ((*place, "channel"), generator.standard_normal((*shape, n_channels), "float32")),
            "A": (("layer", "channel", "state"), -np.ones((1, n_channels, n_states)) * 1e-3),
            **{n: ((*place, "group", "state"), generator.standard_normal((*shape, 1, n_states))) for n in "BC"},
        },
        {
            "layer": [0],
            "valid": (("batch", "token"), np.ones((1, n_tokens), bool)),
            "position": (("batch", "token"), np.arange(n_tokens)[None]),
        },
        {"schema_version": 1, "family": "mamba", "discretization": "euler"},
    )


def test_work_is_linear_in_tokens_and_memory_never_holds_all_states(monkeypatch):
    formed = []
    for name in ("written", "reading"):
        exact = getattr(core, name)

        def counted(*given, exact=exact):
            made = exact(*given)
            formed.append(made.size)
            return made

        monkeypatch.setattr(core, name, counted)
    numbers = {}
    for n_tokens in (1024, 2048, 4096):
        formed.clear()
        state_dynamics.measure(steps(n_tokens, 8), n_bootstrap=2)
        numbers[n_tokens] = sum(formed)
    assert numbers[2048] == 2 * numbers[1024]
    assert numbers[4096] == 4 * numbers[1024]
    monkeypatch.undo()
    trace = steps(8192, 64)
    tracemalloc.start()
    state_dynamics.measure(trace, n_bootstrap=2)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 8 * 8192 * 64 * 16 / 2, "half of one float64 array (token, channel, state)"


CONSTRUCTIONS = {
    "keep": lambda: mp.constructions.keep_nth(n_tokens=8, length=64, n=20),
    "keep-event": lambda: mp.constructions.keep_nth(n_tokens=8, length=64, n=20, profile="event"),
    "keep-mamba2": lambda: mp.constructions.keep_nth(n_tokens=8, length=64, n=20, mixer="mamba2"),
    "mqar": lambda: mp.constructions.mqar(n_keys=16, n_values=16),
    "mqar-short": lambda: mp.constructions.mqar(n_keys=16, n_values=16, key_code="constant-weight"),
    "mqar-mamba2": lambda: mp.constructions.mqar("mamba2", n_keys=16, n_values=16),
    "mqar-s4d": lambda: mp.constructions.mqar("s4d", n_keys=16, n_values=16),
    "haar": lambda: mp.constructions.haar(length=64),
    "windows": lambda: mp.constructions.window_sums(length=64, windows=8),
    "induction": lambda: mp.constructions.induction(n_tokens=8),
}


def sane(found):
    """What holds of any model: bounds, order of quantiles, shares, and nothing unknown that could be known."""
    n_states = int(found.attrs["n_states"])
    for name in ("ess_entropy", "ess_rank"):
        assert ((found[name] >= 0) & (found[name] <= n_states * (1 + 1e-9))).all()
    half = found["layer_half_life"]
    assert (half > 0).all()
    assert (half.values[:-1] <= half.values[1:]).all()
    for name in ("closed", "held", "erased"):
        assert ((found[f"{name}_share"] >= 0) & (found[f"{name}_share"] <= 1)).all()
    variance, mean, rms = (found[f"state_{name}"] for name in ("variance", "mean", "rms"))
    assert (variance >= 0).all()
    assert (rms >= abs(mean) - 1e-9).all()
    assert not any(found[name].isnull().any() for name in found.data_vars if str(name).startswith(("ess", "state")))


SHOWN = ("half_life", "ess_entropy", "null_lti_ess_entropy", "growth", "null_order_growth", "closed_share")
ZOO = {
    "mqar-mamba1": [(1.31e18, 3.12, 1.0, 0.0, 0.0, 0.875)],
    "trained-induction-mamba1": [(11.4, 3.16, 1.06, 0.175, 0.176, 0.0316), (2.82, 1.33, 1.17, 0.58, 0.536, 0.376)],
    "trained-keep-mamba1-1024": [(8.06, 1.54, 1.5, 0.589, 0.552, 0.133), (11.0, 1.37, 1.23, 0.0362, 0.291, 0.383)],
    "trained-keep-mamba1-256": [(6.47, 1.67, 1.63, 0.61, 0.622, 0.0197), (5.9, 1.31, 1.21, 0.0, 0.702, 0.458)],
    "trained-keep-mamba1-64": [(6.69, 1.48, 1.47, 0.645, 0.653, 0.0778), (5.99, 1.02, 1.06, -0.00718, 0.459, 0.385)],
    "trained-keep-s4d-1024": [(183.0, 8.66, 8.66, 0.513, 0.502, 0.0), (134.0, 8.77, 8.77, 0.482, 0.513, 0.0156)],
    "trained-keep-s4d-256": [(183.0, 8.09, 8.09, 0.471, 0.491, 0.0156), (148.0, 9.21, 9.21, 0.48, 0.49, 0.0156)],
    "trained-keep-s4d-64": [(216.0, 8.97, 8.97, 0.518, 0.52, 0.0156), (157.0, 8.86, 8.86, 0.512, 0.532, 0.0312)],
    "trained-mqar-mamba1": [(176.0, 4.18, 1.48, -0.0133, 0.617, 0.707)],
    "trained-mqar-mamba1-small": [(766.0, 1.57, 1.01, 0.141, 0.972, 0.529)],
    "trained-mqar-mamba2": [(267.0, 3.53, 1.0, -0.0231, 0.819, 0.747)],
    "trained-mqar-mamba2-small": [(4.29, 1.52, 1.0, 0.372, 0.0461, 0.168)],
    "trained-mqar-no-conv": [(6.71, 1.39, 1.34, -0.854, 0.657, 0.172)],
    "trained-mqar-s4d": [(178.0, 1.29, 1.29, 0.674, 0.812, 0.0273)],
    "trained-mqar-s4d-small": [(261.0, 1.33, 1.33, 0.12, 0.834, 0.0)],
}
"""What docs/state_dynamics.md says of the zoo, by layer: on 8 rows of 64 tokens, of recall or at random."""


@pytest.mark.long
def test_the_zoo_is_all_there():
    assert sorted(ZOO) == mp.zoo.names()


@pytest.mark.long
@pytest.mark.parametrize("name", sorted(ZOO))
def test_the_zoo_measures_what_the_docs_say(name):
    model = mp.load(f"zoo:{name}")
    vocab = vocabulary(model)
    task = mp.tasks.mqar(batch=8, length=64, n_pairs=8, vocab=vocab, seed=0) if "mqar" in name else None
    given = np.random.default_rng(0).integers(0, vocab, (8, 64)) if task is None else task
    found = state_dynamics.measure(traced(model, given), n_bootstrap=2).sel(quantile=0.5)
    for layer, wanted in enumerate(ZOO[name]):
        measured = [found[f"layer_{what}"].values[layer] for what in SHOWN]
        np.testing.assert_allclose(measured, wanted, rtol=1e-2, atol=2e-3, err_msg=f"layer {layer}")


@pytest.mark.long
@pytest.mark.parametrize("name", mp.zoo.names())
def test_every_zoo_model_is_measured_and_sane(name):
    model = mp.load(f"zoo:{name}")
    vocab = vocabulary(model)
    inputs = np.random.default_rng(0).integers(0, vocab, (4, 64))
    given = traced(model, inputs, (*VARIABLES, "h"))
    found = state_dynamics.measure(given, every=4, at=[8, 32, 60])
    sane(found)
    computed = state_dynamics.measure(given.drop_vars("h"), every=4)
    for what in ("state_mean", "state_variance", "state_rms"):
        error = abs(computed[what] - found[what]).max() / abs(found[what]).max()
        bound = 5e-6 if given.attrs["family"] == "s4d" else 2e-6  # of fp32 scans; a variance has it twice
        assert error < bound, what


@pytest.mark.long
@pytest.mark.parametrize("name", [name for name in mp.zoo.names() if "s4d" in name])
def test_computed_states_are_those_of_a_float64_scan(name):
    model = mp.load(f"zoo:{name}")
    given = traced(model, np.random.default_rng(0).integers(0, vocabulary(model), (1, 64)))
    found = state_dynamics.measure(given, every=4)
    for layer in range(given.sizes["layer"]):
        one = given.isel(layer=layer, batch=0)
        x = torch.tensor(one["x"].values).double()[None, ..., None]
        step = torch.tensor(one["delta"].values).double().expand(1, 64, -1).contiguous()
        A, B, C = (torch.tensor(one[what].values).to(torch.complex128) for what in "ABC")
        B, C = (values.expand(1, 64, *values.shape).contiguous() for values in (B, C))
        made = selective_scan(
            x, step, A, B, C, discretization=given.attrs["discretization"], emit=Emit(("h",)), backend="naive"
        )
        assert made.emission.h is not None
        wanted = (made.emission.h[0, 3::4, :, 0].abs() ** 2).mean(-1).sqrt().numpy()
        np.testing.assert_allclose(found["state_rms"][layer], wanted, rtol=1e-12)


@pytest.mark.long
@pytest.mark.parametrize("name", sorted(CONSTRUCTIONS))
def test_every_construction_is_measured_and_sane(name):
    construction, generator = CONSTRUCTIONS[name](), np.random.default_rng(0)
    signal = name in ("haar", "windows")
    tokens = generator.uniform(-1, 1, (3, 64)) if signal else generator.integers(0, 8, (3, 64))
    sane(state_dynamics.measure(traced(construction.model, construction.inputs(tokens)), every=4))
