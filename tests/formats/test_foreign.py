"""Layouts of other libraries, made by renaming a perturbed transformers model; and an oracle that knows but the layout.

The oracle reads the file's own names and computes the logits in float64 by the recurrence, as each library's source has
it: it shares no line with transformers or with the formats.
"""

import dataclasses

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from mamba_probe.formats.state_spaces import translate
from mamba_probe.loading import load


@dataclasses.dataclass
class Layout:
    """One library's names: what stands before a layer, the single tensors, and its config.json."""

    config: dict
    layer: str = "backbone.layers.{}."
    embedding: str = "backbone.embeddings.weight"
    norm: str = "backbone.norm_f"
    head: str = "lm_head.weight"
    model: dict = dataclasses.field(default_factory=dict)
    family: str = "mamba"
    file: str = "pytorch_model.bin"
    where: str = "config.json"
    format: str = ""
    eps: float = 1e-5


SIZES = {"hidden_size": 16, "num_hidden_layers": 2, "vocab_size": 24, "state_size": 4}
FLA = {"fuse_cross_entropy": True, "fuse_norm": True, "use_l2warp": False, "norm_eps": 1e-3, "expand": 2}
ZOO = {
    "d_model": 16, "n_layers": 2, "vocab_size": 23, "pad_vocab_size_multiple": 4, "max_position_embeddings": 0,
    "state_mixer": {"name": "torch.nn.Identity", "kwargs": {}}, "resid_dropout": 0.0, "embed_dropout": 0.1,
    "layer_norm_epsilon": 1e-2,
}  # fmt: skip
LAYOUTS = {
    "codestral": Layout(
        {"dim": 64, "n_layers": 2, "vocab_size": 24, "n_groups": 2, "rms_norm": True, "residual_in_fp32": True,
         "fused_add_norm": True, "pad_vocab_size_multiple": 1, "tie_embeddings": False, "model_type": "mamba"},
        layer="model.backbone.layers.{}.", embedding="model.backbone.embedding.weight", norm="model.backbone.norm_f",
        head="model.lm_head.weight", family="mamba2", file="consolidated.safetensors", where="params.json",
        model={"hidden_size": 64, "state_size": 128, "num_heads": 2, "head_dim": 64, "chunk_size": 256,
               "tie_word_embeddings": False},
        format="mamba-codestral",
    ),
    "mamba-minimal": Layout(
        {"d_model": 16, "n_layer": 2, "vocab_size": 24, "d_state": 4, "expand": 2, "dt_rank": 3, "d_conv": 4,
         "pad_vocab_size_multiple": 8, "conv_bias": True, "bias": False, "d_inner": 32},
        layer="layers.{}.", embedding="embedding.weight", norm="norm_f", model={"tie_word_embeddings": True},
    ),
    "mamba.py": Layout(
        {"d_model": 16, "n_layers": 2, "vocab_size": 21, "pad_vocab_size_multiple": 8, "d_state": 4, "dt_rank": 3,
         "expand_factor": 2, "d_conv": 4, "rms_norm_eps": 1e-3, "inner_layernorms": False, "mup": False,
         "pscan": True, "use_cuda": False, "bias": True, "conv_bias": True, "base_std": 0.02, "mup_base_width": 128},
        layer="mamba.layers.{}.", embedding="embedding.weight", norm="norm_f", eps=1e-3,
        model={"tie_word_embeddings": False, "use_bias": True, "layer_norm_epsilon": 1e-3},
    ),
    "mamba.py 2": Layout(
        {"d_model": 16, "n_layers": 2, "vocab_size": 24, "d_head": 4, "d_state": 4, "chunk_size": 8, "n_groups": 1,
         "dt_limit": [0.1, 0.9], "activation": "swish", "learnable_init_states": False, "n_heads": 8},
        layer="mamba.layers.{}.", embedding="embedding.weight", norm="norm_f", family="mamba2", format="mamba.py",
        model={"tie_word_embeddings": False, "n_groups": 1, "time_step_limit": (0.1, 0.9)},
    ),
    "fla": Layout(
        FLA | SIZES | {"model_type": "mamba", "time_step_rank": 3, "conv_kernel": 4}, eps=1e-3,
        model={"tie_word_embeddings": False, "layer_norm_epsilon": 1e-3}, file="model.safetensors",
    ),
    "fla 2": Layout(
        FLA | SIZES | {"model_type": "mamba2", "head_dim": 4, "num_heads": 8, "chunk_size": 8, "rmsnorm": True,
                       "dt_limit": [0.1, 0.9]},
        embedding="backbone.embedding.weight", family="mamba2", file="model.safetensors", format="fla", eps=1e-3,
        model={"tie_word_embeddings": False, "layer_norm_epsilon": 1e-3, "n_groups": 1, "time_step_limit": (0.1, 0.9)},
    ),
    "zoology": Layout(
        ZOO | {"block_type": "MambaBlock",
               "sequence_mixer": {"name": "zoology.mixers.mamba.Mamba", "kwargs": {"d_state": 4, "dt_rank": 3}}},
        embedding="backbone.embeddings.word_embeddings.weight", norm="backbone.ln_f",
        model={"tie_word_embeddings": True},
    ),
    "zoology 2": Layout(
        ZOO | {"block_type": "Mamba2Block",
               "sequence_mixer": {"name": "zoology.mixers.mamba2.Mamba2",
                                  "kwargs": {"d_state": 4, "headdim": 4, "ngroups": 2, "chunk_size": 8}}},
        embedding="backbone.embeddings.word_embeddings.weight", norm="backbone.ln_f", family="mamba2",
        model={"tie_word_embeddings": True}, format="zoology",
    ),
}  # fmt: skip


