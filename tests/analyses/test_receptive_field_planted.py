"""Known poles, events and frozen layers; what chance reads; a run's entry; cost. The whole zoo is marked `long`."""

from unittest.mock import patch

import numpy as np
import pytest
import torch

import mamba_probe as mp
from mamba_probe import blocks
from mamba_probe.analyses import receptive_field
from mamba_probe.analyses.common import attention_row
from mamba_probe.analyses.common.bootstrap import resamples
from mamba_probe.analyses.receptive_field.entry import ANALYSIS
from mamba_probe.run import record_task

ALL = ("delta", "A", "B", "C", "u", "out")
MODEL, LENGTH = 8, 40


def signals(rows=4, length=LENGTH, seed=0):
    """Hidden states whose first feature is 1."""
    u = np.random.default_rng(seed).standard_normal((rows, length, MODEL))
    u[..., 0] = 1.0
    return torch.from_numpy(u)


def straight(block):
    """A block whose path around the scan is linear: silu at 40, where its slope is 1, and a gate that is constant."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        block = block(MODEL).double().eval()
    half = block.in_proj.out_features // 2
    with torch.no_grad():
        block.in_proj.weight[:half, 0] = 0
        block.in_proj.weight[half:] = 0
        block.in_proj.weight[half:, 0] = 1.0
        block.conv1d.bias[:] = 40.0
        if hasattr(block, "x_proj"):  # what all channels share selects nothing
            block.x_proj.weight -= block.x_proj.weight.mean(dim=1, keepdim=True)
    return block


def along_signal(probe, u, layer=0):
    direction = np.r_[0.0, np.ones(MODEL - 1)]
    return probe.jacobian(u, layer=layer, query_tokens=[LENGTH - 1], direction=direction)


def measured(block, u, **options):
    with mp.attach(block) as probe:
        trace = probe.record(u, variables=ALL)
        return receptive_field.measure(trace, jacobian=along_signal(probe, u), n_bootstrap=20, **options)


def test_relative_gradients_of_s4d_are_constant_in_u_and_those_of_s6_are_not():
    u = signals()
    fixed = measured(straight(lambda width: blocks.S4DBlock(width, d_state=3)), u)
    for name in ("layer_mixer_spread", "layer_block_spread"):
        assert fixed[name].item() < 1e-12, name
        assert fixed[f"{name}_high"].item() < 1e-12, name
    moving = measured(straight(lambda width: blocks.MambaBlock(width, d_state=3)), u)
    for name in ("layer_mixer_spread", "layer_block_spread"):
        assert moving[name].item() > 0.01, name
    bent = measured(blocks.S4DBlock(MODEL, d_state=3).double().eval(), u)
    assert bent["layer_mixer_spread"].item() < 1e-12
    assert bent["layer_block_spread"].item() > 0.01, "silu and gate, and not the scan"


def test_a_known_pole_is_the_slope():
    """One real pole in every channel: |alpha| and |d out / d u| fall by exp(A delta) a token past the convolution."""
    block = straight(lambda width: blocks.S4DBlock(width, d_state=1))
    with torch.no_grad():
        block.kernel.log_dt[:] = np.log(0.05)
        block.kernel.log_A_real[:] = np.log(1.5)
        block.kernel.A_imag[:] = 0.0
    result = measured(block, signals(), train_length=20)
    assert result["layer_mixer_slope"].item() == pytest.approx(-0.075, rel=1e-9)
    assert result["layer_block_slope"].item() == pytest.approx(-0.075, rel=1e-9)
    assert result["layer_block_slope_low"].item() == pytest.approx(result["layer_block_slope_high"].item(), rel=1e-9)
    lag = np.arange(20.0)
    weight = np.exp(-0.075 * lag)
    at = result["layer_train_mean_distance"].sel(fraction=1.0).item()
    assert at == pytest.approx(lag @ weight / weight.sum(), rel=1e-9)
    assert result["head_train_retention"].values == pytest.approx(np.exp(-0.075 * 20), rel=1e-6)
    assert result["layer_global_share"].item() == 1.0
    assert (
        receptive_field.measure(_trace_of(block), train_length=LENGTH, theta=0.0498)["layer_global_share"].item() == 0
    )


def _trace_of(block):
    with mp.attach(block) as probe:
        return probe.record(signals(), variables=ALL)


def test_every_null_of_a_time_invariant_layer_is_itself():
    result = receptive_field.measure(_trace_of(blocks.S4DBlock(MODEL).double().eval()), train_length=10, n_bootstrap=2)
    for name in ("mean_distance", "train_mean_distance", "collapse_ratio", "mixer_slope"):
        for kind in ("lti", "shuffle"):
            np.testing.assert_allclose(result[f"layer_null_{kind}_{name}"], result[f"layer_{name}"], rtol=1e-9)
    with mp.attach(straight(lambda width: blocks.MambaBlock(width, d_state=3))) as probe:
        free = receptive_field.measure(probe.record(signals(), variables=ALL), n_bootstrap=2)
        with probe.edit(*(mp.freeze(name) for name in ("delta", "B", "C"))):
            frozen = receptive_field.measure(probe.record(signals(), variables=ALL), n_bootstrap=2)
    for name in ("mean_distance", "mixer_slope"):
        np.testing.assert_allclose(frozen[f"layer_{name}"], frozen[f"layer_null_lti_{name}"], rtol=1e-9)
        np.testing.assert_allclose(frozen[f"layer_{name}"], free[f"layer_null_lti_{name}"], rtol=1e-6)
        assert abs(free[f"layer_{name}"] - free[f"layer_null_lti_{name}"]).max() > 1e-4


@pytest.mark.parametrize("planted", [True, False])
def test_an_event_is_kept_without_decay(planted):
    """keep_nth: after token n its derivative stands still, and all that is read is read from there."""
    length, n = 64, 20
    made = mp.constructions.keep_nth(n_tokens=8, length=length, n=n, dtype=torch.float64)
    given = made.inputs(np.random.default_rng(0).integers(0, 8, (3, length)))
    made = made if planted else made.randomised(seed=3)
    with mp.attach(made.model) as probe:
        trace = probe.record(given, variables=ALL)
        jacobian = probe.jacobian(given, layer=0, source_tokens=[n])
    result = receptive_field.measure(trace, jacobian=jacobian, train_length=length, lags=(1, None))
    slope, last = result["layer_block_slope"].item(), result["layer_mean_distance"].values[0, -1]
    if planted:
        assert abs(slope) < 1e-9, "log of the same size at every lag"
        assert last == pytest.approx(length - 1 - n, abs=1e-9)
        assert result["layer_null_lti_mean_distance"].values[0, -1] < 0.1
    else:
        assert abs(slope) > 1e-3
        assert abs(last - (length - 1 - n)) > 3
    assert "jacobian= is of source_tokens" in result.attrs["left_out"]


CHANCE = {
    "mamba": {
        "mixer_slope": (-0.032565, 0.013200),
        "mixer_spread": (0.147924, 0.078518),
        "global_share": (0.695703, 0.056705),
        "token_distance_u": (0.614700, 0.009433),
        "token_distance_out": (0.701814, 0.067127),
        "collapse_ratio": (0.960113, 0.109296),
    },
    "mamba2": {
        "mixer_slope": (-0.026883, 0.028974),
        "mixer_spread": (0.285209, 0.153651),
        "global_share": (0.568750, 0.148872),
        "token_distance_u": (0.608331, 0.009393),
        "token_distance_out": (0.660588, 0.029700),
        "collapse_ratio": (0.892748, 0.111269),
    },
    "s4d": {
        "mixer_slope": (-0.023519, 0.001752),
        "mixer_spread": (0.000000, 0.000000),
        "global_share": (1.000000, 0.000000),
        "token_distance_u": (0.611840, 0.011736),
        "token_distance_out": (0.626151, 0.073296),
        "collapse_ratio": (0.954306, 0.013452),
    },
}
"""Mean and standard deviation over random models of seeds 0 to 19, of a layer's summaries."""
MIXERS = {
    "mamba": lambda: blocks.MambaBlock(64, d_state=16),
    "mamba2": lambda: blocks.Mamba2Block(64, n_heads=8, d_state=16),
    "s4d": lambda: blocks.S4DBlock(64, d_state=4),
}
SUMMARIES = ("mixer_slope", "mixer_spread", "global_share", "token_distance_u", "token_distance_out")


