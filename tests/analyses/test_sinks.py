"""Ratios of step sizes by class: brute force, planted sinks, what chance gives, and refusals."""

import numpy as np
import pytest
import xarray as xr

from mamba_probe.analyses import sinks
from mamba_probe.analyses.sinks import core, stream

OVER = ("batch", "token")


def trace_of(delta, valid=None, **coords):
    """A Mamba-1 trace of these step sizes (layer, batch, token, channel)."""
    n_layers, _, _, n_channels = delta.shape
    valid = np.ones(delta.shape[1:3], bool) if valid is None else valid
    delta = np.where(valid[..., None], delta, np.nan)
    position = np.where(valid, np.cumsum(valid, axis=1) - 1, -1)
    return xr.Dataset(
        {"delta": (("layer", *OVER, "channel"), delta),
         "A": (("layer", "channel", "state"), -np.ones((n_layers, n_channels, 1)))},
        {"layer": 3 + np.arange(n_layers), "valid": (OVER, valid), "position": (OVER, position),
         **{name: (OVER, values) for name, values in coords.items()}},
        {"schema_version": 1, "family": "mamba", "model": "planted"},
    )  # fmt: skip


def random_delta(seed, shape=(2, 4, 40, 6)):
    return np.exp(0.7 * np.random.default_rng(seed).standard_normal(shape))


def labels_of(seed, shape=(4, 40), share=0.15):
    return np.where(np.random.default_rng((seed, 1)).random(shape) < share, "event", "").astype(object)


def test_ratios_are_those_of_a_loop():
    delta, labels, valid = random_delta(0), labels_of(0), np.ones((4, 40), bool)
    valid[1, :7], valid[3, 30:] = False, False
    found = sinks.measure(trace_of(delta, valid), classes=labels, n_shifts=19)
    for layer in range(2):
        for channel in range(6):
            for name in found["class"].values:
                at = rest = 0.0
                for row in range(4):
                    tokens = [t for t in range(40) if valid[row, t]]
                    chosen = [t for t in tokens if (labels[row, t] == "event" if name == "event" else t == tokens[0])]
                    others = [t for t in tokens if t not in chosen]
                    at += sum(delta[layer, row, t, channel] for t in chosen)
                    rest += len(chosen) * sum(delta[layer, row, t, channel] for t in others) / len(others)
                one = found.isel(layer=layer, channel=channel).sel({"class": name})
                assert one["ratio"].item() == pytest.approx(at / rest, rel=1e-12)
                assert one["class_delta"].item() / one["rest_delta"].item() == pytest.approx(at / rest, rel=1e-12)
    geometric = np.exp(np.log(found["ratio"].values).mean(axis=-1))
    np.testing.assert_allclose(found["layer_ratio"].values, geometric, rtol=1e-12)


def test_planted_specialists_are_found_and_no_others():
    delta, labels = random_delta(1, (2, 6, 60, 8)), labels_of(1, (6, 60))
    delta[1, ..., [2, 5]] *= np.where(labels == "event", 8.0, 1.0)
    found = sinks.measure(trace_of(delta), classes=labels)
    expected = np.zeros((2, 8), bool)
    expected[1, [2, 5]] = True
    assert np.array_equal(found["specialist"].sel({"class": "event"}).values, expected)
    assert found["specialist_share"].sel({"class": "event"}).values.tolist() == [0.0, 0.25]
    assert found["share"].sel({"class": "event"}).item() == 0.125
    assert not found["specialist"].sel({"class": "first token"}).any()
    one = found.sel({"class": "event"}).isel(layer=1, channel=2)
    assert one["ratio_low"] < one["ratio"] < one["ratio_high"]
    assert one["ratio"].item() == pytest.approx(8, rel=0.35)
    assert found["verdict"].values.tolist() == ["a ratio, not a function: no ablation was given"] * 2


@pytest.mark.long
def test_by_chance_one_in_twenty_recordings_has_any_specialist():
    """Family-wise: over 3 layers, 5 heads and 2 classes together, with step sizes that have nothing to do with them."""
    false = 0
    for seed in range(60):
        trace = trace_of(random_delta(100 + seed, (3, 3, 30, 5)))
        found = sinks.measure(
            trace, classes=labels_of(100 + seed, (3, 30)), threshold=1e-6, n_shifts=59, n_bootstrap=2, seed=seed
        )
        false += bool(found["specialist"].any())
    assert 1 <= false <= 9, "binomial(60, 0.05) lies within 0 .. 9 but for 0.1 %; without any, the test would be dull"


