"""`mamba-probe analyze hidden_attention`: its queries, sentence, table and picture; not on the report's page."""

import numpy as np
import pytest
import xarray as xr

from mamba_probe.analyses.common.analysis import analyses
from mamba_probe.report import MAIN, analyse, draw, finding
from mamba_probe.run import Run


def run_of(step, n_layers=2, lengths=(40, 24)):
    """A run of time-invariant channels on text rows of unequal length, padded on the right."""
    shape = (n_layers, len(lengths), max(lengths))
    valid = np.arange(max(lengths)) < np.array(lengths)[:, None]
    place, ones = ("layer", "batch", "token"), np.where(valid[None, ..., None, None], np.ones((*shape, 1, 1)), np.nan)
    trace = xr.Dataset(
        {
            "delta": ((*place, "channel"), ones[..., 0] * step * (1 + np.arange(n_layers).reshape(-1, 1, 1, 1))),
            "A": (("layer", "channel", "state"), -np.ones((n_layers, 1, 1))),
            "B": ((*place, "group", "state"), ones),
            "C": ((*place, "group", "state"), -ones),
        },
        {
            "layer": np.arange(n_layers),
            "valid": (("batch", "token"), valid),
            "position": (("batch", "token"), np.where(valid, np.arange(max(lengths)), -1)),
        },
        {"schema_version": 1, "family": "mamba", "discretization": "euler", "model": "text model"},
    )
    weights = xr.Dataset({"D": (("layer", "channel"), np.ones((n_layers, 1)))}, {"layer": np.arange(n_layers)})
    return Run(trace, weights, xr.Dataset())


def test_it_is_analysed_on_request_only(tmp_path):
    assert "hidden_attention" in analyses()
    assert MAIN == ("recall_circuit", "memory_horizon", "wavelet_alignment")
    result = analyse(run_of(0.5), tmp_path, names=("hidden_attention",))["hidden_attention"]
    assert (tmp_path / "hidden_attention.nc").exists()
    assert result["query_position"].values.tolist() == [[4, 9, 14, 19, 24, 29, 34, 39], [2, 5, 8, 11, 14, 17, 20, 23]]
    assert result.attrs["queries"] == "of each row: 8 tokens, evenly spread"
    assert result.attrs["identity"] == "not measured: x and y not recorded"
    said = finding("hidden_attention", result)
    near, far = (result["layer_mean_distance"].values[i] for i in (1, 0))
    assert said.sentence.startswith("Weighted by |alpha|, a query reads from a distance of ")
    assert f"{near:.3g} tokens in layer 1 (time-invariant {near:.3g}) to {far:.3g} tokens in layer 0" in said.sentence
    rows = {row.what: row for row in said.rows}
    assert rows["layer 0: share of |alpha| that is negative"].value == "1"
    assert rows["layer 0: mean distance read, tokens"].interval
    assert dict(said.notes)["identity"] == "not measured: x and y not recorded"
    assert [path.name for path in draw("hidden_attention", result, tmp_path)] == [
        "hidden_attention.png",
        "hidden_attention.svg",
    ]


@pytest.mark.parametrize("n_layers", [1, 2])
def test_a_model_that_reads_nothing_is_said_to(n_layers, tmp_path):
    result = analyse(run_of(0.0, n_layers), tmp_path, names=("hidden_attention",))["hidden_attention"]
    assert finding("hidden_attention", result).sentence.endswith(": no query reads anything.")
    draw("hidden_attention", result, tmp_path)
