"""Pictures: the circuit's diagram stands where a circuit was found, and nowhere else."""

import pytest
import torch

import mamba_probe as mp
from mamba_probe import blocks
from mamba_probe.analyses import recall_circuit
from mamba_probe.report import draw, finding
from mamba_probe.trace import open_dataset
from mamba_probe.trace.store import save

TASK = mp.tasks.mqar(batch=4, length=32, n_pairs=4, vocab=32, seed=0)
BOX = "the query finds its pair"
"""What a box of the diagram says."""


def measured(model, right):
    """The result on `model`; `right`: whether its answers are taken for right, so that all are scored."""
    with mp.attach(model.eval()) as probe:
        trace, weights = probe.record(TASK, variables=("delta", "A", "B", "C", "x", "z")), probe.weights()
    if right:
        trace = trace.assign_coords(prediction=trace.target.where(trace.target >= 0, 0))
    return recall_circuit.measure(trace, weights=weights, n_bootstrap=8)


def random_model(n_layers):
    torch.manual_seed(0)
    return blocks.LanguageModel([blocks.MambaBlock(16, d_state=4) for _ in range(n_layers)], 32)


def drawn(result, folder):
    """The text of the SVG; the PNG beside it is one."""
    png, svg = draw("recall_circuit", result, folder)
    assert png.read_bytes()[:4] == b"\x89PNG"
    return svg.read_text()


def test_a_circuit_found_is_drawn_below_its_signatures(tmp_path):
    result = measured(mp.constructions.mqar("mamba1", 16, 16).model, right=False)
    assert bool(result["found"])
    text = drawn(result, tmp_path)
    assert BOX in text
    assert "pair accuracy  S1" in text
    stored = open_dataset(save(result, tmp_path / "result.nc"))
    assert BOX in drawn(stored, tmp_path / "again"), "as it is read back"


@pytest.mark.parametrize("n_layers", [1, 2])
def test_a_task_solved_without_the_circuit_has_signatures_and_no_diagram(n_layers, tmp_path):
    result = measured(random_model(n_layers), right=True)
    assert bool(result["solved"])
    assert not bool(result["found"])
    text = drawn(result, tmp_path)
    assert "pair accuracy  S1" in text
    assert BOX not in text
    said = finding("recall_circuit", result)
    assert said.drawn
    assert "no layer shows the key-value circuit" in said.sentence


def test_a_task_not_solved_has_neither(tmp_path):
    result = measured(random_model(1), right=False)
    assert not bool(result["found"])
    assert BOX not in drawn(result, tmp_path)
    said = finding("recall_circuit", result)
    assert not said.drawn
    assert said.sentence.startswith("No circuit: accuracy")
