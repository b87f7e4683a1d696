"""Original hybrids, held by Bamba: against an oracle of mamba_ssm's attention, MLP and block, in float64.

The mixers are transformers' own (tested elsewhere); attention, rotary embedding, MLP and residuals are written out here
from the original's source, so that the order of rows and the angles are checked, not only repeated.
"""

import pytest
import torch
import torch.nn.functional as F
import transformers

from mamba_probe.loading import load

ATTENTION = {"causal": True, "num_heads": 2, "num_heads_kv": 1, "head_dim": 8, "rotary_emb_dim": 4, "d_conv": 0,
             "qkv_proj_bias": False, "out_proj_bias": False, "rotary_emb_base": 100.0}  # fmt: skip
CONFIG = {
    "d_model": 16, "d_intermediate": 100, "n_layer": 3, "vocab_size": 21, "attn_layer_idx": [1], "attn_cfg": ATTENTION,
    "rms_norm": True, "residual_in_fp32": True, "fused_add_norm": True, "tie_embeddings": False,
    "ssm_cfg": {"layer": "Mamba2", "d_state": 4, "headdim": 4, "ngroups": 2, "chunk_size": 8, "dt_limit": [0.1, 0.9]},
}  # fmt: skip


def bamba(kit, **change):
    config = transformers.BambaConfig(
        hidden_size=16, intermediate_size=128, num_hidden_layers=3, vocab_size=24, num_attention_heads=2,
        num_key_value_heads=1, head_dim=8, attn_layer_indices=[1], mamba_n_heads=8, mamba_d_head=4, mamba_d_state=4,
        mamba_n_groups=2, mamba_chunk_size=8, pad_token_id=None, time_step_limit=(0.1, 0.9),
        rope_parameters={"rope_type": "default", "rope_theta": 100.0, "partial_rotary_factor": 0.5}, **change,
    )  # fmt: skip
    return kit.perturb(transformers.BambaForCausalLM(config))


def original(model):
    """The original's state dict of a Bamba: fused projections, mamba_ssm's names."""
    fused, weights = model.state_dict(), {}
    for name, tensor in fused.items():
        _, _, rest = name.partition(".layers.")
        number, _, leaf = rest.partition(".")
        at = f"backbone.layers.{number}."
        plain = {"input_layernorm.weight": "norm.weight", "pre_ff_layernorm.weight": "norm2.weight",
                 "self_attn.o_proj.weight": "mixer.out_proj.weight",
                 "feed_forward.down_proj.weight": "mlp.fc2.weight"}  # fmt: skip
        if leaf.startswith("mamba."):
            weights[at + leaf.replace("mamba.", "mixer.")] = tensor
        elif leaf in plain:
            weights[at + plain[leaf]] = tensor
        elif leaf == "self_attn.q_proj.weight":
            parts = [fused[name.replace("q_proj", each)] for each in ("q_proj", "k_proj", "v_proj")]
            weights[at + "mixer.in_proj.weight"] = torch.cat(parts)
        elif leaf == "feed_forward.up_proj.weight":
            weights[at + "mlp.fc1.weight"] = torch.cat([tensor, fused[name.replace("up", "gate")]])
    ends = {"backbone.embedding.weight": "model.embed_tokens.weight", "lm_head.weight": "lm_head.weight",
            "backbone.norm_f.weight": "model.final_layernorm.weight"}  # fmt: skip
    return {name: tensor.clone() for name, tensor in weights.items()} | {n: fused[m].clone() for n, m in ends.items()}


def test_logits_are_bit_equal_and_those_of_the_oracle(kit, tmp_path):
    source = bamba(kit)
    weights = original(source)
    model = load(kit.write(tmp_path, CONFIG, weights))
    assert (type(model), model._mamba_probe_source["format"]) == (type(source), "state-spaces")
    assert torch.equal(kit.logits(model), kit.logits(source))
    ids = torch.arange(22).reshape(2, 11) % 24
    with torch.no_grad():
        expected = oracle({name: tensor.double() for name, tensor in weights.items()}, model.double(), ids)
    assert (kit.logits(source) - expected).abs().max() <= 2e-5 * expected.abs().max()


def test_an_mlp_without_attention(kit, tmp_path):
    source = bamba(kit)
    weights = original(source)
    ssm = source.model.layers[0].mamba.state_dict()
    weights = {name: tensor for name, tensor in weights.items() if not name.startswith("backbone.layers.1.mixer.")}
    weights |= {f"backbone.layers.1.mixer.{name}": tensor.clone() for name, tensor in ssm.items()}
    model = load(kit.write(tmp_path, CONFIG | {"attn_layer_idx": [], "attn_cfg": {}}, weights))
    assert [type(layer.mamba).__name__ for layer in model.model.layers] == ["BambaMixer"] * 3
    assert torch.equal(model.model.layers[1].mamba.A_log, ssm["A_log"])


def attn(**change):
    return {"attn_cfg": ATTENTION | change}


