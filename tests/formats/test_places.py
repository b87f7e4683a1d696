"""Shards, wrapped files, revisions in the hub's cache, and several devices."""

import json
import sys
from types import ModuleType

import huggingface_hub.constants
import pytest
import torch

from mamba_probe.loading import load

COMMITS = {"main": "0" * 40, "v2": "1" * 40}


def sharded(folder, config, weights, count=3):
    """Old shards: pickles and an index."""
    folder.mkdir(exist_ok=True)
    names = sorted(weights)
    files = {name: f"pytorch_model-{number % count + 1:05}-of-{count:05}.bin" for number, name in enumerate(names)}
    for file in set(files.values()):
        torch.save({name: weights[name] for name in names if files[name] == file}, folder / file)
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps({"metadata": {}, "weight_map": files}))
    return folder


def test_sharded_bin(kit, family, tmp_path):
    source = kit.tiny(family, tie_word_embeddings=True)
    sharded(tmp_path, kit.ORIGINAL[family], kit.original_weights(source))
    assert torch.equal(kit.logits(load(tmp_path)), kit.logits(source))


def test_shards_of_bin_run_no_code_and_must_be_there(kit, tmp_path):
    source = kit.tiny("mamba", tie_word_embeddings=True)
    sharded(tmp_path, kit.ORIGINAL["mamba"], kit.original_weights(source))
    second = tmp_path / "pytorch_model-00002-of-00003.bin"
    torch.save({"x": print}, second)
    with pytest.raises(
        ValueError, match=r"00002-of-00003.bin is refused: it holds more than tensors and could run code"
    ):
        load(tmp_path)
    second.unlink()
    with pytest.raises(FileNotFoundError, match=r"names files that are not there: pytorch_model-00002"):
        load(tmp_path)


def test_one_tensor_in_two_shards(kit, tmp_path):
    source = kit.tiny("mamba", tie_word_embeddings=True)
    weights = kit.original_weights(source)
    sharded(tmp_path, kit.ORIGINAL["mamba"], weights)
    for path in tmp_path.glob("*.bin"):
        torch.save(torch.load(path, weights_only=True) | {"backbone.norm_f.weight": torch.ones(16)}, path)
    with pytest.raises(ValueError, match=r"holds tensors that another weight file holds too: backbone.norm_f.weight"):
        load(tmp_path)


@pytest.mark.parametrize("file", ["pytorch_model.bin", "dump.pt", "dump.pth"])
def test_a_file_that_wraps_nothing_but_the_state_dict(kit, file, tmp_path):
    source = kit.tiny("mamba", tie_word_embeddings=True)
    weights = kit.original_weights(source)
    plain = kit.write(tmp_path / "plain", kit.ORIGINAL["mamba"], weights, "x.bin")
    (plain / "x.bin").unlink()
    torch.save({"model": weights}, plain / file)
    assert torch.equal(kit.logits(load(plain / file)), kit.logits(source))


def test_revisions_of_the_cache(kit, tmp_path, monkeypatch):
    """Two revisions in a cache and no network: each is found, a third is not."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    repository = tmp_path / "models--someone--tiny"
    sources = {}
    for name, commit in COMMITS.items():
        sources[name] = kit.tiny("mamba", tie_word_embeddings=name == "main")
        snapshot = repository / "snapshots" / commit
        sharded_or_whole = sharded if name == "v2" else kit.write
        snapshot.parent.mkdir(parents=True, exist_ok=True)
        config = kit.ORIGINAL["mamba"] | {"tie_embeddings": name == "main"}
        sharded_or_whole(snapshot, config, kit.original_weights(sources[name]))
        (repository / "refs").mkdir(exist_ok=True)
        (repository / "refs" / name).write_text(commit)
    assert torch.equal(kit.logits(load("someone/tiny")), kit.logits(sources["main"]))
    for revision in ("v2", COMMITS["v2"]):
        assert torch.equal(kit.logits(load("someone/tiny", revision=revision)), kit.logits(sources["v2"]))
    with pytest.raises(
        FileNotFoundError, match=r"(?s)someone/tiny at 'v3': .*neither reachable nor in the local cache"
    ):
        load("someone/tiny", revision="v3")


@pytest.fixture
def accelerate(monkeypatch):
    """A stand-in that notes what it is asked for."""
    asked = []
    fake, utils = ModuleType("accelerate"), ModuleType("accelerate.utils")
    fake.dispatch_model = lambda module, device_map: (asked.append(device_map), module)[1]
    fake.infer_auto_device_map = lambda module, max_memory, no_split_module_classes: {
        "": "cpu", "memory": max_memory, "whole": no_split_module_classes,
    }  # fmt: skip
    utils.get_balanced_memory = lambda module, no_split_module_classes, low_zero: f"balanced, low_zero={low_zero}"
    monkeypatch.setitem(sys.modules, "accelerate", fake)
    monkeypatch.setitem(sys.modules, "accelerate.utils", utils)
    return asked


def test_device_map_is_passed_on(kit, accelerate, tmp_path):
    source = kit.tiny("mamba")
    source.save_pretrained(tmp_path)
    wanted = {"backbone": "cpu", "lm_head": "cpu"}
    model = load(tmp_path, device_map=wanted, dtype=torch.float64)
    assert accelerate.pop() == wanted
    assert model.dtype == torch.float64
    whole = ["MambaBlock", "MambaMixer"]
    load(tmp_path, device_map="auto")
    assert accelerate.pop() == {"": "cpu", "memory": "balanced, low_zero=False", "whole": whole}
    load(tmp_path, device_map="balanced_low_0")
    assert accelerate.pop()["memory"] == "balanced, low_zero=True"
    load(tmp_path, device_map="sequential")
    assert accelerate.pop()["memory"] is None
    sys.modules["accelerate"].infer_auto_device_map = lambda *_, **__: {"backbone": "cpu", "lm_head": "disk"}
    with pytest.raises(ValueError, match=r"device_map='auto': the model does not fit in memory, .*'disk'"):
        load(tmp_path, device_map="auto")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"device_map": "every"}, r"device_map must be one of 'auto', 'balanced', .*got 'every'"),
        ({"device_map": 1}, r"device_map must be one of .* or a dictionary of devices, got 1"),
        ({"device_map": {"": "disk"}}, r"device_map may not name 'disk'"),
        ({"device_map": "auto", "device": torch.device("cpu", 0)}, r"device_map or device, not both"),
    ],
)
def test_a_device_map_that_cannot_be_followed(kit, accelerate, options, message, tmp_path):
    kit.tiny("mamba").save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=message):
        load(tmp_path, **options)
    assert not accelerate


def test_a_device_map_without_accelerate(kit, monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "accelerate", None)
    kit.tiny("mamba").save_pretrained(tmp_path)
    with pytest.raises(
        ValueError, match=r"device_map needs accelerate, which is not installed: pip install accelerate"
    ):
        load(tmp_path, device_map="auto")
