"""Directories that transformers saved: what is loaded equals from_pretrained bit for bit."""

import hashlib
import json

import pytest
import torch
from transformers import AutoModel, AutoModelForCausalLM

from mamba_probe.loading import load

CONFIGS = [
    {},
    {"tie_word_embeddings": False, "use_bias": True},
    {"tie_word_embeddings": True, "use_conv_bias": False, "residual_in_fp32": False, "conv_kernel": 3},
]


@pytest.mark.parametrize("config", CONFIGS, ids=["defaults", "untied", "tied"])
def test_round_trip_is_bit_equal(kit, family, config, tmp_path):
    saved = kit.tiny(family, **config)
    saved.save_pretrained(tmp_path)
    model = load(tmp_path)
    assert torch.equal(kit.logits(model), kit.logits(AutoModelForCausalLM.from_pretrained(tmp_path)))
    assert torch.equal(kit.logits(model), kit.logits(saved))
    assert not model.training
    assert all(weight.requires_grad for weight in model.parameters())
    assert (model.lm_head.weight is model.backbone.embeddings.weight) == model.config.tie_word_embeddings


def test_provenance_names_source_format_and_hash(kit, tmp_path):
    kit.tiny("mamba").save_pretrained(tmp_path)
    model = load(tmp_path)
    expected = hashlib.sha256((tmp_path / "model.safetensors").read_bytes()).hexdigest()
    assert model._mamba_probe_source == {
        "source": str(tmp_path), "revision": None, "dtype": None, "format": "transformers", "sha256": expected,
    }  # fmt: skip
    half = load(tmp_path, dtype=torch.bfloat16)
    assert half._mamba_probe_source["dtype"] == "bfloat16"


def test_sharded(kit, family, tmp_path):
    saved = kit.tiny(family)
    saved.save_pretrained(tmp_path, max_shard_size="4KB")
    shards = sorted(tmp_path.glob("model-*.safetensors"))
    assert len(shards) > 2
    model = load(tmp_path)
    assert torch.equal(kit.logits(model), kit.logits(saved))
    expected = hashlib.sha256(b"".join(path.read_bytes() for path in shards)).hexdigest()
    assert model._mamba_probe_source["sha256"] == expected


def test_missing_shard_is_named(kit, tmp_path):
    kit.tiny("mamba").save_pretrained(tmp_path, max_shard_size="4KB")
    lost = sorted(tmp_path.glob("model-*.safetensors"))[1]
    lost.unlink()
    with pytest.raises(FileNotFoundError, match=lost.name):
        load(tmp_path)


def test_index_may_not_leave_the_directory(kit, tmp_path):
    kit.tiny("mamba").save_pretrained(tmp_path, max_shard_size="4KB")
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"x": "../y.safetensors"}}))
    with pytest.raises(ValueError, match=r"beside it, got \['\.\./y.safetensors'\]"):
        load(tmp_path)


def test_backbone_alone(kit, family, tmp_path):
    saved = kit.tiny(family).backbone
    saved.save_pretrained(tmp_path)
    model = load(tmp_path)
    assert type(model) is type(saved)
    ids = torch.arange(9)[None]
    with torch.no_grad():
        assert torch.equal(model(ids).last_hidden_state, saved(ids).last_hidden_state)
        assert torch.equal(
            model(ids).last_hidden_state, AutoModel.from_pretrained(tmp_path).eval()(ids).last_hidden_state
        )
    weights = saved.state_dict()
    weights["embedding.weight"] = weights.pop("embeddings.weight")
    renamed = load(kit.write(tmp_path / "original", json.loads(saved.config.to_json_string()), weights))
    assert torch.equal(renamed.embeddings.weight, saved.embeddings.weight)


@pytest.mark.parametrize("file", ["pytorch_model.bin", "model.safetensors"])
def test_original_names_under_a_transformers_config(kit, family, file, tmp_path):
    saved = kit.tiny(family)
    kit.write(tmp_path, saved.config.to_dict() | {"time_step_limit": [0.0, float("inf")]},
              kit.original_weights(saved), file)  # fmt: skip
    assert torch.equal(kit.logits(load(tmp_path)), kit.logits(saved))


def test_both_names_are_refused(kit, tmp_path):
    saved = kit.tiny("mamba")
    weights = kit.original_weights(saved) | saved.state_dict()
    kit.write(tmp_path, saved.config.to_dict(), weights)
    with pytest.raises(ValueError, match=r"both backbone.embedding.weight and backbone.embeddings.weight"):
        load(tmp_path)