def by_chance(family, seed):
    """Summaries of a random model on a recall task of twice the length that stands for training."""
    task = mp.tasks.mqar(batch=4, length=64, n_pairs=8, vocab=64, seed=5)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = blocks.LanguageModel([MIXERS[family]()], 64).eval()
    with mp.attach(model) as probe:
        trace = probe.record(task, variables=ALL)
    found = receptive_field.measure(trace, train_length=32, query_tokens=[63], n_bootstrap=2)
    values = {name: found[f"layer_{name}"].item() for name in SUMMARIES}
    return values | {"collapse_ratio": found["layer_collapse_ratio"].sel(fraction=2.0).item()}


@pytest.mark.parametrize("family", sorted(CHANCE))
def test_a_random_model_reads_what_chance_reads(family):
    for seed in (30, 31):
        for name, value in by_chance(family, seed).items():
            mean, deviation = CHANCE[family][name]
            assert abs(value - mean) < 4.5 * deviation + 1e-9, (name, value)


def test_the_coverage_that_is_stated_is_that_of_a_mean_of_normal_rows():
    generator = np.random.default_rng(0)
    for n_rows, stated in ((2, 0.54), (4, 0.79), (8, 0.86)):
        draws = resamples(n_rows, 500, 1)
        rows = generator.standard_normal((2000, n_rows))
        low, high = np.quantile(rows @ draws.T / n_rows, (0.025, 0.975), axis=1)
        assert abs(np.mean((low <= 0) & (high >= 0)) - stated) < 0.04


