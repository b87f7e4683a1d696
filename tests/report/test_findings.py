"""Sentences and tables: true for results that are censored, dead, unsolved, of one row or of many layers."""

import numpy as np
import pytest
import xarray as xr

import mamba_probe as mp
from mamba_probe.analyses import memory_horizon, wavelet_alignment
from mamba_probe.analyses.common.queries import answerable_queries
from mamba_probe.analyses.common.words import number, span
from mamba_probe.report import finding


def make_trace(delta, A=1.0, C=1.0, n_layers=1):
    rows, tokens = len(delta), len(delta[0])
    steps = np.broadcast_to(np.asarray(delta, np.float32)[None, ..., None], (n_layers, rows, tokens, 1))
    ones = np.ones((n_layers, rows, tokens, 1, 1), np.float32)
    return xr.Dataset(
        {
            "delta": (("layer", "batch", "token", "channel"), steps),
            "A": (("layer", "channel", "state"), np.full((n_layers, 1, 1), -A, np.float32)),
            "B": (("layer", "batch", "token", "group", "state"), ones),
            "C": (("layer", "batch", "token", "group", "state"), ones * C),
        },
        {
            "layer": np.arange(n_layers) * 3,
            "valid": (("batch", "token"), np.ones((rows, tokens), bool)),
            "position": (("batch", "token"), np.tile(np.arange(tokens), (rows, 1))),
        },
        {"schema_version": 1, "family": "mamba", "discretization": "euler"},
    )


def test_numbers_and_intervals_in_words():
    assert [number(v) for v in (0.5, np.nan, np.inf, 2e7)] == ["0.5", "none", "beyond the recording", "2.0e+07"]
    assert span(np.nan, 1.0) == ""
    assert span(np.inf, np.inf) == "beyond the recording"
    assert span(1.0, 2.0) == "1 to 2"


def test_a_layer_that_forgets_nothing_is_said_to():
    said = finding("memory_horizon", memory_horizon.measure(make_trace([[1e-9] * 32] * 3)))
    assert said.sentence == "Layer 0 forgets nothing within the recording: every horizon is censored."
    rows = {row.what: row for row in said.rows}
    assert rows["layer 0: median horizon, tokens"].value == "at least 16"
    assert "shuffled at least 16" in rows["layer 0: median horizon, tokens"].null
    assert rows["layer 0: selectivity gain"].value.startswith("not measurable")


def test_a_known_horizon_is_stated_with_its_equivalent():
    said = finding("memory_horizon", memory_horizon.measure(make_trace([[0.25] * 64] * 3)))
    assert (
        said.sentence == "Layer 0: the median write decays to 1/e after 4 tokens (time-invariant 4, steps shuffled 4)."
    )
    assert said.rows[0].value == "4"
    assert {row.value for row in said.rows if "gain" in row.what} == {"1"}
    many = finding("memory_horizon", memory_horizon.measure(make_trace([[0.25] * 64] * 3, n_layers=8)))
    assert len(many.rows) == 6 * 3
    one_row = finding("memory_horizon", memory_horizon.measure(make_trace([[0.25] * 64])))
    assert {row.interval for row in one_row.rows} == {""}


def test_a_censored_median_is_a_bound_and_each_layer_speaks_for_itself():
    trace = make_trace([[0.001] * 64] * 3, n_layers=2)
    trace["A"][1] = -300.0
    result = memory_horizon.measure(trace)
    said = finding("memory_horizon", result)
    assert (
        "Layer 3: the median write decays to 1/e after 4 tokens (time-invariant 4, steps shuffled 4)." in said.sentence
    )
    assert "Layer 0: cannot be told on rows this short: 100% of its writes outlast" in said.sentence
    shares = {row.what: row.value for row in said.rows if "beyond" in row.what}
    assert shares["layer 0: horizons beyond the recording"] == "100%"
    assert shares["layer 3: horizons beyond the recording"] != "100%"