def test_time_step_limit_survives(kit, tmp_path):
    kit.tiny("mamba2", time_step_limit=(0.01, float("inf"))).save_pretrained(tmp_path / "a")
    assert list(load(tmp_path / "a").config.time_step_limit) == [0.01, float("inf")]
    saved = kit.tiny("mamba2", time_step_limit=(0.3, 0.4))
    saved.save_pretrained(tmp_path / "b")
    assert torch.equal(kit.logits(load(tmp_path / "b")), kit.logits(saved))


def test_generation_settings_are_taken_over(kit, tmp_path):
    saved = kit.tiny("mamba")
    saved.generation_config.eos_token_id = 7
    saved.save_pretrained(tmp_path)
    assert load(tmp_path).generation_config.eos_token_id == 7


def test_safetensors_are_preferred_and_a_file_may_be_named(kit, tmp_path):
    saved, other = kit.tiny("mamba"), kit.tiny("mamba", initializer_range=0.5)
    saved.save_pretrained(tmp_path)
    torch.save(other.state_dict(), tmp_path / "pytorch_model.bin")
    assert torch.equal(kit.logits(load(tmp_path)), kit.logits(saved))
    by_file = load(tmp_path / "pytorch_model.bin")
    assert torch.equal(kit.logits(by_file), kit.logits(other))


def test_the_model_does_not_follow_the_file(kit, tmp_path):
    saved = kit.tiny("mamba", hidden_size=32, vocab_size=500)
    saved.save_pretrained(tmp_path)
    model = load(tmp_path)
    path = tmp_path / "model.safetensors"
    with path.open("r+b") as stream:
        stream.seek(path.stat().st_size // 4)
        stream.write(b"\0" * (path.stat().st_size // 2))
    assert torch.equal(kit.logits(model), kit.logits(saved))


def test_dtype_is_kept_or_cast(kit, family, tmp_path):
    saved = kit.tiny(family)
    weights = {
        name: tensor if name.endswith(("A_log", ".D")) else tensor.bfloat16()
        for name, tensor in saved.state_dict().items()
    }
    kit.write(tmp_path, json.loads(saved.config.to_json_string()), weights)
    kept = load(tmp_path)
    assert {name: tensor.dtype for name, tensor in kept.state_dict().items()} == {
        name: tensor.dtype for name, tensor in weights.items()
    }
    assert kept.config.dtype == torch.bfloat16
    assert kit.logits(kept).isfinite().all()
    cast = load(tmp_path, dtype=torch.float64)
    for name, tensor in cast.state_dict().items():
        assert torch.equal(tensor, weights[name].double()), name
    assert cast.config.dtype == torch.float64


def test_auto_map_is_never_run(kit, tmp_path):
    saved = kit.tiny("mamba")
    config = saved.config.to_dict() | {"auto_map": {"AutoModelForCausalLM": "evil.Evil"}, "architectures": ["Evil"]}
    kit.write(tmp_path, config, saved.state_dict())
    (tmp_path / "evil.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')")
    with pytest.warns(UserWarning, match="`auto_map` names is not run"):
        model = load(tmp_path)
    assert torch.equal(kit.logits(model), kit.logits(saved))
    assert not (tmp_path / "ran").exists()


def test_architectures_that_contradict_the_weights(kit, tmp_path):
    saved = kit.tiny("mamba")
    kit.write(tmp_path, saved.config.to_dict() | {"architectures": ["MambaModel"]}, saved.state_dict())
    with pytest.raises(ValueError, match=r"names architectures \['MambaModel'\].*those of MambaForCausalLM"):
        load(tmp_path)


def test_a_tied_head_must_equal_the_embedding(kit, tmp_path):
    saved = kit.tiny("mamba", tie_word_embeddings=True)
    weights = {name: tensor.clone() for name, tensor in saved.state_dict().items()}
    config = saved.config.to_dict()
    assert torch.equal(kit.logits(load(kit.write(tmp_path / "equal", config, weights))), kit.logits(saved))
    del weights["lm_head.weight"]
    assert torch.equal(kit.logits(load(kit.write(tmp_path / "without", config, weights))), kit.logits(saved))
    weights["lm_head.weight"] = weights["backbone.embeddings.weight"] + 1e-6
    with pytest.raises(ValueError, match=r"ties lm_head.weight to backbone.embeddings.weight"):
        load(kit.write(tmp_path / "other", config, weights))


def test_an_untied_head_must_be_there(kit, tmp_path):
    saved = kit.tiny("mamba", tie_word_embeddings=False)
    weights = dict(saved.state_dict())
    del weights["lm_head.weight"]
    kit.write(tmp_path, saved.config.to_dict(), weights)
    with pytest.raises(ValueError, match=r"missing lm_head.weight"):
        load(tmp_path)
