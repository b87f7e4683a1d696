"""On each construction every signature is at its ideal; each circuit is recognised, however it matches; its diagram."""

import matplotlib
import matplotlib.pyplot as plt
import numpy as np
import pytest

import mamba_probe as mp
from mamba_probe.analyses import recall_circuit
from mamba_probe.constructions import induction, mqar
from mamba_probe.report import finding
from mamba_probe.run import record_task

VARIABLES = ("delta", "A", "B", "C", "x", "z", "u", "out")
TASK = mp.tasks.mqar(4, 48, 6, 64, seed=3)
HEAD_TASK = mp.tasks.induction(batch=12, length=48, vocab=8, occurrences=3)
CODES = ("one-hot", "constant-weight")
CASES = {
    **{f"{m}, {code}": (mqar(m, 32, 32, code), TASK) for m in ("mamba1", "mamba2", "s4d") for code in CODES},
    **{f"{m}, random": (mqar(m, 32, 32, "random", bits=(32, 32), seed=0), TASK) for m in ("mamba1", "mamba2")},
    "s4d, random": (mqar("s4d", 32, 32, "random", bits=(16, 12), seed=0), TASK),
    **{f"{m}, last": (mqar(m, 32, 32, writes="last"), TASK) for m in ("mamba1", "mamba2")},
    "mamba1, overwrite": (mqar(n_keys=32, n_values=32, writes="overwrite"), TASK),
    **{f"{m}, special": (induction("special", m, 8), HEAD_TASK) for m in ("mamba1", "mamba2")},
}  # fmt: skip
EDITS = (mp.ablate("conv"), mp.ablate("gate"), mp.ablate("decay"))
SELECTION = (mp.freeze("delta"), mp.freeze("B"), mp.freeze("C"))


@pytest.fixture(scope="module")
def measured():
    """A result of each case, with edits; made once."""
    made = {}

    def of(name):
        if name not in made:
            construction, task = CASES[name]
            with mp.attach(construction.model) as probe:
                trace, weights = probe.record(task, variables=VARIABLES), probe.weights()
                edits = probe.intervene(task, EDITS if "s4d" in name else EDITS + SELECTION)
            made[name] = construction, recall_circuit.measure(trace, weights=weights, interventions=edits)
        return made[name]

    return of


@pytest.mark.parametrize("name", CASES)
def test_every_signature_is_at_the_ideal_it_states(name, measured):
    construction, result = measured(name)
    table = recall_circuit.distance(result, construction.signatures).isel(layer=0)
    stated = np.isfinite(table.ideal)
    np.testing.assert_allclose(table.measured[stated], table.ideal[stated], atol=1e-3)
    np.testing.assert_allclose(table.distance[stated], 0.0, atol=2e-3)
    known = set(table.signature.values[stated])
    given = {name for name in construction.signatures if name != "S11"}
    assert known >= given, "an ideal without a measurement"
    if "S11" in construction.signatures:
        swaps = {"S11_x"} if "s4d" in name else {"S11_B", "S11_C", "S11_x"}
        assert known - given == swaps
    assert result.identity_error.item() < 1e-5


@pytest.mark.parametrize("name", CASES)
def test_the_circuit_is_recognised_wherever_it_matches(name, measured):
    _, result = measured(name)
    assert result.verdict.startswith("recall circuit in layer 0, written at the value, matched ")
    in_state = not any(word in name for word in ("s4d", "overwrite", "special"))
    assert ("matched in the state" in result.verdict) == in_state
    assert ("S6" in result.verdict.split(";")[0]) == ("s4d" not in name)


def share(result, name):
    return result.causal_share.sel(intervention=name).item()


def test_each_part_is_needed_where_the_construction_needs_it(measured):
    one_hot, overwrite, s4d = (measured(n)[1] for n in ("mamba1, one-hot", "mamba1, overwrite", "s4d, one-hot"))
    for needed in ("ablate(conv)", "freeze(B)", "freeze(C)"):
        assert share(one_hot, needed) > 0.9
    for spare in ("ablate(decay)", "ablate(gate)", "freeze(delta)"):
        assert share(one_hot, spare) == 0.0
    assert share(overwrite, "freeze(delta)") > 0.8, "its step sizes choose the key"
    assert share(overwrite, "freeze(B)") == share(overwrite, "freeze(C)") == 0.0
    assert share(s4d, "ablate(gate)") > 0.9, "its gates choose the key"
    assert s4d.intervention.values.tolist() == ["ablate(conv)", "ablate(gate)", "ablate(decay)"]
    last = measured("mamba1, last")[1]
    assert share(last, "ablate(decay)") == 0.0, "no key comes twice here"
    assert (last.causal_low <= last.causal_share).all()
    assert (last.causal_share <= last.causal_high).all()


