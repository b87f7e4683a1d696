"""Original state-spaces directories, made by giving a transformers model's weights the original names."""

import pytest
import torch

from mamba_probe.formats.state_spaces import translate
from mamba_probe.loading import load


@pytest.mark.parametrize("file", ["pytorch_model.bin", "model.safetensors"])
def test_logits_are_bit_equal(kit, family, file, tmp_path):
    source = kit.tiny(family, tie_word_embeddings=True)
    model = load(kit.write(tmp_path, kit.ORIGINAL[family], kit.original_weights(source), file))
    assert type(model) is type(source)
    assert torch.equal(kit.logits(model), kit.logits(source))
    assert model.lm_head.weight is model.backbone.embeddings.weight
    assert model._mamba_probe_source["format"] == "state-spaces"


@pytest.mark.parametrize(("multiple", "padded"), [(16, 32), (8, 24), (1, 21), (None, 24)])
def test_vocabulary_padding(kit, family, multiple, padded, tmp_path):
    source = kit.tiny(family, vocab_size=max(padded, 24), tie_word_embeddings=True)
    weights = kit.original_weights(source)
    for name in ("backbone.embedding.weight", "lm_head.weight"):
        weights[name] = weights[name][:padded].clone()
    config = kit.ORIGINAL[family] | {"vocab_size": 21}
    config |= {} if multiple is None else {"pad_vocab_size_multiple": multiple}
    model = load(kit.write(tmp_path, config, weights))
    assert model.config.vocab_size == padded
    ids = torch.arange(20)[None]
    with torch.no_grad():
        assert torch.equal(model(ids).logits, source(ids).logits[..., :padded])


def test_wrong_padding_is_a_shape_error(kit, family, tmp_path):
    weights = kit.original_weights(kit.tiny(family, tie_word_embeddings=True))
    kit.write(tmp_path, kit.ORIGINAL[family] | {"pad_vocab_size_multiple": 16}, weights)
    with pytest.raises(ValueError, match=r"shape of backbone.embeddings.weight: expected \(32, 16\), got \(24, 16\)"):
        load(tmp_path)


def test_ssm_cfg_of_mamba2(kit, tmp_path):
    source = kit.tiny(
        "mamba2", expand=3, num_heads=6, head_dim=8, n_groups=3, conv_kernel=3, use_bias=True, use_conv_bias=False,
        time_step_limit=(0.3, 0.4), chunk_size=4, tie_word_embeddings=False, residual_in_fp32=False,
    )  # fmt: skip
    ssm = {"layer": "Mamba2", "expand": 3, "headdim": 8, "ngroups": 3, "d_conv": 3, "bias": True, "conv_bias": False,
           "dt_limit": [0.3, 0.4], "chunk_size": 4, "d_state": 4, "d_ssm": 48, "D_has_hdim": False}  # fmt: skip
    config = kit.ORIGINAL["mamba2"] | {"ssm_cfg": ssm, "tie_embeddings": False, "residual_in_fp32": False}
    model = load(kit.write(tmp_path, config, kit.original_weights(source)))
    assert torch.equal(kit.logits(model), kit.logits(source))
    assert model.config.residual_in_fp32 is False


def test_ssm_cfg_of_mamba1(kit, tmp_path):
    source = kit.tiny("mamba", expand=3, conv_kernel=3, use_bias=True, use_conv_bias=False, time_step_rank=1)
    ssm = {"layer": "Mamba1", "expand": 3, "d_conv": 3, "bias": True, "conv_bias": False, "dt_rank": "auto",
           "d_state": 4, "use_fast_path": False}  # fmt: skip
    config = kit.ORIGINAL["mamba"] | {"ssm_cfg": ssm, "fused_add_norm": True}
    model = load(kit.write(tmp_path, config, kit.original_weights(source)))
    assert torch.equal(kit.logits(model), kit.logits(source))


