"""What is measured of relevance: brute force, planted cases, nulls, intervals, refusals, a recorded run."""

from dataclasses import replace

import matplotlib as mpl
import numpy as np
import pytest
import torch
import xarray as xr

import mamba_probe as mp
from mamba_probe.analyses.attribution import measure, plot
from mamba_probe.analyses.attribution.entry import ANALYSIS
from mamba_probe.blocks import LanguageModel, Mamba2Block, MambaBlock, S4DBlock
from mamba_probe.relevance import perturbed, relevance
from mamba_probe.run import record_task

mpl.use("Agg")


def planted(
    R: np.ndarray, *, role=None, source=None, query=None, layers: int = 1, rules: str = "mambalrp"
) -> xr.Dataset:
    """A Dataset of relevance R (batch, token) at one query a row, the last token."""
    n_rows, length = R.shape
    tokens, queries = ("batch", "token"), ("batch", "query")
    at = np.full((n_rows, 1), length - 1) if query is None else np.asarray(query)
    coords = {
        "layer": np.arange(layers), "batch": np.arange(n_rows), "token": np.arange(length),
        "token_id": (tokens, np.tile(np.arange(length), (n_rows, 1))), "valid": (tokens, ~np.isnan(R)),
        "position": (tokens, np.cumsum(~np.isnan(R), axis=1) - 1), "query_token": (queries, at),
        "target_id": (queries, np.full((n_rows, 1), 3)), "top_id": (queries, np.full((n_rows, 1), 3)),
    }  # fmt: skip
    if role is not None:
        coords |= {"role": (tokens, np.array(role, dtype=object)), "source_token": (tokens, np.asarray(source))}
    data = {
        "relevance": (("batch", "query", "token"), R[:, None]),
        "residual": (("layer", "batch", "query", "token"), np.repeat(R[None, :, None], layers, 0)),
        "bias": (("site", "batch", "query"), np.full((1, n_rows, 1), 2.0)),
        "conservation_error": (queries, np.zeros((n_rows, 1))),
    }
    attrs = {"kind": "relevance", "rules": rules, "estimator": "planted", "model": "planted", "tokens_rule": "",
             "target_rule": ""}  # fmt: skip
    return xr.Dataset(data, coords, attrs)


def test_a_planted_row_has_the_shares_that_were_planted():
    role = [["key", "value", "key", "value", "filler", "query"]]
    source = [[-1, -1, -1, -1, -1, 3]]
    R = np.array([[1.0, 2.0, 3.0, 4.0, -5.0, 10.0]])
    found = measure(planted(R, role=role, source=source))
    share = dict(zip(found["token_class"].values, found["class_share"].values[:, 0, 0], strict=True))
    assert share == pytest.approx({"asked value": 0.2, "asked key": 0.15, "own": 0.5, "other key": 0.05,
                                   "other value": 0.1, "filler": 0.0})  # fmt: skip
    signed = found["class_signed"].sel(token_class="filler").item()
    assert signed == pytest.approx(-5 / 25)
    assert found["pair_share"].item() == pytest.approx(0.35)
    assert found["chance"].sel(token_class="filler").item() == pytest.approx(1 / 6)
    p = np.array([1, 2, 3, 4, 10]) / 20
    assert found["entropy"].item() == pytest.approx(-(p * np.log(p)).sum())
    assert found["mean_distance"].item() == pytest.approx((1 * 5 + 2 * 4 + 3 * 3 + 4 * 2) / 20)
    assert found["own_share"].item() == pytest.approx(10 / 25)
    assert found["bias_share"].item() == pytest.approx(2 / 27)
    assert np.isnan(found["mean_pair_share_low"].item()), "one row: no interval"
    assert found.attrs["interval"] == "NaN: one row, nothing to resample"


def test_tokens_of_a_text_are_classed_by_where_they_are():
    R = np.full((1, 14), np.nan)
    R[0, 2:] = np.arange(1.0, 13.0)
    found = measure(planted(R))
    share = dict(zip(found["token_class"].values, found["class_share"].values[:, 0, 0] * 78, strict=True))
    assert share == pytest.approx({"own": 12, "the 8 before": sum(range(4, 12)), "first": 1, "earlier": 2 + 3})
    assert "pair_share" not in found