def test_cost_is_linear_in_tokens_and_the_same_queries():
    """Terms of hidden attention formed for 8 queries: as many a token at twice the tokens."""
    seen = []

    def counted(delta, *rest):
        seen.append(delta.size)
        return attention_row(delta, *rest)

    totals = []
    for length in (128, 256):
        seen.clear()
        with mp.attach(MIXERS["mamba"]().eval()) as probe:
            trace = probe.record(torch.randn(1, length, 64), variables=ALL)
        with patch("mamba_probe.analyses.hidden_attention.stream.attention_row", counted):
            receptive_field.measure(trace, n_bootstrap=2)
        totals.append(sum(seen))
    assert totals[0] == 3 * 128 * sum(range(16, 129, 16))
    assert totals[1] == 2 * totals[0]


def test_values_are_read_in_runs_and_from_a_store_alike(monkeypatch):
    with mp.attach(MIXERS["mamba2"]().eval()) as probe:
        trace = probe.record(torch.randn(2, 48, 64, generator=torch.Generator().manual_seed(0)), variables=ALL)
    whole = receptive_field.measure(trace, train_length=16, n_bootstrap=2)
    monkeypatch.setattr("mamba_probe.analyses.receptive_field.rows.HELD_BYTES", 8 * 64 * 5)
    lazy = receptive_field.measure(trace.chunk(token=7), train_length=16, n_bootstrap=2)
    for name in whole:
        np.testing.assert_allclose(lazy[name], whole[name], rtol=1e-9, err_msg=name)