def test_a_gain_whose_horizon_is_censored_is_a_bound():
    steps = np.r_[[20.0] * 10, [1e-6] * 54]  # erased at first, then held: the mean would forget in one token
    said = finding("memory_horizon", memory_horizon.measure(make_trace([steps.tolist()] * 3)))
    gain = next(row for row in said.rows if "gain" in row.what)
    least = sorted([1] * 9 + list(range(1, 56)))  # nine tokens die at once, the others outlast the row
    assert gain.value == f"at least {least[31]}"
    assert "86% of its writes outlast their rows: the median write lives at least" in said.sentence
    assert gain.null.startswith("time-invariant 1; shuffled ")
    assert "beyond" not in gain.null


def test_a_dead_layer_is_named_beside_a_live_one():
    trace = make_trace([[0.05] * 32] * 2, n_layers=2)
    trace["C"][1] = 0.0
    said = finding("wavelet_alignment", wavelet_alignment.measure(trace))
    assert "in layer 0" in said.sentence
    assert "1 layer(s) have no kernel with energy" in said.sentence


def test_what_a_kernel_is_not_above_is_said():
    """One token after another alike: shuffling changes nothing, and a kernel of one token has a larger cosine."""
    result = wavelet_alignment.measure(make_trace([[0.05] * 32] * 3))
    said = finding("wavelet_alignment", result)
    value, shuffled = (number(result[f"layer_{which}best_cosine"].item()) for which in ("", "null_shuffle_"))
    assert value == shuffled
    assert f"{value} in layer 0, not above time-invariant ({value}), steps shuffled" in said.sentence
    sharp = finding("wavelet_alignment", result.assign(layer_best_cosine_low=("layer", [0.9])))
    assert f"above time-invariant ({value}), steps shuffled ({value}) and a single token (0.707)." in sharp.sentence
    assert "not above" not in sharp.sentence
    row = said.rows[0]
    assert row.null == f"time-invariant {value}; steps shuffled {value}"


def test_kernels_without_energy_are_said_to_be():
    said = finding("wavelet_alignment", wavelet_alignment.measure(make_trace([[0.5] * 32] * 2, C=0.0)))
    assert "no kernel has energy" in said.sentence
    assert said.rows[-1].value == "2 of 2"


def test_a_query_is_chosen_whose_answer_its_window_holds():
    task = mp.tasks.mqar(batch=32, length=64, n_pairs=8, vocab=256, seed=0)
    trace = xr.Dataset(
        coords={
            "role": (("batch", "token"), task.role),
            "source_token": (("batch", "token"), task.source_token),
            "position": (("batch", "token"), np.tile(np.arange(64), (32, 1))),
            "valid": (("batch", "token"), np.ones((32, 64), bool)),
        }
    )
    chosen = answerable_queries(trace)
    assert chosen.shape == (32, 1)
    for row, query in enumerate(chosen[:, 0]):
        held = [t for t in range(64) if task.role[row, t] == "query" and _in_window(task.source_token[row, t], t)]
        assert query == held[-1]
    assert answerable_queries(trace.drop_vars("role")) is None


def _in_window(source, query):
    window = 2 ** int(np.log2(query + 1))
    return source in range(query + 1 - window, query + 1)


@pytest.mark.parametrize("name", ["<b>&", pytest.param("a'b\"c", marks=pytest.mark.long)])
def test_names_are_escaped_in_the_page(name, tmp_path, monkeypatch):
    from mamba_probe.report import analyse, write_report
    from mamba_probe.run import record_task

    model = mp.load("zoo:mqar-mamba1")
    model._mamba_probe_source = {"source": name}
    run = record_task(model, "mqar", rows=2, length=16, n_pairs=2)
    page = write_report(run, analyse(run, tmp_path / "results", names=["recall_circuit"]), tmp_path).read_text()
    assert f"<h1>{name}</h1>" not in page
    assert "<b>&" not in page.replace("<b>estimator", "")
