"""Where key and value are joined: estimators by hand, planted results, nulls, verdicts, the report, models."""

import copy
from contextlib import nullcontext
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
import xarray as xr

import mamba_probe as mp
from mamba_probe.analyses import association
from mamba_probe.analyses.association.core import gain, held_at, share
from mamba_probe.analyses.association.entry import ANALYSIS
from mamba_probe.associating import ROLES, associating
from mamba_probe.run import randomised_twin

RNG = np.random.default_rng(0)
SITES = ("mixer_in", "scan", "mixer_out")
LIKE_ZOO = {"length": 64, "n_pairs": 8, "vocab": 256, "filler": "zero", "seed": 5}


def associated(model, batch=16, **options):
    with mp.attach(model) as probe:
        return associating(probe, mp.tasks.mqar(batch=batch, **LIKE_ZOO), **options)


# -- estimators -----------------------------------------------------------------------------------------------------


def test_the_gain_is_least_squares_over_the_rows_that_have_the_place():
    change, span = RNG.normal(size=(3, 2, 9)), RNG.normal(size=9)
    change[1, 0, 4:] = np.nan
    change[2, 1] = np.nan
    draws = RNG.integers(0, 4, size=9)
    found = gain(change, span, draws)
    for place in np.ndindex(3, 2):
        kept = np.repeat(np.arange(9), draws)
        kept = kept[~np.isnan(change[place][kept])]
        if not len(kept):
            assert np.isnan(found[place])
            continue
        expected = np.linalg.lstsq(span[kept, None], change[place][kept], rcond=None)[0]
        assert found[place] == pytest.approx(expected.item(), abs=1e-12)
    one = gain(change[:, :, :1], span[:1], np.ones(1, int))
    np.testing.assert_allclose(one, change[:, :, 0] / span[0])


def test_a_row_without_a_span_does_not_weigh_and_scale_does_not_matter():
    change, span = np.array([[1.0, 2.0, 1e-3]]), np.array([2.0, 4.0, 0.0])
    assert gain(change, span, np.ones(3, int)) == pytest.approx([0.5])
    assert gain(7 * change, 7 * span, np.ones(3, int)) == pytest.approx([0.5])


def test_the_share_counts_rows_that_have_the_place():
    right, there = RNG.random((2, 8)) < 0.5, RNG.random((2, 8)) < 0.7
    draws = RNG.integers(0, 3, size=8)
    for i in range(2):
        counted = [(right[i, row], draws[row]) for row in range(8) if there[i, row]]
        expected = sum(d for r, d in counted if r) / sum(d for _, d in counted)
        assert share(right, there, draws)[i] == pytest.approx(expected)
    assert np.isnan(share(right, np.zeros((2, 8), bool), draws)).all()


def test_what_holds_is_above_a_tenth_and_above_another_row():
    value, nan = np.array([0.3, 0.9, 0.5, 0.05]), np.nan
    assert held_at(value, value - 0.01, np.array([nan, 0.1, 0.2, nan])) == [1, 2, 0]
    assert held_at(value, value - 0.01, np.array([0.4, 0.95, 0.2, nan])) == [2]
    assert held_at(np.full(2, nan), np.full(2, nan), np.full(2, nan)) == []


# -- planted results ------------------------------------------------------------------------------------------------


