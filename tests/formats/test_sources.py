"""Where a checkpoint comes from: hub ids without a network, the zoo, paths."""

import json

import huggingface_hub.constants
import pytest
import torch

from mamba_probe import zoo
from mamba_probe.loading import load, load_tokenizer

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture
def hub(monkeypatch, tmp_path):
    """An empty hub cache and no network."""
    cache = tmp_path / "hub"
    cache.mkdir()
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(cache))
    return cache


def cached(hub, name):
    """The folder of a repository's only cached snapshot."""
    repository = hub / f"models--{name.replace('/', '--')}"
    snapshot = repository / "snapshots" / COMMIT
    snapshot.mkdir(parents=True)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(COMMIT)
    return snapshot


def test_hub_id_from_the_cache(kit, hub, family):
    source = kit.tiny(family)
    source.save_pretrained(cached(hub, "someone/tiny"))
    model = load("someone/tiny")
    assert torch.equal(kit.logits(model), kit.logits(source))
    assert model._mamba_probe_source["source"] == "someone/tiny"
    assert torch.equal(kit.logits(load("someone/tiny", revision=COMMIT)), kit.logits(source))


def test_original_hub_id_from_the_cache(kit, hub, family):
    source = kit.tiny(family, tie_word_embeddings=True)
    kit.write(cached(hub, "state-spaces/tiny"), kit.ORIGINAL[family], kit.original_weights(source))
    assert torch.equal(kit.logits(load("state-spaces/tiny")), kit.logits(source))


@pytest.mark.parametrize("revision", [None, "v2"])
def test_hub_id_out_of_reach(hub, revision):
    with pytest.raises(
        FileNotFoundError, match=r"(?s)someone/else( at 'v2')?: .*neither reachable nor in the local cache.*give its"
    ):
        load("someone/else", revision=revision)


def test_cached_config_without_weights(kit, hub):
    snapshot = cached(hub, "someone/half")
    (snapshot / "config.json").write_text(json.dumps({"model_type": "mamba"}))
    with pytest.raises(FileNotFoundError, match=r"models--someone--half.* has no weight file"):
        load("someone/half")


def test_an_existing_path_is_never_a_hub_id(kit, hub, tmp_path, monkeypatch):
    source = kit.tiny("mamba")
    source.save_pretrained(tmp_path / "someone" / "tiny")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("huggingface_hub.snapshot_download", None)
    assert torch.equal(kit.logits(load("someone/tiny")), kit.logits(source))


@pytest.mark.parametrize("source", ["/nowhere/at/all", "./a/b", "../a", "a/b/c", "~/nowhere/b", "a/", "-a/b"])
def test_a_path_is_never_tried_as_a_hub_id(source, monkeypatch):
    monkeypatch.setattr("huggingface_hub.snapshot_download", None)
    with pytest.raises(FileNotFoundError, match="there is no such directory"):
        load(source)


def test_only_named_files_are_fetched(monkeypatch, tmp_path):
    asked = []

    def download(name, revision, allow_patterns):
        asked.append((name, revision, allow_patterns))
        return str(tmp_path)

    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    with pytest.raises(FileNotFoundError, match=r"has no config\.json"):
        load("some/one", revision="v1")
    assert [item[:2] for item in asked] == [("some/one", "v1")] * 3
    assert asked[0][2] == [
        "config.json",
        "generation_config.json",
        "model*.safetensors",
        "model.safetensors.index.json",
    ]
    assert asked[1][2][2:] == ["params.json", "consolidated.safetensors"]
    assert asked[2][2][2:] == ["pytorch_model*.bin", "pytorch_model.bin.index.json"]


def test_every_zoo_model_loads():
    for name in zoo.names():
        model = load(f"zoo:{name}")
        assert model._mamba_probe_source["source"] == f"zoo:{name}"


def test_unknown_zoo_name():
    with pytest.raises(ValueError, match=r"mqar-mamba1"):
        load("zoo:mqar-mamba2")


def test_tokenizer_out_of_reach(hub):
    with pytest.raises(ValueError, match=r"someone/else: no tokenizer could be loaded"):
        load_tokenizer("someone/else")
