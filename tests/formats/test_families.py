"""transformers' directories of the eight families beside Mamba and Mamba-2: bit-equal and strict."""

import json

import pytest
import torch
import transformers

from mamba_probe.loading import load

ATTENTION = {"intermediate_size": 32, "num_attention_heads": 2, "num_key_value_heads": 1}
SSD = {"mamba_n_heads": 4, "mamba_d_head": 8, "mamba_d_state": 4, "mamba_chunk_size": 8, "mamba_n_groups": 2}
BASE = {"vocab_size": 24, "hidden_size": 16, "num_hidden_layers": 2, "pad_token_id": 0, "bos_token_id": 1}
CONFIGS = {
    "falcon_mamba": ("FalconMamba", {"state_size": 4}),
    "jamba": ("Jamba", ATTENTION | {"mamba_d_state": 4, "attn_layer_period": 2, "attn_layer_offset": 1,
              "expert_layer_period": 2, "expert_layer_offset": 1, "num_experts": 2, "num_experts_per_tok": 1}),
    "zamba": ("Zamba", ATTENTION | {"num_key_value_heads": 2, "num_hidden_layers": 5, "mamba_d_state": 4,
              "attention_head_dim": 16, "n_mamba_heads": 2,
              "layers_block_type": ["mamba", "mamba", "hybrid", "mamba", "hybrid"]}),
    "zamba2": ("Zamba2", ATTENTION | {"num_key_value_heads": 2, "num_hidden_layers": 3, "mamba_d_state": 4,
               "n_mamba_heads": 4, "mamba_headdim": 8, "mamba_ngroups": 2, "chunk_size": 8, "num_mem_blocks": 1,
               "adapter_rank": 4, "use_mem_rope": True, "layers_block_type": ["mamba", "mamba", "hybrid"]}),
    "bamba": ("Bamba", ATTENTION | SSD | {"attn_layer_indices": [1]}),
    "granitemoehybrid": ("GraniteMoeHybrid", ATTENTION | SSD | {"layer_types": ["mamba", "attention"],
                         "shared_intermediate_size": 16, "num_local_experts": 2, "num_experts_per_tok": 1}),
    "nemotron_h": ("NemotronH", ATTENTION | {"hybrid_override_pattern": "M*", "head_dim": 8, "mamba_num_heads": 4,
                   "mamba_head_dim": 8, "ssm_state_size": 4, "n_groups": 2, "chunk_size": 8}),
    "falcon_h1": ("FalconH1", ATTENTION | SSD | {"head_dim": 8, "mamba_d_ssm": 32, "mamba_rms_norm": True}),
}  # fmt: skip


def made(kit, name, **change):
    stem, config = CONFIGS[name]
    made = getattr(transformers, f"{stem}Config")(**(BASE | config | change))
    return kit.perturb(getattr(transformers, f"{stem}ForCausalLM")(made))


@pytest.fixture(params=sorted(CONFIGS))
def name(request):
    return request.param


def test_round_trip_is_bit_equal(kit, name, tmp_path):
    saved = made(kit, name)
    saved.save_pretrained(tmp_path)
    model = load(tmp_path)
    assert type(model) is type(saved)
    assert not model.training
    assert model._mamba_probe_source["format"] == "transformers"
    assert torch.equal(kit.logits(model), kit.logits(saved))
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    assert torch.equal(kit.logits(model), kit.logits(theirs))


def test_shards_and_backbone(kit, name, tmp_path):
    saved = made(kit, name)
    saved.save_pretrained(tmp_path / "shards", max_shard_size="6KB")
    assert len(list((tmp_path / "shards").glob("model-*.safetensors"))) > 1
    assert torch.equal(kit.logits(load(tmp_path / "shards")), kit.logits(saved))
    body = saved.base_model
    body.save_pretrained(tmp_path / "backbone")
    model = load(tmp_path / "backbone")
    assert type(model) is type(body)
    with torch.no_grad():
        each = [one(torch.arange(9)[None], use_cache=False).last_hidden_state for one in (model, body)]
    assert torch.equal(*each)