def source_of(kit, layout):
    """The transformers model whose weights the file will hold; zoology's has a LayerNorm at its end."""
    model = kit.tiny(layout.family, **layout.model)
    if layout.norm.endswith("ln_f"):
        model.backbone.norm_f = nn.LayerNorm(16, eps=layout.config["layer_norm_epsilon"])
        kit.perturb(model.backbone.norm_f)
    return model


def weights_of(model, layout):
    """The model's weights under the layout's names, the head always written."""
    named = {}
    for name, tensor in model.state_dict().items():
        parts = name.split(".")
        if name == "lm_head.weight":
            name = layout.head
        elif name == "backbone.embeddings.weight":
            name = layout.embedding
        elif parts[1] == "norm_f":
            name = f"{layout.norm}.{parts[2]}"
        else:
            name = layout.layer.format(parts[2]) + ".".join(parts[3:])
        named[name] = tensor.clone()
    return named


def put(kit, folder, layout, weights):
    kit.write(folder, layout.config, weights, layout.file)
    (folder / "config.json").rename(folder / layout.where)
    return folder


@pytest.fixture(params=sorted(LAYOUTS))
def layout(request):
    return dataclasses.replace(LAYOUTS[request.param], format=LAYOUTS[request.param].format or request.param)


def test_logits_are_bit_equal(kit, layout, tmp_path):
    source = source_of(kit, layout)
    model = load(put(kit, tmp_path, layout, weights_of(source, layout)))
    assert type(model) is type(source)
    assert model._mamba_probe_source["format"] == layout.format
    assert torch.equal(kit.logits(model), kit.logits(source))
    tied = model.lm_head.weight is model.backbone.embeddings.weight
    assert tied == layout.model["tie_word_embeddings"] == source.config.tie_word_embeddings


def test_every_weight_reaches_its_place(kit, layout, tmp_path):
    """Logits of the file's names alone, in float64, by another code."""
    weights = weights_of(source_of(kit, layout), layout)
    ids = torch.arange(18).reshape(2, 9)
    with torch.no_grad():
        loaded = load(put(kit, tmp_path, layout, weights))(ids, use_cache=False).logits.double()
        expected = oracle({name: tensor.double() for name, tensor in weights.items()}, layout, ids)
    error = (loaded - expected).abs().max() / expected.abs().max()
    if groups_of(layout) > 1 and not kit.NORMS_BY_GROUP:
        assert error > 1e-2, "this release was known to be wrong: it is right, so that it need not be warned of"
    else:
        assert error <= 2e-5