def test_defaults_are_those_of_mamba_ssm():
    _, mamba = translate({"d_model": 768, "n_layer": 24, "vocab_size": 50277, "ssm_cfg": {}}, "here")
    assert (mamba["vocab_size"], mamba["state_size"], mamba["conv_kernel"], mamba["expand"]) == (50280, 16, 4, 2)
    assert (mamba["residual_in_fp32"], mamba["tie_word_embeddings"]) == (True, True)
    assert mamba["layer_norm_epsilon"] == 1e-5
    config = {"d_model": 768, "n_layer": 24, "vocab_size": 50277, "pad_vocab_size_multiple": 16}
    family, mamba2 = translate(config | {"ssm_cfg": {"layer": "Mamba2"}}, "here")
    assert (family, mamba2["vocab_size"], mamba2["state_size"], mamba2["head_dim"]) == ("mamba2", 50288, 128, 64)
    assert (mamba2["num_heads"], mamba2["n_groups"]) == (24, 1)
    assert mamba2["eos_token_id"] is None


@pytest.mark.parametrize(
    ("family", "change", "message"),
    [
        ("mamba2", {"ssm_cfg": {"D_has_hdim": True}}, r"ssm_cfg.D_has_hdim=True is not supported"),
        ("mamba2", {"ssm_cfg": {"norm_before_gate": True}}, r"ssm_cfg.norm_before_gate=True is not supported"),
        ("mamba2", {"ssm_cfg": {"rmsnorm": False}}, r"ssm_cfg.rmsnorm=False is not supported"),
        ("mamba2", {"ssm_cfg": {"d_ssm": 16}}, r"ssm_cfg.d_ssm=16 is not supported.*= 32 is"),
        ("mamba2", {"ssm_cfg": {"headdim": 5}}, r"multiple of headdim, got 32 and 5"),
        ("mamba2", {"ssm_cfg": {"headdim": "4"}}, r"must be whole numbers >= 1"),
        ("mamba2", {"ssm_cfg": {"ngroups": 3}}, r"num_heads must be a multiple of n_groups"),
        ("mamba2", {"ssm_cfg": {"d_staet": 4}}, r"ssm_cfg.d_staet is unknown; did you mean ssm_cfg.d_state\?"),
        ("mamba", {"ssm_cfg": {"headdim": 4}}, r"ssm_cfg.headdim is unknown"),
        ("mamba", {"ssm_cfg": {"d_state": 0}}, r"state_size must be a whole number >= 1, got 0"),
        ("mamba", {"ssm_cfg": {"dt_rank": 2.5}}, r"time_step_rank"),
        ("mamba", {"ssm_cfg": {"layer": "Mamba3"}}, r"ssm_cfg.layer 'Mamba3' is not supported.*'Mamba1', 'Mamba2'"),
        ("mamba", {"ssm_cfg": 3}, r"ssm_cfg must be a dictionary"),
        ("mamba", {"attn_layer_idx": [1]}, r"with ssm_cfg.layer 'Mamba1' is not supported: no class has plain Mamba-1"),
        ("mamba", {"rms_norm": False}, r"rms_norm=False is not supported"),
        ("mamba", {"d_intermediate": 64}, r"with ssm_cfg.layer 'Mamba1' is not supported"),
        ("mamba", {"n_layers": 2}, r"n_layers is unknown; did you mean n_layer\?"),
        ("mamba", {"vocab_size": "24"}, r"vocab_size must be a whole number >= 1, got '24'"),
    ],
)
def test_what_the_class_cannot_represent_is_refused_by_name(kit, family, change, message, tmp_path):
    config = dict(kit.ORIGINAL[family])
    if isinstance(change.get("ssm_cfg"), dict):
        change = {"ssm_cfg": config["ssm_cfg"] | change["ssm_cfg"]}
    weights = kit.original_weights(kit.tiny(family))
    with pytest.raises(ValueError, match=message):
        load(kit.write(tmp_path, config | change, weights))


def test_generation_runs_without_special_tokens(kit, family, tmp_path):
    model = load(
        kit.write(tmp_path, kit.ORIGINAL[family], kit.original_weights(kit.tiny(family, tie_word_embeddings=True)))
    )
    assert model.generate(torch.arange(5)[None], max_new_tokens=4, do_sample=False).shape == (1, 9)