def test_rows_of_large_steps_make_no_ratio():
    """Steps that differ between rows alone, in rows with many tokens of the class: pooling all rows would give 1.6."""
    scale, labels = np.array([1.0, 10.0]), np.full((2, 20), "", object)
    labels[0, :2] = labels[1, :15] = "event"
    delta = np.broadcast_to(scale[None, :, None, None], (1, 2, 20, 3)).copy()
    found = sinks.measure(trace_of(delta), classes=labels)
    np.testing.assert_allclose(found["ratio"].values, 1.0, rtol=1e-12)
    np.testing.assert_allclose(found["null_ratio"].values, 1.0, rtol=1e-12)
    assert found["p_value"].min() > 0.5
    assert not found["specialist"].any()


def test_tiny_steps_of_the_rest_are_not_lost():
    delta = np.full((1, 2, 10, 1), 1e-18)
    delta[:, :, 3] = 1.0
    found = sinks.measure(trace_of(delta), classes=np.where(delta[0, ..., 0] == 1, "value", "").astype(object))
    assert found["ratio"].sel({"class": "value"}).item() == pytest.approx(1e18, rel=1e-9)
    assert found["specialist"].sel({"class": "value"}).all()


def test_steps_of_zero_have_no_ratio():
    delta = random_delta(2, (1, 3, 12, 2))
    delta[..., 1] = 0.0
    found = sinks.measure(trace_of(delta))
    assert np.isnan(found["ratio"].values[0, 0, 1])
    assert not found["specialist"].values[0, 0, 1]
    assert found["layer_ratio"].item() == pytest.approx(found["ratio"].values[0, 0, 0])


def test_steps_that_are_zero_at_most_tokens_keep_their_order():
    """A shift whose class has no step at all has a ratio of 0, one whose rest has none an infinite one."""
    delta = np.zeros((1, 3, 12, 1))
    delta[:, :, 0] = 5.0
    found = sinks.measure(trace_of(delta), n_shifts=99)
    assert np.isposinf(found["ratio"].item())
    assert found["specialist"].item()
    delta[:, :, 1:] = np.linspace(0, 1, 11)[:, None]
    found = sinks.measure(trace_of(delta[:, :, ::-1]), n_shifts=99)
    assert found["ratio"].item() == pytest.approx(11 / 9.5)
    assert not found["specialist"].item()


def test_more_heads_looked_at_are_counted():
    """The same head among more of them: its p-value rises."""
    delta, labels = random_delta(3, (1, 4, 40, 60)), labels_of(3)
    delta[..., 0] *= np.where(labels == "event", 1.6, 1.0)
    few = sinks.measure(trace_of(delta[..., :1]), classes=labels, n_shifts=999, n_bootstrap=2)
    many = sinks.measure(trace_of(delta), classes=labels, n_shifts=999, n_bootstrap=2)
    p = [each["p_value"].sel({"class": "event"}).values[0, 0] for each in (few, many)]
    assert p[0] < p[1]
    assert few["ratio"].values[1, 0, 0] == pytest.approx(many["ratio"].values[1, 0, 0], rel=1e-12)


def test_blocks_of_heads_and_of_shifts_change_nothing(monkeypatch):
    trace, labels = trace_of(random_delta(4)), labels_of(4)
    whole = sinks.measure(trace, classes=labels, n_shifts=29)
    monkeypatch.setattr(stream, "READ_BYTES", 8 * 40 * 2)
    monkeypatch.setattr(core, "BLOCK_BYTES", 8 * 40 * 2 * 7)
    xr.testing.assert_allclose(sinks.measure(trace, classes=labels, n_shifts=29), whole, rtol=1e-12)


def test_the_cost_grows_with_the_tokens(monkeypatch):
    counted = []
    sums = core.sums

    def counting(member, delta):
        counted.append(member.size * delta.shape[1])
        return sums(member, delta)

    monkeypatch.setattr(core, "sums", counting)
    cost = []
    for n_tokens in (100, 200, 400):
        counted.clear()
        sinks.measure(trace_of(random_delta(5, (1, 2, n_tokens, 3))), n_shifts=19, n_bootstrap=2)
        cost.append(sum(counted))
    assert cost == [cost[0], 2 * cost[0], 4 * cost[0]]