def planted(table, n_rows=20, n_right=None, null=0.0, lucky=0, noise=0.0):
    """What a collector would give of a model with these gains, {(site, layer): {role: gain}}; spans are 2 .. 4."""
    n_right = n_rows if n_right is None else n_right
    layers = sorted({layer for _, layer in table})
    shape = (len(SITES), len(layers), len(ROLES), n_rows)
    rng = np.random.default_rng(1)
    corrupt, span = rng.normal(size=n_rows), rng.uniform(2, 4, size=n_rows)
    gains = np.zeros(shape[:3])
    for (site, layer), roles in table.items():
        for role, value in roles.items():
            gains[SITES.index(site), layers.index(layer), ROLES.index(role)] = value
    patched = corrupt + gains[..., None] * span + noise * rng.normal(size=shape)
    clean_right, corrupt_right = np.arange(n_rows) < n_right, np.arange(n_rows) < lucky
    place = ("site", "layer", "role", "batch")
    data = {
        "patched": (place, patched), "right": (place, np.broadcast_to(gains[..., None] > 0.5, shape)),
        "null_patched": (place, np.broadcast_to(corrupt + null * span, shape)),
        "null_right": (place, np.zeros(shape, bool)), "clean": ("batch", corrupt + span), "corrupt": ("batch", corrupt),
        "clean_right": ("batch", clean_right), "corrupt_right": ("batch", corrupt_right),
        "counts": ("batch", clean_right & ~corrupt_right),
    }  # fmt: skip
    coords = {"site": list(SITES), "layer": layers, "role": list(ROLES)}
    return xr.Dataset(data, coords | {"valid": (("role", "batch"), np.ones(shape[2:], bool))}, {"model": "planted"})


CONVOLVED = {
    ("mixer_in", 0): {"key": 1.0},
    ("scan", 0): {"value": 0.75, "value+1": 0.25},
    ("mixer_out", 0): {"query": 1},
}


def test_planted_gains_come_back_with_their_nulls():
    result = association.measure(planted(CONVOLVED, null=0.05))
    assert result["recovered"].sel(site="scan", role="value").item() == pytest.approx(0.75)
    assert result["recovered"].sel(site="scan", role="value+1").item() == pytest.approx(0.25)
    assert result["null_recovered"].values == pytest.approx(np.full((3, 1, 6), 0.05))
    assert result["restored"].sel(site="scan", layer=0).values.tolist() == [0, 1, 0, 0, 0, 0]
    assert float(result["null_restored"].max()) == 0
    assert "twin_recovered" not in result
    for name in result.data_vars:
        assert result[name].attrs["long_name"]
        assert result[name].attrs["units"] == "1"


def test_intervals_are_over_the_rows_that_count():
    found = planted(CONVOLVED, n_rows=40, n_right=38, lucky=8, noise=1.0)
    one, other = (association.measure(found, n_bootstrap=100, seed=seed) for seed in (1, 2))
    assert (one["n_counted"], one["n_rows"].values.tolist(), one.attrs["n_rows"]) == (30, [30] * 6, "30")
    assert (one["recovered_low"] <= one["recovered"]).all()
    assert (one["recovered"] <= one["recovered_high"]).all()
    assert (one["recovered_low"] != other["recovered_low"]).any()
    assert one.identical(association.measure(found, n_bootstrap=100, seed=1))
    counted = association.measure(found.isel(batch=slice(8, 38)), n_bootstrap=100, seed=1)
    xr.testing.assert_allclose(one["recovered"], counted["recovered"])
    assert np.isnan(association.measure(found.isel(batch=[20]))["recovered_low"]).all()
    with pytest.raises(ValueError, match="n_bootstrap must be at least 2"):
        association.measure(found, n_bootstrap=1)


KINDS = {
    "convolution": CONVOLVED,
    "earlier layer": {
        ("mixer_in", 0): {"key": 1}, ("scan", 0): {"key": 1}, ("mixer_in", 1): {"value": 1}, ("scan", 1): {"value": 1},
    },
    "at the query": {("mixer_in", 0): {"key": 1.0}, ("scan", 0): {"key": 1.0}},
    "unseen": {("mixer_in", 0): {"key": 1.0}},
}  # fmt: skip
SAID = {
    "convolution": "joined in layer 0, in what its scan receives (value 0.75, value+1 0.25): the convolution",
    "earlier layer": "joined in layer 1, in what its scan receives (value 1.00): an earlier layer has brought it there",
    "at the query": "scan of layer 0 gives the answer back at the key's own token (key 1.00), none at the value's",
    "unseen": "the model recalls, but no one token's scan gives the answer back",
}