def test_missing_and_unexpected_are_named(kit, layout, tmp_path):
    weights = weights_of(source_of(kit, layout), layout)
    prefix = layout.layer.format(1)
    weights[prefix + "mixer.A_lug"] = weights.pop(prefix + "mixer.A_log")
    weights[prefix + "mixer.D"] = torch.ones(3)
    with pytest.raises(ValueError, match=r"the weights do not fit Mamba2?ForCausalLM") as caught:
        load(put(kit, tmp_path, layout, weights))
    text = str(caught.value)
    assert "missing backbone.layers.1.mixer.A_log (nearest: backbone.layers.1.mixer.A_lug)" in text
    assert "unexpected backbone.layers.1.mixer.A_lug" in text
    assert "shape of backbone.layers.1.mixer.D: expected" in text


REFUSED = [
    ("codestral", {"n_group": 2}, r"n_group is unknown; did you mean n_groups\?"),
    ("codestral", {"rms_norm": False}, r"rms_norm=False is not supported, only True is"),
    ("mamba-minimal", {"ssm_cfg": {"d_state": 4}}, r"ssm_cfg=.*mamba-minimal's own code does not read it"),
    ("mamba-minimal", {"d_inner": 33}, r"d_inner=33 is not supported, only 32 is"),
    ("mamba-minimal", {"d_stat": 33}, r"d_stat is unknown; did you mean d_state"),
    ("mamba.py", {"inner_layernorms": True}, r"inner_layernorms=True is not supported"),
    ("mamba.py", {"mup": True}, r"mup=True is not supported"),
    ("mamba.py", {"d_stat": 4}, r"d_stat is unknown; did you mean d_state"),
    ("mamba.py", {"vocab_size": "24"}, r"vocab_size must be a whole number >= 1, got '24'"),
    ("mamba.py 2", {"learnable_init_states": True}, r"learnable_init_states=True is not supported"),
    ("mamba.py 2", {"n_groups": 2}, r"n_groups=2 is not supported, only 1"),
    ("mamba.py 2", {"rms_norm_eps": 1e-3}, r"rms_norm_eps=0.001 is not supported, only 1e-05"),
    ("mamba.py 2", {"d_head": 5}, r"= 32 must be a multiple of d_head"),
    ("fla 2", {"n_groups": 2}, r"n_groups=2 is not supported"),
    ("fla 2", {"norm_before_gate": True}, r"norm_before_gate=True is not supported"),
    ("fla 2", {"num_heads": 4}, r"num_heads=4 is not supported, only 8 is: it is expand"),
    ("fla 2", {"time_step_limit": [0, 1]}, r"both dt_limit and time_step_limit"),
    ("zoology", {"max_position_embeddings": 64}, r"max_position_embeddings=64 is not supported, only 0"),
    ("zoology", {"block_type": "TransformerBlock"}, r"block_type='TransformerBlock' is not supported"),
    ("zoology", {"sequence_mixer": {"name": "zoology.mixers.hyena.Hyena"}}, r"must be 'zoology.mixers.mamba.Mamba'"),
    ("zoology", {"n_layer": 3}, r"n_layer is unknown; did you mean n_layers"),
    ("zoology 2", {"sequence_mixer": {"name": "zoology.mixers.mamba2.Mamba2", "kwargs": {"D_has_hdim": True}}},
     r"ssm_cfg.D_has_hdim=True is not supported"),
]  # fmt: skip


@pytest.mark.parametrize(("name", "change", "message"), REFUSED)
def test_what_no_class_can_hold_is_refused_by_name(kit, name, change, message, tmp_path):
    layout = LAYOUTS[name]
    weights = weights_of(source_of(kit, layout), layout)
    changed = dataclasses.replace(layout, config=layout.config | change)
    with pytest.raises(ValueError, match=message):
        load(put(kit, tmp_path, changed, weights))


