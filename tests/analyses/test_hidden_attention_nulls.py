"""What chance reads: ranges from twenty random models of a family, tested on five others; what is built lies outside.

The queries are those of a recall task. `negative_share` has a range for S4D alone: the sign that a random selective
layer reads most tokens with is chance, so that its range would hold every share there is.
"""

import numpy as np
import pytest
import torch

import mamba_probe as mp
from mamba_probe import blocks
from mamba_probe.analyses import hidden_attention

TASK = mp.tasks.mqar(batch=4, length=64, n_pairs=8, vocab=64, seed=5)
ASKED = np.stack([np.flatnonzero(role == "query") for role in TASK.role])
MIXERS = {
    "mamba": lambda: blocks.MambaBlock(64, d_state=16),
    "mamba2": lambda: blocks.Mamba2Block(64, n_heads=8, d_state=16),
    "s4d": lambda: blocks.S4DBlock(64, d_state=4),
}
SUMMARIES = ("entropy", "first_share", "mean_distance", "negative_share", "top_share")
NULLS = {
    "mamba": {
        "entropy": (2.91846, 0.04335),
        "first_share": (0.01720, 0.00354),
        "mean_distance": (10.57259, 0.82120),
        "top_share": (0.14943, 0.01454),
        "entropy over lti": (-0.14239, 0.11141),
        "first_share over lti": (-0.00558, 0.00702),
        "mean_distance over lti": (0.46567, 1.61880),
        "top_share over lti": (0.03691, 0.03454),
        "entropy over shuffle": (-0.000253, 0.000291),
        "first_share over shuffle": (-0.000033, 0.000060),
        "mean_distance over shuffle": (0.002249, 0.006750),
        "top_share over shuffle": (0.000074, 0.000221),
    },
    "mamba2": {
        "entropy": (2.40697, 0.20435),
        "first_share": (0.01189, 0.00388),
        "mean_distance": (8.41396, 1.80031),
        "top_share": (0.27158, 0.04870),
        "entropy over lti": (-0.29498, 0.06494),
        "first_share over lti": (-0.00394, 0.00334),
        "mean_distance over lti": (0.60134, 0.57963),
        "top_share over lti": (0.08923, 0.02556),
        "entropy over shuffle": (-0.020430, 0.020625),
        "first_share over shuffle": (0.000405, 0.002449),
        "mean_distance over shuffle": (0.241271, 0.344162),
        "top_share over shuffle": (0.005555, 0.011226),
    },
    "s4d": {
        "entropy": (3.15727, 0.00982),
        "first_share": (0.03682, 0.00134),
        "mean_distance": (13.23834, 0.18263),
        "negative_share": (0.50818, 0.03569),
        "top_share": (0.06959, 0.00204),
    },
}
"""Mean and standard deviation of a layer's summaries over the models of seeds 0 to 19; `over` less that null's."""
WIDTH = 4
"""Standard deviations on either side of the mean that a random model may lie away."""
READS_ONE = {"entropy", "mean_distance", "top_share", "entropy over lti", "first_share over lti", "top_share over lti"}
MOVED = {"entropy over shuffle", "first_share over shuffle", "mean_distance over shuffle", "top_share over shuffle"}
OUTSIDE = {
    "mamba": {
        "recall": READS_ONE | {"first_share"},
        "windows": MOVED | {"entropy", "entropy over lti"},
        "keep": {"entropy", "top_share", "mean_distance over lti", "mean_distance over shuffle"},
        "fast": {"entropy", "mean_distance", "top_share"},
        "sink": {"first_share"},
    },
    "mamba2": {
        "recall": READS_ONE | {"mean_distance over lti"},
        "windows": MOVED | {"entropy over lti", "first_share over lti"},
        "keep": {"entropy", "top_share", "mean_distance over lti", "mean_distance over shuffle"},
        "fast": {"entropy", "top_share"},
        "sink": {"first_share"},
    },
    "s4d": {
        "recall": {"entropy", "mean_distance", "negative_share", "top_share"},
        "fast": {"entropy", "first_share", "mean_distance", "top_share"},
    },
}
"""Summaries that lie outside, by what was built: each of the table at least once."""