@pytest.mark.parametrize("kind", KINDS)
def test_the_verdict_by_its_rule(kind):
    result = association.measure(planted(KINDS[kind]))
    assert result.attrs["mechanism"] == kind
    assert SAID[kind] in result.attrs["verdict"]
    assert "20 of 20 answered (lower bound 0.84)" in result.attrs["verdict"]


def test_what_another_row_gives_back_as_well_is_no_finding():
    assert association.measure(planted(CONVOLVED, null=0.8)).attrs["mechanism"] == "unseen"


@pytest.mark.parametrize(("n_right", "solved"), [(14, False), (15, True)])
def test_nothing_is_reported_unless_the_accuracy_is_shown_to_be_above_a_half(n_right, solved):
    """Wilson's lower bound of 14 of 20 is .48, of 15 of 20 .53."""
    result = association.measure(planted(CONVOLVED, n_right=n_right))
    assert bool(result["solved"]) == solved
    assert np.isnan(result["recovered"]).all().item() != solved
    assert (result.attrs["mechanism"] == "none") != solved
    assert ("no mechanism is reported: 14 of 20 answered" in result.attrs["verdict"]) != solved


def test_answers_that_are_never_lost_and_scans_that_were_not_measured():
    assert "no answer is lost" in association.measure(planted(CONVOLVED, lucky=20)).attrs["verdict"]
    found = planted(CONVOLVED).sel(site=["mixer_in"])
    assert "(site scan)" in association.measure(found).attrs["verdict"]


# -- models ---------------------------------------------------------------------------------------------------------


def test_the_trained_model_joins_them_two_tokens_after_the_value():
    result = association.measure(associated(mp.load("zoo:trained-mqar-mamba1"), 12, sites=SITES, twin_seed=0))
    scan = result.sel(site="scan", layer=0)
    assert result.attrs["mechanism"] == "convolution"
    assert scan["recovered_low"].sel(role="value+2").item() > 0.9
    assert abs(scan["recovered"].sel(role=["key", "value", "value+1", "other"])).max() < 0.05
    assert abs(scan["null_recovered"]).max() < 0.25
    assert scan["restored"].sel(role="value+2").item() == 1
    assert result["recovered"].sel(site="mixer_in", role="key").item() == pytest.approx(1, abs=1e-5)
    assert result["recovered"].sel(site="mixer_out", role="query").item() == pytest.approx(1, abs=1e-5)
    assert scan["twin_recovered"].sel(role=["key", "value", "value+1", "value+2"]).max() < 0.85


def test_of_the_model_without_a_convolution_nothing_is_reported():
    result = association.measure(associated(mp.load("zoo:trained-mqar-no-conv"), batch=32, sites=SITES, twin_seed=0))
    assert result.attrs["mechanism"] == "none"
    assert result["accuracy_high"].item() < 0.5
    assert np.isnan(result["recovered"]).all()
    assert result["twin_recovered"].sel(site="scan", role="key").item() == pytest.approx(1, abs=1e-5)


@pytest.mark.parametrize("name", ["trained-mqar-mamba1", "trained-mqar-mamba2"])
def test_chance_spreads_the_key_over_the_four_tokens_that_the_convolution_reaches(name):
    """Of 20 random models: .17 to .38 each (standard deviations .12 to .19), together 1.0."""
    model, found = mp.load(f"zoo:{name}"), []
    for seed in range(100, 104):
        made = associated(randomised_twin(model, seed), batch=32, sites=["scan"])
        change = (made["patched"] - made["corrupt"]).isel(site=0, layer=0).values
        found.append(gain(change, (made["clean"] - made["corrupt"]).values, np.ones(32, int)))
        assert found[-1][4:] == pytest.approx([0, 0], abs=1e-6), "query, other"
        assert found[-1].sum() == pytest.approx(1, abs=0.35)
    assert np.mean(found, axis=0)[:4].max() < 0.7