def test_where_nothing_is_positive_there_is_no_share_and_it_is_left_out():
    R = np.array([[-1.0, -2.0], [1.0, 3.0], [3.0, 1.0]])
    found = measure(planted(R))
    assert np.isnan(found["class_share"].values[:, 0]).all()
    assert found["mean_class_share"].sel(token_class="own").item() == pytest.approx(0.5)
    assert np.isnan(found["entropy"].values[0, 0])


def test_intervals_are_those_of_a_bootstrap_over_rows_written_again():
    rng = np.random.default_rng(0)
    R, G = rng.random((12, 9)), rng.random((12, 9))
    role, source = [["key", "value", *["filler"] * 6, "query"]] * 12, [[-1] * 8 + [1]] * 12
    found = measure(planted(R, role=role, source=source),
                    gradient=planted(G, role=role, source=source, rules="gradient"), seed=3)  # fmt: skip
    pair = [(each[:, :2].sum(1) / each.sum(1)) for each in (R, G)]
    draws = np.random.default_rng(3).multinomial(12, np.full(12, 1 / 12), size=200)
    for name, values in (("pair_share", pair[0]), ("gain_pair_share", pair[0] - pair[1])):
        means = np.sort(draws @ values / 12)
        assert found[f"mean_{name}"].item() == pytest.approx(values.mean(), abs=1e-12)
        assert means[4] - 1e-12 <= found[f"mean_{name}_low"].item() <= means[5] + 1e-12, "2.5 % of 200"
        assert means[194] - 1e-12 <= found[f"mean_{name}_high"].item() <= means[195] + 1e-12


def test_a_row_with_fewer_queries_has_no_numbers_at_those_it_lacks():
    task = mp.tasks.mqar(batch=3, length=32, n_pairs=4, vocab=32, seed=1)
    target = task.target.copy()
    target[0, np.flatnonzero(target[0] >= 0)[1:]] = -1
    with mp.attach(mp.constructions.mqar(n_keys=16, n_values=16).model) as probe:
        found = relevance(probe, replace(task, target=target), tokens="queries")
        taken = perturbed(probe, found)
    assert (found["query_token"].values[0, 1:] == -1).all()
    assert np.isnan(found["relevance"].values[0, 1:]).all()
    assert np.isnan(taken["area"].values[:, 0, 1:]).all()
    result = measure(found, perturbation=taken)
    for name in ("pair_share", "entropy", "mean_distance", "top", "bias_share"):
        assert np.isnan(result[name].values).tolist() == [[False, True, True, True], [False] * 4, [False] * 4], name
    assert result["mean_pair_share"].item() == pytest.approx(0.5, abs=1e-6)
    with pytest.raises(ValueError, match="row 0 has no query 2"):
        plot(result, kind="tokens", row=0, query=2)


def test_random_relevance_reads_chance():
    rng = np.random.default_rng(1)
    role, source = [["key", "value", *["filler"] * 21, "query"]] * 400, [[-1] * 23 + [1]] * 400
    found = measure(planted(rng.random((400, 24)), role=role, source=source))
    low, high = found["mean_class_share_low"], found["mean_class_share_high"]
    assert (np.abs(found["mean_class_share"] - found["chance"]) < 2 * (high - low)).all()
    assert found["mean_pair_share"].item() == pytest.approx(2 / 24, abs=0.005)


BLOCKS = {
    "mamba1": lambda: MambaBlock(16, d_state=4),
    "mamba2": lambda: Mamba2Block(16, n_heads=4, d_state=4),
    "s4d": lambda: S4DBlock(16, d_state=4),
}


def fresh(kind: str, seed: int, layers: int = 1) -> LanguageModel:
    torch.manual_seed(seed)
    return LanguageModel([BLOCKS[kind]() for _ in range(layers)], vocab_size=32).eval()