def recorded(model, given=None):
    with mp.attach(model.eval()) as probe:
        return probe.record(TASK if given is None else given, variables=("delta", "A", "B", "C"))


def summaries(trace):
    found = hidden_attention.measure(trace, query_tokens=ASKED, n_bootstrap=2)
    values = {name: found[f"layer_{name}"].item() for name in SUMMARIES}
    for kind in ("lti", "shuffle"):
        over = {f"{name} over {kind}": values[name] - found[f"layer_null_{kind}_{name}"].item() for name in SUMMARIES}
        values |= over
    return values


def random_trace(family, seed):
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return recorded(blocks.LanguageModel([MIXERS[family]()], 64))


def distances(family, values):
    """Standard deviations from the mean of random models, of each summary that has a range."""
    return {name: (values[name] - mean) / deviation for name, (mean, deviation) in NULLS[family].items()}


def built(family, what):
    """A trace that is no random model's."""
    mixer, rng = "mamba1" if family == "mamba" else family, np.random.default_rng(0)
    if what == "recall":
        return recorded(mp.constructions.mqar(mixer, 32, 32).model)
    if what == "windows":
        made = mp.constructions.haar(length=64, levels=2, variant="ramps", mixer=mixer)
        return recorded(made.model, made.inputs(rng.standard_normal((4, 64))))
    if what == "keep":
        made = mp.constructions.keep_nth(n_tokens=16, length=64, n=12, mixer=mixer)
        return recorded(made.model, made.inputs(rng.integers(0, 16, (4, 64))))
    trace = random_trace(family, 20)
    if what == "fast":
        return trace.assign(delta=16 * trace["delta"])
    return trace.assign(B=trace["B"].where(trace["position"] > 0, 100 * trace["B"]).transpose(*trace["B"].dims))


@pytest.mark.parametrize(
    "family", ["mamba", *(pytest.param(each, marks=pytest.mark.long) for each in MIXERS if each != "mamba")]
)
def test_five_other_random_models_lie_in_the_null_range(family):
    for seed in range(20, 25):
        values = summaries(random_trace(family, seed))
        for name, distance in distances(family, values).items():
            assert abs(distance) <= WIDTH, (seed, name, values[name])
        if family == "s4d":
            assert all(values[name] == pytest.approx(0, abs=1e-9) for name in values if "over" in name), "its own null"


@pytest.mark.parametrize(("family", "what"), [(family, what) for family, each in OUTSIDE.items() for what in each])
def test_what_is_built_lies_outside(family, what):
    found = distances(family, summaries(built(family, what)))
    for name in OUTSIDE[family][what]:
        assert abs(found[name]) > WIDTH, (name, found[name])


@pytest.mark.parametrize("family", ["mamba", "mamba2"])
def test_windows_with_frozen_steps_lie_inside_where_steps_are_shuffled(family):
    trace = built(family, "windows")
    mean = trace["delta"].mean("token").broadcast_like(trace["delta"])
    found = distances(family, summaries(trace.assign(delta=mean.transpose(*trace["delta"].dims))))
    assert all(abs(found[name]) <= WIDTH for name in MOVED), found


def test_every_range_can_fail():
    for family, each in OUTSIDE.items():
        assert set.union(*each.values()) == set(NULLS[family])


@pytest.mark.long
@pytest.mark.parametrize("family", MIXERS)
def test_the_null_ranges_are_those_of_twenty_models(family):
    each = [summaries(random_trace(family, seed)) for seed in range(20)]
    for name, (mean, deviation) in NULLS[family].items():
        values = np.array([one[name] for one in each])
        assert values.mean() == pytest.approx(mean, abs=0.02 * deviation), name
        assert values.std() == pytest.approx(deviation, rel=0.02), name
    if family != "s4d":
        negative = np.array([one["negative_share"] for one in each])
        assert negative.mean() - WIDTH * negative.std() < 0
        assert negative.mean() + WIDTH * negative.std() > 1