def test_a_run_is_measured_said_and_drawn():
    import matplotlib.pyplot as plt

    run = record_task(mp.load("zoo:trained-mqar-mamba1"), "mqar", rows=6, length=128, n_pairs=8)
    assert ANALYSIS.lacks(run) == ""
    result = ANALYSIS.of_run(run, 0)
    assert result.attrs["train_length"] == "64"
    assert result.attrs["left_out"] == "nothing"
    assert result.attrs["jacobian"].startswith("4 row(s), query_token [")
    sentence, rows = ANALYSIS.says(result)
    assert "tokens, a query reads from a mean distance of" in sentence
    assert "At 2 times the length trained on it has kept" in sentence
    assert "of the pace of the length (read at: query)" in sentence
    said = {f"layer {row.layer}: {row.quantity}": row for row in rows}
    details = {row.quantity: row.detail for row in rows}
    assert details["share of global heads"] == "; 6 rows: the interval is too narrow"
    assert details["how far two inputs' block profiles differ"] == "; 4 rows: the interval is too narrow"
    assert "untrained twin" in said["layer 0: share of global heads"].null
    assert said["layer 0: collapse ratio, 2 x length trained on"].interval
    removed = [row for row in rows if row.quantity.startswith("change of the prediction")]
    assert float(removed[-1].value) > 0.9
    assert "another row's context" in removed[-1].null
    panels = ANALYSIS.panels([result])
    assert len(panels) == 3
    for panel in panels:
        plt.close(panel.draw(result, None).figure)
    plt.close(receptive_field.plot(result, kind="tokens").figure)
    stored = run.__class__(run.trace.drop_vars("token_id"), run.weights, run.parity)
    short = ANALYSIS.of_run(stored, 0)
    assert short.attrs["left_out"].endswith("(the run lacks token ids)")
    assert ANALYSIS.says(short)[0]
    with pytest.raises(ValueError, match="the result has nothing for kind 'remembrance'; left out: "):
        receptive_field.plot(short, kind="remembrance")
    with pytest.raises(ValueError, match=r"layer 5 is not in the result, which holds \[0\]"):
        receptive_field.plot(short, layer=5)


def test_rows_that_read_nothing_are_said_to():
    import matplotlib.pyplot as plt

    trace = _trace_of(straight(lambda width: blocks.MambaBlock(width, d_state=3)))
    silent = trace.assign(C=trace["C"] * 0)
    result = receptive_field.measure(silent, n_bootstrap=2)
    assert ANALYSIS.says(result)[0] == "Layer 0: no query reads anything."
    assert np.isnan(result["layer_mixer_profile"]).all()
    assert np.isnan(result["layer_mixer_slope"]).all()
    assert result["layer_mixer_slope_used"].item() == 0
    figure, axes = plt.subplots(2)
    for ax, kind in zip(axes, ("distance", "profile"), strict=True):
        receptive_field.plot(result, ax, kind=kind)
    figure.savefig("/dev/null", format="png")
    plt.close(figure)


@pytest.mark.long
@pytest.mark.parametrize("name", mp.zoo.names())
def test_the_whole_zoo_is_measured_at_twice_its_length(name):
    card = mp.zoo.card(name)["task"]
    length = min(card["length"], 256)
    options = {key: value for key, value in card.items() if key not in ("name", "batch", "length", "seed")}
    task = getattr(mp.tasks, card["name"])(batch=12, length=2 * length, seed=1, **options)
    asking = task.role == "query"
    at = [int(length + asking.sum(axis=0)[length:].argmax())]
    rows = np.argsort(~asking[:, at[0]], kind="stable")[:3]
    asked, few = [int(np.flatnonzero(asking[row])[-1]) for row in rows], task.input_ids[rows]
    with mp.attach(mp.load(f"zoo:{name}")) as probe:
        trace = probe.record(task, variables=ALL)
        layers = trace["layer"].values.tolist()
        signs = np.random.default_rng(0).choice([-1.0, 1.0], (2, trace.sizes["model"]))
        jacobian = [probe.jacobian(few, layer=layer, query_tokens=at, read_out=signs) for layer in layers]
        remembrance = probe.remembrance(few, queries=asked)
    result = receptive_field.measure(
        trace, train_length=length, jacobian=jacobian, remembrance=remembrance, query_tokens=at, baseline=trace
    )
    for name, low, high in (("remembrance", 0, 1), ("layer_mixer_spread", 0, 1), ("layer_block_spread", 0, 1),
                            ("layer_global_share", 0, 1), ("layer_token_distance_u", 0, 1.05)):  # fmt: skip
        assert ((result[name] >= low) & (result[name] <= high)).all(), name
    assert (result["layer_mean_distance"] <= at[0]).all()
    assert result["layer_block_slope_used"].min() > 0
    if trace.attrs["family"] == "s4d":
        assert result["layer_mixer_spread"].max() < 1e-6
        np.testing.assert_allclose(result["layer_null_lti_collapse_ratio"], result["layer_collapse_ratio"], rtol=1e-6)