@pytest.mark.parametrize("kind", ["mamba1", "mamba2"])
def test_an_untrained_model_puts_little_on_the_pair_and_a_construction_all_but_the_querys_half(kind):
    task = mp.tasks.mqar(batch=6, length=32, n_pairs=4, vocab=32, seed=2)
    built = mp.constructions.mqar(kind, n_keys=16, n_values=16)
    with mp.attach(built.model) as probe:
        found = relevance(probe, task)
        taken = perturbed(probe, found, relevance(probe, task, rules="gradient"))
    with mp.attach(fresh(kind, 0)) as probe:
        twin = relevance(probe, task)
    result = measure(found, baseline=twin, perturbation=taken)
    assert result["mean_pair_share"].item() == pytest.approx(0.5, abs=1e-5)
    assert result["mean_baseline_pair_share"].item() < 0.25
    assert result["mean_class_share"].sel(token_class="own").item() == pytest.approx(0.5, abs=1e-5)
    assert result["area_gain"].sel(order="random").item() > 0.03
    assert result["area_gain_low"].sel(order="random").item() > 0
    assert result["area_gain"].sel(order="mambalrp").item() == 0


@pytest.mark.parametrize("kind", ["mamba1", "mamba2", "s4d"])
def test_untrained_models_read_themselves_and_less_than_chance_of_the_pair(kind):
    """The ranges that docs/attribution.md gives: ten models of two layers, other seeds than those they are from."""
    task, found = mp.tasks.mqar(batch=4, length=32, n_pairs=4, vocab=32, seed=5), []
    for seed in range(100, 110):
        with mp.attach(fresh(kind, seed, layers=2)) as probe:
            found.append(measure(relevance(probe, task), n_bootstrap=2))
    pair = np.mean([one["mean_pair_share"].item() for one in found])
    own = np.mean([one["mean_class_share"].sel(token_class="own").item() for one in found])
    chance = found[0]["chance"].sel(token_class=["asked value", "asked key"]).sum().item()
    assert pair < 0.6 * chance
    assert 0.25 < own < 0.75


def test_a_trained_models_run_is_measured_said_and_drawn():
    import matplotlib.pyplot as plt

    run = record_task(mp.load("zoo:trained-mqar-mamba1"), "mqar", rows=10)
    assert ANALYSIS.lacks(run) == ""
    result = ANALYSIS.of_run(run, 0)
    assert result["mean_pair_share"].item() > 0.4
    assert result["mean_other_pair_share"].item() < 0.25
    assert result["area_gain_low"].sel(order="random").item() > 0.3
    assert float(result["conservation_error"].max()) < 1e-5
    said, rows = ANALYSIS.says(result)
    assert said.startswith("MambaLRP puts 0.")
    assert "chance 0.03" in said
    assert {"positive relevance on asked value", "error of conservation, largest"} <= {row.what for row in rows}
    for name, variable in result.data_vars.items():
        assert variable.attrs["long_name"], name
        assert variable.attrs["units"], name
    panels = ANALYSIS.panels([result])
    _, axes = plt.subplots(len(panels), 1)
    for panel, ax in zip(panels, axes, strict=True):
        panel.draw(result, ax)
    heights = [patch.get_height() for patch in axes[0].patches[: result.sizes["token_class"]]]
    assert heights == pytest.approx(result["mean_class_share"].values.tolist())
    plot(result, kind="depth")
    plt.close("all")


def test_a_run_without_its_model_or_with_another_says_what_it_lacks():
    class Half:
        trace = xr.Dataset(attrs={"dtype": "bfloat16"})

        def lacks_model(self):
            return ""

    class Other(Half):
        trace = xr.Dataset(attrs={"dtype": "float32", "model_class": "MambaBlock"})

    class Gone(Half):
        def lacks_model(self):
            return "the model, which is gone"

    assert ANALYSIS.lacks(Half()).startswith("float32 or float64 weights")
    assert ANALYSIS.lacks(Other()) == (
        "rules for the parts of MambaBlock; there are some for MambaForCausalLM, Mamba2ForCausalLM,"
        " FalconMambaForCausalLM, LanguageModel"
    )
    assert ANALYSIS.lacks(Gone()) == "the model, which is gone"