def test_what_s4d_does_not_have_is_absent_with_its_reason(measured):
    result = measured("s4d, one-hot")[1]
    without = result.absent.values != ""
    names = result.signature.values[without].tolist()
    assert names == ["S5", "S6", "S8", "S10_rel", "S10_C0", "S11_B", "S11_C"]
    assert result.value[without].isnull().all()
    assert result.null[without].isnull().all()
    assert "B, C and delta are the same at every token" in result.attrs["absent"]
    assert {"carried", "tap_mass_x"} <= set(result.data_vars)
    assert not {"matched", "shifted", "tap_mass_B"} & set(result.data_vars)


def test_channels_and_states_that_the_construction_uses_are_named(measured):
    construction, result = measured("mamba1, one-hot")
    roles = np.array(construction.channels)
    carrying = result.carried.isel(layer=0).values > 1e-6
    assert all("value" in role for role in roles[carrying])
    shifting = result.shifted.isel(layer=0).values > 1e-6
    assert result.shifted.sum().item() == pytest.approx(1.0)
    assert not (shifting & carrying).any()
    keys = set(TASK.input_ids[TASK.role == "query"].tolist())
    used = np.flatnonzero(result.matched.isel(layer=0, group=0).values > 1e-6).tolist()
    assert used == sorted(keys), "state n holds key n"


def drawn(result):
    matplotlib.use("Agg")
    figure, ax = plt.subplots()
    recall_circuit.plot(result, ax, kind="diagram")
    texts = [text.get_text() for text in ax.texts]
    plt.close(figure)
    return texts, len(ax.patches)


def test_the_diagram_draws_what_was_measured_and_nothing_else(measured):
    texts, boxes = drawn(measured("mamba1, one-hot")[1])
    assert boxes == 6
    assert "S11 B = 1.00 (null 0.25)\nablate(conv) takes 1.0" in "\n".join(texts)
    assert [name for name in texts if name in ("shift", "write", "retain", "match", "gate", "read out")] == [
        "shift", "write", "retain", "match", "gate", "read out",
    ]  # fmt: skip
    texts, boxes = drawn(measured("s4d, one-hot")[1])
    assert "S13 = 1.00 (null 0.00)" in "\n".join(texts)
    assert "S6" not in "\n".join(texts)
    assert "freeze" not in "\n".join(texts)
    result = measured("s4d, one-hot")[1]
    blind = result.assign(value=result.value.where(result.signature != "S13"))
    texts, boxes = drawn(blind)
    assert boxes == 5
    assert "match" not in texts
    texts, boxes = drawn(result.assign(solved=False))
    assert boxes == 0
    assert "nothing to draw" in texts[0]


def test_distance_and_plot_refuse_what_they_cannot_do(measured):
    result = measured("mamba1, one-hot")[1]
    with pytest.raises(ValueError, match="ideals name S99, which are no signatures"):
        recall_circuit.distance(result, {"S99": 1.0})
    with pytest.raises(ValueError, match=r"unknown kind 'diagramm': did you mean 'diagram'"):
        recall_circuit.plot(result, kind="diagramm")
    with pytest.raises(ValueError, match="layer 7 is not in the result"):
        recall_circuit.diagram(result, layer=7)
    with pytest.raises(ValueError, match="a result of recall_circuit distance"):
        recall_circuit.plot(recall_circuit.distance(result))
    scaled = recall_circuit.distance(result.assign(value=result.null)).isel(layer=0)
    measured_ones = np.isfinite(scaled.distance)
    assert measured_ones.sum() == 14
    np.testing.assert_allclose(scaled.distance[measured_ones], 1.0)


def test_s4d_is_recorded_analysed_and_reported_like_any_other():
    """Edits that it has; in the report each signature it has, with ideal and distance, and no other."""
    run = record_task(mqar("s4d", 16, 16).model, "mqar", rows=8, length=24, n_pairs=4)
    assert run.interventions is not None
    assert run.interventions.intervention.values.tolist() == ["none", "ablate(conv)", "ablate(gate)", "ablate(decay)"]
    result = recall_circuit.measure(run.trace, weights=run.weights, interventions=run.interventions, baseline=run.twin)
    said = finding("recall_circuit", result)
    assert said.sentence.startswith("Recall circuit in layer 0")
    rows = {row.what: row for row in said.rows}
    assert rows["S12: AND index of a channel; ideal 1, distance 0"].value == "1"
    assert rows["S10_x0: tap of x on the value; ideal 0.5, distance 0"].value == "0.5"
    assert not [what for what in rows if what.startswith(("S5", "S6", "S8", "S11_B"))]
    assert {row.value for row in said.rows if row.what.startswith("S")} == {"1", "0.5"}
    assert "none" not in {row.value for row in said.rows}