MQAR = ("mqar-mamba1", "trained-mqar-mamba1", "trained-mqar-mamba2", "trained-mqar-s4d")
TABLE = dict(zip(MQAR, ((0, 1, 0, 0), (0, 0.01, 0, 1), (0, 1, 0, 0), (0, 0.31, 0.69, 0.1)), strict=True))
"""What the scan gives back at the key, the value and the two tokens after it: docs/association.md."""
B_ALONE = dict(zip(MQAR[:3], (1, 0.92, 0.75), strict=True))
UNSOLVED = ("trained-mqar-mamba1-small", "trained-mqar-mamba2-small", "trained-mqar-s4d-small", "trained-mqar-no-conv")


@pytest.mark.long
@pytest.mark.parametrize("name", [*MQAR, *UNSOLVED])
def test_every_recall_model_of_the_zoo(name):
    asked = mp.zoo.card(name)["task"] if name in UNSOLVED else LIKE_ZOO
    task = mp.tasks.mqar(**{key: value for key, value in asked.items() if key != "name"} | {"batch": 48, "seed": 5})
    with mp.attach(mp.load(f"zoo:{name}")) as probe:
        result = association.measure(associating(probe, task))
    assert result.attrs["mechanism"] == ("none" if name in UNSOLVED else "convolution")
    if name in TABLE:
        scan = result["recovered"].sel(site="scan", layer=0)
        assert scan.values == pytest.approx([*TABLE[name], 0, 0], abs=0.02)
        assert abs(result["null_recovered"].sel(site="scan")).max() < 0.11
    if name in B_ALONE:
        found = result["recovered"].sel(site="B", layer=0).max()
        assert found.item() == pytest.approx(B_ALONE[name], abs=0.02)


@pytest.mark.long
@pytest.mark.parametrize("key_code", ["one-hot", "constant-weight"])
@pytest.mark.parametrize("mixer", ["mamba1", "mamba2", "s4d"])
def test_every_recall_construction(mixer, key_code):
    model = mp.constructions.mqar(mixer, n_keys=32, n_values=32, key_code=key_code).model
    with mp.attach(model) as probe:
        found = associating(probe, mp.tasks.mqar(batch=32, length=48, n_pairs=6, vocab=64, seed=1))
    result = association.measure(found)
    assert result.attrs["mechanism"] == "convolution"
    scan = result["recovered"].sel(site="scan", layer=0)
    assert scan.sel(role="value").item() == pytest.approx(1, abs=0.02)
    assert abs(scan.drop_sel(role="value")).max() < 0.02


# -- the report, pictures, refusals -----------------------------------------------------------------------------------


@dataclass
class RunLike:
    """What an entry asks of a run."""

    task: Any
    model: Any = None
    missing: str = ""
    calls: list = field(default_factory=list)
    trace: xr.Dataset = field(default_factory=xr.Dataset)

    def lacks_model(self):
        return self.missing

    def probe(self):
        probe = mp.attach(self.model)

        class Given:
            associating = staticmethod(partial(associating, probe))

        self.calls.append(probe)
        return nullcontext(Given())


def test_the_entry_measures_says_and_draws_a_run():
    model = mp.constructions.mqar(n_keys=16, n_values=16).model
    run = RunLike(mp.tasks.mqar(batch=30, length=16, n_pairs=3, vocab=32), model)
    assert ANALYSIS.lacks(run) == ""
    result = ANALYSIS.of_run(run, 0)
    run.calls[0].detach()
    assert result.attrs["asked"] == "the first 24 of 30 rows, one query each"
    assert result["n_query"].item() == 24
    said, rows = ANALYSIS.says(result)
    assert said.startswith("Key and value are joined in layer 0, in what its scan receives (value 1.00)")
    by = {row.quantity: row for row in rows}
    assert by["answer given back by scan at value"].value == "1"
    assert by["answer given back by scan at value"].null.startswith("another row ")
    assert "; twin " in by["answer given back by scan at value"].null
    assert "answer given back by scan at key" not in by
    assert ANALYSIS.drawn(result)
    for name in ANALYSIS.notes:
        assert result.attrs[name]
    assert [panel.alike for panel in ANALYSIS.panels([result])] == [""]