def test_every_difference_is_named(kit, name, tmp_path):
    saved = made(kit, name)
    saved.save_pretrained(tmp_path)
    from safetensors.torch import load_file, save_file

    weights = load_file(tmp_path / "model.safetensors")
    lost = next(key for key in weights if key.endswith("A_log"))
    bent = next(key for key in weights if key.endswith("conv1d.bias"))
    weights[lost + "s"] = weights.pop(lost)
    weights[bent] = torch.ones(3)
    save_file(weights, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match=f"do not fit {type(saved).__name__}") as caught:
        load(tmp_path)
    at = lost.replace("backbone.", "model.") if name == "nemotron_h" else lost
    text = str(caught.value)
    assert f"missing {at}\n" in text
    assert f"unexpected {at}s\n" in text
    assert f"shape of {bent.replace('backbone.', 'model.') if name == 'nemotron_h' else bent}: expected" in text
    assert len(text.splitlines()) == 4


def test_dtype_is_kept_or_cast(kit, tmp_path):
    """`model.bfloat16()` would round the rotary frequencies too: loading must not."""
    made(kit, "bamba").bfloat16().save_pretrained(tmp_path)
    for dtype in (None, torch.bfloat16, torch.float32):
        model = load(tmp_path, dtype=dtype)
        theirs = transformers.BambaForCausalLM.from_pretrained(tmp_path, dtype=dtype or torch.bfloat16).eval()
        assert {tensor.dtype for tensor in model.parameters()} == {dtype or torch.bfloat16}
        assert model.model.rotary_emb.inv_freq.dtype == torch.float32
        assert torch.equal(kit.logits(model), kit.logits(theirs))


def test_mixed_dtypes_are_widened_with_a_warning(kit, tmp_path):
    saved = made(kit, "falcon_mamba")
    weights = {
        key: tensor if key.endswith("A_log") else tensor.bfloat16() for key, tensor in saved.state_dict().items()
    }
    kit.write(tmp_path, json.loads(saved.config.to_json_string()), weights)
    with pytest.warns(UserWarning, match=r"torch.bfloat16, torch.float32 are all loaded as torch.float32, which loses"):
        model = load(tmp_path)
    for key, tensor in model.state_dict().items():
        assert torch.equal(tensor, weights[key].float()), key


def test_a_tied_head_must_equal_the_embedding(kit, tmp_path):
    saved = made(kit, "falcon_mamba", tie_word_embeddings=True)
    weights = {key: tensor.clone() for key, tensor in saved.state_dict().items()}
    config = json.loads(saved.config.to_json_string())
    model = load(kit.write(tmp_path / "equal", config, weights))
    assert torch.equal(kit.logits(model), kit.logits(saved))
    weights["lm_head.weight"] = weights["lm_head.weight"] + 1e-3
    with pytest.raises(ValueError, match=r"ties lm_head.weight to the embedding, but the file holds different"):
        load(kit.write(tmp_path / "other", config, weights))


def test_invalid_config(kit, tmp_path):
    saved = made(kit, "bamba")
    config = json.loads(saved.config.to_json_string()) | {"mamba_d_head": 7}
    with pytest.raises(ValueError, match=r"is not a valid bamba configuration: .*mamba|Mamba head state"):
        load(kit.write(tmp_path, config, saved.state_dict()))


def test_auto_map_is_never_run(kit, tmp_path):
    saved = made(kit, "falcon_mamba")
    config = json.loads(saved.config.to_json_string()) | {"auto_map": {"AutoModelForCausalLM": "evil.Evil"}}
    (tmp_path / "evil.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')")
    with pytest.warns(UserWarning, match="`auto_map` names is not run"):
        model = load(kit.write(tmp_path, config, saved.state_dict()))
    assert torch.equal(kit.logits(model), kit.logits(saved))
    assert not (tmp_path / "ran").exists()


def test_what_nemotron_h_has_no_use_for_is_said(kit, tmp_path):
    saved = made(kit, "nemotron_h")
    saved.save_pretrained(tmp_path)
    from safetensors.torch import load_file, save_file

    save_file(
        load_file(tmp_path / "model.safetensors") | {"mtp.norm.weight": torch.ones(2)}, tmp_path / "model.safetensors"
    )
    with pytest.warns(UserWarning, match=r"NemotronHForCausalLM has no use for mtp.norm.weight: left out"):
        assert torch.equal(kit.logits(load(tmp_path)), kit.logits(saved))