def test_wrong_requests_are_refused():
    one = planted(np.array([[1.0, 2.0], [2.0, 1.0]]))
    short, deep = planted(np.array([[1.0, 2.0, 3.0]])), planted(np.array([[1.0, 2.0], [2.0, 1.0]]), layers=2)
    asks = {
        "relevance is what probe.relevance.* returned; got Dataset": (xr.Dataset(), {}),
        "gradient needs rules='gradient'; got 'mambalrp'": (one, {"gradient": one}),
        "baseline differs from relevance in token_id": (one, {"baseline": short}),
        r"baseline has layers \[0, 1\] and relevance \[0\]": (one, {"baseline": deep}),
        "other explains the same targets": (one, {"other": one}),
        "perturbation is what probe.perturbed": (one, {"perturbation": one}),
        "n_bootstrap must be at least 2; got 1": (one, {"n_bootstrap": 1}),
    }
    for match, (given, options) in asks.items():
        with pytest.raises(ValueError, match=match):
            measure(given, **options)
    result = measure(one)
    for match, options in {
        r"kind must be one of .* got 'pie'": {"kind": "pie"},
        r'kind "curve" needs measure\(\.\.\., perturbation=': {"kind": "curve"},
        "row must be 0 to 1; got 2": {"kind": "tokens", "row": 2},
    }.items():
        with pytest.raises(ValueError, match=match):
            plot(result, **options)
    with pytest.raises(ValueError, match=r"attribution\.plot draws what"):
        plot(one)


def test_memory_is_linear_in_the_tokens():
    import tracemalloc

    peaks = []
    for length in (2048, 8192):
        given = planted(np.random.default_rng(0).random((2, length)), layers=2)
        tracemalloc.start()
        measure(given, n_bootstrap=2)
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert peaks[1] < 4.5 * peaks[0]


@pytest.mark.long
@pytest.mark.parametrize("name", mp.zoo.names())
def test_relevance_of_every_zoo_model_is_conserved_and_finds_what_it_answers_from(name):
    from mamba_probe.reproduce.trained import checkpoints, fresh_task

    task = mp.tasks.mqar(batch=4, length=64, n_pairs=8, vocab=256, seed=1)
    for each in checkpoints():
        if each.name == name:
            task = fresh_task(each, 4, 1)
    with mp.attach(mp.load(f"zoo:{name}")) as probe:
        found = relevance(probe, task, batch_size=2)
        taken = perturbed(probe, found, batch_size=2)
    assert float(found["conservation_error"].max()) < 1e-5
    result = measure(found, perturbation=taken)
    if float(result["top"].mean()) > 0.9:
        own = result["mean_class_share"].sel(token_class="own").item()
        assert result["mean_pair_share"].item() + own > 0.5
        assert result["mean_pair_share"].item() > 10 * result["chance"].values[0]
        assert result["area_gain"].sel(order="random").item() > 0.02


CONSTRUCTIONS = {
    "random codes": lambda: mp.constructions.mqar(n_keys=16, n_values=16, key_code="random", bits=(64, 64), seed=0),
    "last": lambda: mp.constructions.mqar(n_keys=16, n_values=16, writes="last"),
    "last, mamba2": lambda: mp.constructions.mqar("mamba2", n_keys=16, n_values=16, writes="last"),
    "overwrite": lambda: mp.constructions.mqar(n_keys=16, n_values=16, writes="overwrite"),
    "s4d": lambda: mp.constructions.mqar("s4d", n_keys=16, n_values=16),
    "constant weight": lambda: mp.constructions.mqar(n_keys=16, n_values=16, key_code="constant-weight"),
}


@pytest.mark.long
@pytest.mark.parametrize("name", sorted(CONSTRUCTIONS))
def test_relevance_of_every_recall_construction_is_conserved_and_halved_by_its_gate(name):
    task = mp.tasks.mqar(batch=4, length=32, n_pairs=4, vocab=32, seed=1)
    with mp.attach(CONSTRUCTIONS[name]().model) as probe:
        found = relevance(probe, task)
    assert (found["top_id"].values == found["target_id"].values).all()
    assert float(found["conservation_error"].max()) < 1e-5
    own = np.take_along_axis(found["relevance"].values, found["query_token"].values[..., None], axis=2)[..., 0]
    assert own / found["logit"].values == pytest.approx(0.5, abs=0.02)