def test_the_entry_says_what_lacks_and_reports_no_mechanism():
    task = mp.tasks.mqar(batch=8, length=16, n_pairs=3, vocab=32)
    assert ANALYSIS.lacks(RunLike(None)) == "a task of keys and values whose answers are known"
    assert ANALYSIS.lacks(RunLike(mp.tasks.induction_every_token(batch=2, length=16, vocab=16))).startswith("a task of")
    assert (
        ANALYSIS.lacks(RunLike(mp.tasks.induction(batch=2, length=16, vocab=16)))
        == "a task of two pairs a row at least"
    )
    full = mp.tasks.mqar(batch=2, length=16, n_pairs=3, vocab=8)
    assert ANALYSIS.lacks(RunLike(full)).startswith("a key that a row does not hold")
    both = xr.Dataset({"delta": (("direction",), [0.0, 0.0])})
    assert ANALYSIS.lacks(RunLike(task, trace=both)).startswith("a model that scans in one direction")
    assert ANALYSIS.lacks(RunLike(task, missing="the model")) == "the model"
    unsolved = association.measure(planted(CONVOLVED, n_right=2))
    said, rows = ANALYSIS.says(unsolved)
    assert said.startswith("No mechanism is reported: 2 of 20 answered")
    assert [row.quantity for row in rows] == ["accuracy, key as written", "accuracy, key corrupted"]
    assert not ANALYSIS.drawn(unsolved)


@pytest.mark.parametrize("kind", ["map", "bars"])
def test_pictures_show_the_numbers(kind):
    import matplotlib.pyplot as plt

    result = association.measure(planted(CONVOLVED | {("scan", 3): {"value": 0.5}}))
    ax = association.plot(result, kind=kind)
    assert ax.get_title(loc="left") == "planted:\nkey and value joined by the convolution"
    if kind == "map":
        assert [label.get_text() for label in ax.get_xticklabels()] == list(ROLES)
        assert len(ax.get_yticklabels()) == 6
        assert sorted({text.get_text() for text in ax.texts}) == ["0.00", "0.25", "0.50", "0.75", "1.00"]
    else:
        heights = sorted(round(bar.get_height(), 2) for bar in ax.patches if bar.get_height() > 0.01)
        assert heights == [0.25, 0.75, 1.0]
        assert association.plot(result, kind=kind, layer=3).get_xlabel().endswith("in layer 3")
    nothing = association.plot(association.measure(planted(CONVOLVED, n_right=2)), kind=kind)
    assert nothing.texts[0].get_text() == "2 of 20 queries answered: nothing to give back"
    plt.close("all")


def test_many_layers_are_drawn_in_part():
    import matplotlib.pyplot as plt

    deep = {("scan", layer): {"key": 1.0} for layer in range(48)}
    ax = association.plot(association.measure(planted(deep)))
    labels = [label.get_text() for label in ax.get_yticklabels()]
    assert len(labels) == 24
    assert (labels[0][:2], labels[-1][:3]) == ("0:", "47:")
    plt.close("all")


def test_wrong_results_and_arguments():
    result = association.measure(planted(CONVOLVED))
    with pytest.raises(ValueError, match=r"kind is one of map, bars; got 'graph'"):
        association.plot(result, kind="graph")
    with pytest.raises(ValueError, match=r"layer 7 is not in this result, which has \[0\]"):
        association.plot(result, kind="bars", layer=7)
    with pytest.raises(ValueError, match=r"association\.plot draws what association\.measure"):
        association.plot(planted(CONVOLVED))
    with pytest.raises(ValueError, match=r"takes what probe.associating\(task\) returned; got a Dataset of clean"):
        association.measure(planted(CONVOLVED)[["clean"]])


def test_measuring_leaves_the_model_as_it_was():
    model = mp.load("zoo:trained-mqar-mamba2")
    before = copy.deepcopy(model.state_dict())
    ids = torch.tensor(mp.tasks.mqar(batch=2, **LIKE_ZOO).input_ids)
    with torch.no_grad():
        native = model(ids).logits
        associated(model, batch=4)
        assert torch.equal(model(ids).logits, native)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