@pytest.mark.parametrize(("name", "field"), [("mamba.py", "vocab_size"), ("codestral", "tie_embeddings")])
def test_a_missing_field_is_named(kit, name, field, tmp_path):
    layout = LAYOUTS[name]
    config = {key: value for key, value in layout.config.items() if key != field}
    weights = weights_of(source_of(kit, layout), layout)
    with pytest.raises(ValueError, match=rf"must give {field} too"):
        load(put(kit, tmp_path, dataclasses.replace(layout, config=config), weights))


def test_names_of_jambas_norms_are_refused(kit, tmp_path):
    """`inner_layernorms` hidden from the config: the weights tell."""
    layout = LAYOUTS["mamba.py"]
    weights = weights_of(source_of(kit, layout), layout) | {"mamba.layers.0.mixer.B_layernorm.weight": torch.ones(4)}
    with pytest.raises(ValueError, match=r"unexpected backbone.layers.0.mixer.B_layernorm.weight"):
        load(put(kit, tmp_path, layout, weights))


def test_codestral_without_its_prefix_is_refused(kit, tmp_path):
    layout = LAYOUTS["codestral"]
    weights = {
        name.removeprefix("model."): tensor for name, tensor in weights_of(source_of(kit, layout), layout).items()
    }
    with pytest.raises(ValueError, match=r"names of a Mamba-Codestral start with 'model.', but .*backbone"):
        load(put(kit, tmp_path, layout, weights))


def test_mamba_minimal_beside_the_originals_config(kit, tmp_path):
    config = {"d_model": 16, "n_layer": 2, "vocab_size": 24, "ssm_cfg": {}, "rms_norm": True, "residual_in_fp32": True,
              "fused_add_norm": True, "pad_vocab_size_multiple": 8}  # fmt: skip
    layout = dataclasses.replace(LAYOUTS["mamba-minimal"], config=config)
    source = kit.tiny("mamba", state_size=16, time_step_rank=1, tie_word_embeddings=True)
    model = load(put(kit, tmp_path, layout, weights_of(source, layout)))
    assert torch.equal(kit.logits(model), kit.logits(source))
    assert model.config.residual_in_fp32 is False


def test_transformers_would_have_ignored_flas_epsilon(kit, tmp_path):
    """Why fla's configs are told from transformers': the same names, and another model."""
    from transformers import AutoModelForCausalLM

    layout = LAYOUTS["fla"]
    source = source_of(kit, layout)
    put(kit, tmp_path, layout, weights_of(source, layout))
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    assert theirs.config.layer_norm_epsilon == 1e-5
    assert not torch.allclose(kit.logits(theirs), kit.logits(source), rtol=1e-3)
    assert torch.equal(kit.logits(load(tmp_path)), kit.logits(source))


def test_flas_own_defaults():
    from mamba_probe.formats import fla

    config = {"model_type": "mamba", "fuse_cross_entropy": True, "hidden_size": 16, "num_hidden_layers": 1}
    made = fla.convert(config, {"lm_head.weight": torch.ones(1)}, "here").module.config
    assert (made.vocab_size, made.tie_word_embeddings, made.residual_in_fp32) == (32000, False, False)
    assert (made.layer_norm_epsilon, made.time_step_rank, made.use_conv_bias) == (1e-5, 1, True)


def test_codestral_from_the_cache(kit, monkeypatch, tmp_path):
    import huggingface_hub.constants

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    repository, layout = tmp_path / "models--mistralai--tiny", LAYOUTS["codestral"]
    source = source_of(kit, layout)
    put(kit, repository / "snapshots" / ("a" * 40), layout, weights_of(source, layout))
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text("a" * 40)
    assert torch.equal(kit.logits(load("mistralai/tiny")), kit.logits(source))


def test_codestrals_own_sizes():
    config = {"d_model": 4096, "n_layer": 64, "vocab_size": 32768, "ssm_cfg": {"layer": "Mamba2", "ngroups": 8}}
    family, fields = translate(config, "here")
    assert (family, fields["num_heads"], fields["head_dim"], fields["state_size"]) == ("mamba2", 128, 64, 128)


def groups_of(layout):
    mixer = layout.config.get("sequence_mixer", {}).get("kwargs", {})
    return layout.config.get("n_groups") or mixer.get("ngroups", 1)