def test_classes_come_from_text_roles_and_labels():
    text = [["<s>", "\u2581Hi", ",", "<0x0A>", "\u0120\u010a", "\u0120(", "x!", ""]]
    role = [["key", "value", "filler", "key", "value", "filler", "query", ""]]
    valid = np.array([[True] * 7 + [False]])
    trace = trace_of(np.ones((1, 1, 8, 1)), valid, token_text=np.array(text, object), role=np.array(role, object))
    found = sinks.classes(trace, np.array([["a", "", "", "", "b", "b", "", "b"]], object))
    tokens = {
        name: np.flatnonzero(mask[0]).tolist() for name, mask in zip(found["class"].values, found.values, strict=True)
    }
    assert tokens == {
        "first token": [0], "newline": [3, 4], "punctuation": [2, 5], "role: filler": [2, 5], "role: key": [0, 3],
        "role: query": [6], "role: value": [1, 4], "a": [0], "b": [4, 5],
    }  # fmt: skip


def test_a_class_that_is_all_or_nothing_of_each_row_is_left_out():
    labels = np.array([["all"] * 4, [""] * 4], object)
    assert sinks.classes(trace_of(np.ones((1, 2, 4, 1))), labels)["class"].values.tolist() == ["first token"]


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"n_shifts": 18}, "n_shifts must be at least 19"),
        ({"threshold": 0.0}, "threshold is a ratio above 0"),
        ({"n_bootstrap": 1}, "n_bootstrap must be at least 2"),
        ({"classes": np.full((2, 4), "", object)}, r"labels needs strings \(batch, token\) = \(4, 40\)"),
        ({"classes": np.zeros((4, 40))}, "labels needs strings"),
        ({"weights": xr.Dataset()}, "does not use weights"),
        ({"ablated": xr.Dataset()}, "ablated is what ablate_class"),
    ],
)
def test_refusals(options, text):
    with pytest.raises(ValueError, match=text):
        sinks.measure(trace_of(random_delta(6)), **options)


def test_constant_steps_of_s4d_are_refused():
    trace = trace_of(random_delta(8)).isel(batch=0, token=0, drop=True)[["delta", "A"]].assign_attrs(family="s4d")
    valid = trace_of(random_delta(8))[["valid", "position"]].coords
    with pytest.raises(ValueError, match="S4D's step sizes are constants of its channels"):
        sinks.measure(trace.assign_coords({name: valid[name] for name in ("valid", "position")}))


def test_masks_of_another_kind_are_refused():
    trace = trace_of(random_delta(7))
    mask = sinks.classes(trace)
    with pytest.raises(ValueError, match="there is no class: nothing to compare"):
        sinks.measure(trace, classes=mask[:0])
    with pytest.raises(ValueError, match="classes needs booleans"):
        sinks.measure(trace, classes=mask.astype(int))
    with pytest.raises(ValueError, match=r"classes \['first token'\] have no row"):
        sinks.measure(trace, classes=mask & False)


def test_one_row_declares_no_specialist():
    delta = random_delta(7, (1, 1, 60, 2))
    delta[:, :, 0] = 1e3
    found = sinks.measure(trace_of(delta))
    assert found["ratio"].min() > 2
    assert not found["specialist"].any()


@pytest.mark.parametrize("rho", [0.0, 0.9])
def test_a_run_of_labels_holds_its_family_wise_error(rho):
    """Steps that stay alike for a while, and ten consecutive labels: permutations would err every other time."""
    false = 0
    for seed in range(60):
        rng = np.random.default_rng((seed, 5))
        steps = rng.standard_normal((1, 8, 160, 5))
        for t in range(1, 160):
            steps[:, :, t] = rho * steps[:, :, t - 1] + np.sqrt(1 - rho**2) * steps[:, :, t]
        labels = np.full((8, 100), "", object)
        for row in labels:
            start = rng.integers(90)
            row[start : start + 10] = "event"
        trace = trace_of(np.exp(0.7 * steps[:, :, 60:]))
        found = sinks.measure(trace, classes=labels, threshold=1e-9, n_shifts=59, n_bootstrap=2, seed=seed)
        false += bool(found["specialist"].any())
    assert false <= 9, "binomial(60, 0.05) lies above 9 in 0.1 %"
