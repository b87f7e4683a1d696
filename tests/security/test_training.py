"""A training's folder from a stranger: resuming it runs no code and makes nothing that its config says."""

import json

import pytest
import torch
from safetensors.torch import save_file

from mamba_probe.training import Config, train
from mamba_probe.training.checkpoint import CHECKPOINT

TASK = {"name": "mqar", "length": 16, "n_pairs": 2, "vocab": 16}
CONFIG = Config(TASK, {"kind": "mamba1", "d_model": 8, "d_state": 2}, layers=1, steps=2, batch=2, every=1)


def write(folder, config):
    save_file({"model.x": torch.ones(1)}, folder / CHECKPOINT, metadata={"config": config, "curve": "[]"})


@pytest.mark.parametrize("length", [10**9, 10**15])
def test_the_task_of_another_config_is_not_drawn(tmp_path, length, monkeypatch):
    given = json.loads(CONFIG.to_json())
    write(tmp_path, json.dumps(given | {"task": given["task"] | {"length": length}}))
    made = []
    monkeypatch.setattr(Config, "from_json", classmethod(lambda cls, text: made.append(text)))
    with pytest.raises(ValueError, match=rf"is of another training \(task .*{length}"):
        train(CONFIG, tmp_path)
    assert made == []


@pytest.mark.parametrize("text", ["[" * 100_000, "[]", "7", "{"])
def test_a_config_that_is_no_object_is_refused(tmp_path, text):
    write(tmp_path, text)
    with pytest.raises(ValueError, match="is damaged"):
        train(CONFIG, tmp_path)


def test_a_pickle_is_no_checkpoint(tmp_path, payload):
    torch.save({"x": payload}, tmp_path / CHECKPOINT)
    with pytest.raises(ValueError, match="is damaged"):
        train(CONFIG, tmp_path)
    assert not payload.mark.exists()