def oracle(weights, layout, ids):
    """Logits from the file: embedding, norm, mixer and residual a layer, last norm, head; all in float64."""
    hidden = weights[layout.embedding][ids]
    mixer = {"mamba": mamba, "mamba2": mamba2}[layout.family]
    for number in range(2):
        prefix = layout.layer.format(number)
        layer = {name.removeprefix(prefix): w for name, w in weights.items() if name.startswith(prefix)}
        hidden = hidden + mixer(layer, rms(hidden, layer["norm.weight"], layout.eps), layout)
    if layout.norm.endswith("ln_f"):
        last = (hidden - hidden.mean(-1, keepdim=True)) / (hidden.var(-1, correction=0, keepdim=True) + 1e-2).sqrt()
        last = last * weights[layout.norm + ".weight"] + weights[layout.norm + ".bias"]
    else:
        last = rms(hidden, weights[layout.norm + ".weight"], layout.eps)
    return last @ weights[layout.head].mT


def rms(x, weight, eps):
    return x / (x.square().mean(-1, keepdim=True) + eps).sqrt() * weight


def conv(layer, x):
    taps, bias = layer["mixer.conv1d.weight"][:, 0], layer["mixer.conv1d.bias"]
    padded = torch.cat([x.new_zeros(len(x), taps.shape[1] - 1, x.shape[2]), x], 1)
    return F.silu(sum(padded[:, k : k + x.shape[1]] * taps[:, k] for k in range(taps.shape[1])) + bias)


def mamba(layer, u, layout):
    bias = layer.get("mixer.in_proj.bias", 0), layer.get("mixer.out_proj.bias", 0)
    x, z = (u @ layer["mixer.in_proj.weight"].mT + bias[0]).chunk(2, -1)
    x, n = conv(layer, x), 4
    dt, B, C = (x @ layer["mixer.x_proj.weight"].mT).split([layer["mixer.dt_proj.weight"].shape[1], n, n], -1)
    delta = F.softplus(dt @ layer["mixer.dt_proj.weight"].mT + layer["mixer.dt_proj.bias"])
    A, h, outs = -layer["mixer.A_log"].exp(), 0, []
    for t in range(u.shape[1]):
        d = delta[:, t, :, None]
        h = (d * A).exp() * h + d * B[:, t, None] * x[:, t, :, None]
        outs.append((h * C[:, t, None]).sum(-1) + layer["mixer.D"] * x[:, t])
    return (torch.stack(outs, 1) * F.silu(z)) @ layer["mixer.out_proj.weight"].mT + bias[1]


def mamba2(layer, u, layout):
    heads, inner = len(layer["mixer.D"]), layer["mixer.norm.weight"].shape[0]
    groups = groups_of(layout)
    low, high = layout.config.get("dt_limit", (0, float("inf")))
    wide = layer["mixer.conv1d.bias"].shape[0]
    z, xBC, dt = (u @ layer["mixer.in_proj.weight"].mT).split([inner, wide, heads], -1)
    x, B, C = conv(layer, xBC).split([inner, (wide - inner) // 2, (wide - inner) // 2], -1)
    x = x.unflatten(-1, (heads, -1))
    B, C = (each.unflatten(-1, (groups, -1)).repeat_interleave(heads // groups, 2) for each in (B, C))
    delta = F.softplus(dt + layer["mixer.dt_bias"]).clamp(low, high)
    A, h, outs = -layer["mixer.A_log"].exp(), 0, []
    for t in range(u.shape[1]):
        d = delta[:, t, :, None, None]
        h = (d * A[:, None, None]).exp() * h + d * B[:, t, :, None] * x[:, t, ..., None]
        outs.append((h * C[:, t, :, None]).sum(-1) + layer["mixer.D"][:, None] * x[:, t])
    gated = (torch.stack(outs, 1).flatten(2) * F.silu(z)).unflatten(-1, (groups, -1))
    eps = layout.config.get("norm_eps", 1e-5)
    return (rms(gated, 1, eps).flatten(2) * layer["mixer.norm.weight"]) @ layer["mixer.out_proj.weight"].mT
