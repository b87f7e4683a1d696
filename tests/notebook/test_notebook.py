"""The notebook runs as it stands, and shows what a notebook should: tables, a bar, a picture, and nothing stray."""

import json
from pathlib import Path

import pytest

TOUR = Path(__file__).parents[2] / "examples/tour.ipynb"
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning:jupyter_client", "ignore::DeprecationWarning:zmq")


def test_it_is_stored_small_and_without_outputs():
    tour = json.loads(TOUR.read_text())
    assert set(tour["metadata"]) == {"kernelspec", "language_info"}
    for cell in tour["cells"]:
        assert cell["metadata"] == {}
        assert cell.get("outputs", []) == []
        assert cell.get("execution_count") is None
    assert [cell["id"] for cell in tour["cells"]] == [f"tour-{i:02}" for i in range(1, len(tour["cells"]) + 1)]
    assert TOUR.read_text() == json.dumps(tour, indent=1, ensure_ascii=False) + "\n"
    assert TOUR.stat().st_size < 10_000
    assert f"[{TOUR.name}]({TOUR.name})" in (TOUR.parent / "README.md").read_text()


def executed(cells, tmp_path):
    """The notebook with its outputs; a missing `notebook` extra fails here, as `make test-long` installs it."""
    import nbformat
    from nbclient import NotebookClient

    notebook = nbformat.reads(json.dumps(cells), as_version=4)
    client = NotebookClient(notebook, timeout=600, kernel_name="python3", resources={"metadata": {"path": tmp_path}})
    client.execute()
    return notebook


def outputs(notebook):
    """What each cell showed."""
    return [kinds(cell["outputs"]) for cell in notebook["cells"] if cell["cell_type"] == "code"]


def bars(notebook):
    """The words beside the notebook's bars, as they stood in the end."""
    (held,) = notebook["metadata"]["widgets"].values()
    models = [model["state"] for model in held["state"].values()]
    return [model["value"] for model in models if model["_model_name"] == "HTMLModel"]


def kinds(outputs):
    """Everything shown, by MIME type or stream."""
    found = {}
    for output in outputs:
        if output["output_type"] == "stream":
            found.setdefault(output["name"], []).append(output["text"])
        for kind, data in output.get("data", {}).items():
            found.setdefault(kind, []).append(data)
    return found


WIDGET = "application/vnd.jupyter.widget-view+json"


@pytest.mark.long
def test_the_tour_runs_and_shows_everything(tmp_path):
    notebook = executed(json.loads(TOUR.read_text()), tmp_path)
    shown = outputs(notebook)
    _, probe, trace, steps, circuit, picture, finding = shown
    assert "<strong>Probe</strong> attached to" in probe["text/html"][0]
    assert WIDGET in trace
    assert any("8/8" in words for words in bars(notebook))
    assert "<strong>trace</strong> (mamba)" in trace["text/html"][-1]
    assert "value" in steps["text/html"][0]
    assert "pair accuracy" in circuit["text/html"][0]
    assert len(picture["image/png"]) == 1
    assert "ablate(conv)" in finding["text/html"][0]
    assert not any({"stderr", "stdout"} & set(each) for each in shown), "nothing stray"


LONG_WORK = [
    "import torch, mamba_probe as mp\n"
    "model = mp.load('zoo:trained-mqar-mamba1')\n"
    "probe, ids = mp.attach(model), torch.arange(32).reshape(2, 16) + 4\n",
    "trace = probe.record(ids, batch_size=1, progress=True)",
    "trace = probe.record(ids, batch_size=1, store='run.zarr', progress=True)",
    "found = probe.reduce(ids, [mp.reduce.mean('delta')], batch_size=1, progress=True)",
    "swept = mp.patching.sweep(probe, ids, ids.flip(0), lambda logits: logits[:, -1, 5], quantities=['delta'])",
    "found = mp.verify('run.zarr', progress=True)",
    "from mamba_probe.training import Config, progress, train\n"
    "task = {'name': 'mqar', 'length': 8, 'n_pairs': 1, 'vocab': 8}\n"
    "mixer = {'kind': 'mamba1', 'd_model': 4, 'd_state': 2}\n"
    "config = Config(task, mixer, layers=1, steps=4, every=2, batch=2)\n"
    "with progress('recall') as say:\n"
    "    result = train(config, say=say)",
    "trace = probe.record(ids)",
]


@pytest.mark.long
def test_long_work_draws_one_widget_and_nothing_else(tmp_path):
    made = [{"cell_type": "code", "metadata": {}, "id": str(i), "execution_count": None, "outputs": [], "source": text}
            for i, text in enumerate(LONG_WORK)]  # fmt: skip
    notebook = executed({"cells": made, "metadata": {}, "nbformat": 4, "nbformat_minor": 5}, tmp_path)
    begun, *worked, silent = outputs(notebook)
    assert begun == {}
    for shown in worked:
        assert set(shown) == {WIDGET, "text/plain"}
        assert len(shown[WIDGET]) == 1
    assert silent == {}
    counts = [words.split("[")[0].strip() for words in bars(notebook) if "[" in words]
    assert [count for count in counts if count in ("2/2", "4/4", "1/1")] == ["2/2", "2/2", "2/2", "1/1", "4/4"]
    assert len(counts) == len(worked)
    assert all(done == total for done, total in (count.split("/") for count in counts)), "each bar is full in the end"