REFUSED = [
    (attn(d_conv=4), r"attn_cfg.d_conv=4 is not supported, only 0 is: transformers' Bamba, the closest class"),
    (attn(causal=False), r"attn_cfg.causal=False is not supported"),
    (attn(mlp_dim=256), r"attn_cfg.mlp_dim=256 is not supported"),
    (attn(softmax_scale=0.1), r"attn_cfg.softmax_scale=0.1 is not supported"),
    (attn(rotary_emb_interleaved=True), r"attn_cfg.rotary_emb_interleaved=True is not supported"),
    (attn(rotary_emb_dim=0), r"attn_cfg.rotary_emb_dim=0 is not supported, only 1 to head_dim=8 is"),
    (attn(out_proj_bias=True), r"attn_cfg.out_proj_bias=True is not supported, only False is: .*beside qkv_proj_bias"),
    (attn(num_head=2), r"attn_cfg.num_head is unknown; did you mean attn_cfg.num_heads\?"),
    (attn(num_heads="2"), r"attn_cfg.num_heads must be a whole number >= 1, got '2'"),
    ({"attn_cfg": {"num_heads": 2}}, r"attn_cfg.causal=False is not supported, only True"),
    ({"attn_layer_idx": [3]}, r"attn_layer_idx must list layers 0 to 2, got \[3\]"),
    ({"d_intermediate": 0}, r"attn_layer_idx with d_intermediate=0 is not supported: .*an MLP in every layer"),
    ({"ssm_cfg": {"layer": "Mamba1"}}, r"with ssm_cfg.layer 'Mamba1' is not supported: no class has plain Mamba-1"),
    ({"rms_norm": False}, r"rms_norm=False is not supported"),
    (attn(num_heads=4), r"rows of \('q_proj', 'k_proj', 'v_proj'\) must be \[32, 8, 8\], together 48; got 32"),
]


@pytest.mark.parametrize(("change", "message"), REFUSED)
def test_what_bamba_cannot_hold_is_refused_by_name(kit, change, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        load(kit.write(tmp_path, CONFIG | change, original(bamba(kit))))


def test_every_difference_is_named(kit, tmp_path):
    weights = original(bamba(kit))
    del weights["backbone.layers.1.norm2.weight"]
    weights["backbone.layers.0.mixer.conv2d.weight"] = torch.ones(1)
    with pytest.raises(ValueError, match="do not fit BambaForCausalLM") as caught:
        load(kit.write(tmp_path, CONFIG, weights))
    assert "missing model.layers.1.pre_ff_layernorm.weight" in str(caught.value)
    assert "unexpected model.layers.0.mamba.conv2d.weight" in str(caught.value)


def test_half_precision_is_warned_of(kit, tmp_path):
    weights = {name: tensor.bfloat16() for name, tensor in original(bamba(kit)).items()}
    with pytest.warns(UserWarning, match=r"adds the residual in half precision.*pass dtype=torch.float32"):
        load(kit.write(tmp_path, CONFIG, weights))
    assert load(tmp_path, dtype=torch.float32).dtype == torch.float32  # without a warning, which would be an error


def oracle(weights, model, ids):
    """Block by block: residual + mixer(norm), residual + mlp(norm2); `model` lends its mixers alone, in float64."""
    hidden = weights["backbone.embedding.weight"][ids]
    for number in range(3):
        at = f"backbone.layers.{number}."
        layer = {name.removeprefix(at): w for name, w in weights.items() if name.startswith(at)}
        u = rms(hidden, layer["norm.weight"])
        hidden = hidden + (attention(layer, u) if number == 1 else model.model.layers[number].mamba(u))
        y, gate = (rms(hidden, layer["norm2.weight"]) @ layer["mlp.fc1.weight"].mT).chunk(2, -1)
        hidden = hidden + (y * F.silu(gate)) @ layer["mlp.fc2.weight"].mT
    return rms(hidden, weights["backbone.norm_f.weight"]) @ weights["lm_head.weight"].mT


def rms(x, weight):
    return x / (x.square().mean(-1, keepdim=True) + 1e-5).sqrt() * weight


def attention(layer, u):
    """Two query heads on one key and value head of 8, of which the first four dimensions turn, two by two halves."""
    q, k, v = (u @ layer["mixer.in_proj.weight"].mT).split([16, 8, 8], -1)
    heads = []
    for head in q.chunk(2, -1):
        score = torch.einsum("btd,bsd->bts", turned(head), turned(k)) / 8**0.5
        score = score.masked_fill(torch.ones(u.shape[1], u.shape[1]).triu(1).bool(), float("-inf"))
        heads.append(score.softmax(-1) @ v)
    return torch.cat(heads, -1) @ layer["mixer.out_proj.weight"].mT


def turned(x):
    angle = torch.arange(x.shape[1]).double()[:, None] * 100.0 ** -(torch.arange(0, 4, 2) / 4).double()
    first, second, rest = x[..., :2], x[..., 2:4], x[..., 4:]
    return torch.cat([first * angle.cos() - second * angle.sin(), second * angle.cos() + first * angle.sin(), rest], -1)
