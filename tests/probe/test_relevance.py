"""Relevance: explicit formulas in numpy, finite differences, the conservation theorem, constructions, refusals."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

import mamba_probe as mp
from mamba_probe.blocks import LanguageModel, Mamba2Block, MambaBlock, S4DBlock
from mamba_probe.relevance import relevance, rules

LENGTH = 12
BLOCKS = {
    "mamba1": lambda: MambaBlock(8, d_state=4),
    "mamba2": lambda: Mamba2Block(8, n_heads=4, d_state=4, n_groups=2),
    "gate alone": lambda: Mamba2Block(8, n_heads=4, d_state=4, gated_norm=False),
    "s4d": lambda: S4DBlock(8, d_state=4),
}


def moved(model: nn.Module, seed: int = 1) -> nn.Module:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.3 * torch.randn(parameter.shape, generator=generator).to(parameter)
    return model.eval()


def own(*kinds: str, dtype: torch.dtype = torch.float64) -> nn.Module:
    torch.manual_seed(0)
    return moved(LanguageModel([BLOCKS[kind]() for kind in kinds], vocab_size=61).to(dtype))


def without_biases(model: nn.Module) -> nn.Module:
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith(("conv1d.bias", "in_proj.bias", "out_proj.bias", "lm_head.bias")):
                parameter.zero_()
    return model


def library(name: str, **options: object) -> nn.Module:
    """A tiny model of transformers, every weight moved."""
    import transformers

    sizes = {"vocab_size": 61, "hidden_size": 24, "num_hidden_layers": 2}
    more = {
        "Mamba": {"state_size": 8, "time_step_rank": 3},
        "FalconMamba": {"state_size": 8, "time_step_rank": 3},
        "Mamba2": {"state_size": 8, "num_heads": 6, "head_dim": 8, "n_groups": 1, "chunk_size": 16},
        "Jamba": {"num_attention_heads": 4, "num_key_value_heads": 2, "intermediate_size": 32, "num_experts": 2,
                  "attn_layer_period": 2, "attn_layer_offset": 1},
    }  # fmt: skip
    config = getattr(transformers, f"{name}Config")(**sizes | more[name] | options)
    torch.manual_seed(0)
    return moved(getattr(transformers, f"{name}ForCausalLM")(config))


def prompt(rows: int = 2, length: int = LENGTH) -> tuple[torch.Tensor, torch.Tensor]:
    ids = torch.randint(1, 61, (rows, length), generator=torch.Generator().manual_seed(2))
    mask = torch.ones_like(ids)
    mask[0, :3] = 0
    return ids, mask


# -- (a) one layer by hand: every step of the propagation as a quotient of parts, in numpy --------------------------


def sigma(a):
    return 1 / (1 + np.exp(-a))


def rms(u, eps=1e-5):
    return 1 / np.sqrt((u**2).mean(-1, keepdims=True) + eps)


def parts_of(model: nn.Module, ids: np.ndarray, mixer2: bool) -> dict[str, np.ndarray]:
    """The forward of one layer and one row, the scan as an unrolled matrix alpha (channel, query, source)."""
    w = {name: each.detach().double().numpy() for name, each in model.state_dict().items()}
    m = {name.split("mixer.")[1]: each for name, each in w.items() if "mixer." in name}
    e = w["backbone.embeddings.weight"][ids]
    u = e * rms(e) * w["backbone.layers.0.norm.weight"]
    made = u @ m["in_proj.weight"].T
    inner = m["out_proj.weight"].shape[1]
    n = 4
    groups = 2 if mixer2 else 1
    wide = m["conv1d.weight"].shape[0]
    z, a, dt = (made[:, :inner], made[:, inner : inner + wide], made[:, inner + wide :]) if mixer2 else (
        made[:, inner:], made[:, :inner], None
    )  # fmt: skip
    taps = m["conv1d.weight"][:, 0, ::-1]
    before = np.zeros_like(a) + m["conv1d.bias"]
    for lag in range(taps.shape[1]):
        before[lag:] += a[: len(a) - lag] * taps[:, lag]
    after = before * sigma(before)
    x = after[:, :inner]
    if mixer2:
        heads = np.repeat(np.arange(4), inner // 4)
        delta = np.logaddexp(0, dt + m["dt_bias"])[:, heads]
        A = -np.exp(m["A_log"])[heads][:, None] * np.ones(n)
        B, C = (each.reshape(len(x), groups, n) for each in np.split(after[:, inner:], 2, axis=1))
        B, C = B[:, heads // 2], C[:, heads // 2]
        D = m["D"][heads]
    else:
        low = x @ m["x_proj.weight"].T
        rank = low.shape[1] - 2 * n
        delta = np.logaddexp(0, low[:, :rank] @ m["dt_proj.weight"].T + m["dt_proj.bias"])
        A, D = -np.exp(m["A_log"]), m["D"]
        B, C = (np.repeat(each[:, None], inner, 1) for each in (low[:, rank : rank + n], low[:, rank + n :]))
    total = delta.cumsum(0)
    alpha = np.zeros((inner, len(x), len(x)))
    for t in range(len(x)):
        for s in range(t + 1):
            alpha[:, t, s] = (C[t] * np.exp(A * (total[t] - total[s])[:, None]) * delta[s][:, None] * B[s]).sum(-1)
    alpha += D[:, None, None] * np.eye(len(x))
    y = np.einsum("cts,sc->tc", alpha, x)
    product = y * z * sigma(z)
    scaled = product
    if mixer2:
        grouped = product.reshape(len(x), groups, -1)
        scaled = (grouped * rms(grouped)).reshape(product.shape) * m["norm.weight"]
    out = scaled @ m["out_proj.weight"].T
    hidden = e + out
    logits = hidden * rms(hidden) * w["backbone.norm_f.weight"] @ w["lm_head.weight"].T
    return {"e": e, "u": u, "a": a, "z": z, "taps": taps, "before": before, "x": x, "alpha": alpha, "y": y,
            "scaled": scaled, "out": out, "hidden": hidden, "logits": logits, "W_out": m["out_proj.weight"],
            "W_in": m["in_proj.weight"], "bias": m["conv1d.bias"], "inner": inner,
            "last": w["backbone.norm_f.weight"] * rms(hidden), "head": w["lm_head.weight"]}  # fmt: skip


def by_hand(p: dict, target: int, mixer2: bool) -> dict[str, np.ndarray]:
    """R of the last token's logit: each part gets its quotient of what it is a part of, gates half and half."""
    R = np.zeros_like(p["hidden"])
    R[-1] = p["hidden"][-1] * p["last"][-1] * p["head"][target]
    R_out, R_skip = R * p["out"] / p["hidden"], R * p["e"] / p["hidden"]
    R_product = np.einsum("ti,ic,tc->tc", R_out / p["out"], p["W_out"], p["scaled"])
    R_y = R_z = R_product / 2
    R_x = np.einsum("tc,cts,sc->sc", R_y / p["y"], p["alpha"], p["x"])
    inner = p["inner"]
    before = p["before"][:, :inner]
    R_a = np.zeros_like(R_x)
    for lag in range(p["taps"].shape[1]):
        a = p["a"][: len(R_x) - lag, :inner]
        R_a[: len(R_x) - lag] += a * p["taps"][:inner, lag] / before[lag:] * R_x[lag:]
    R_bias = (p["bias"][:inner] / before * R_x).sum()
    W_z, W_x = (p["W_in"][:inner], p["W_in"][inner : 2 * inner]) if mixer2 else (p["W_in"][inner:], p["W_in"][:inner])
    R_u = np.einsum("tc,ci,ti->ti", R_a / p["a"][:, :inner], W_x, p["u"])
    R_u += np.einsum("tc,ci,ti->ti", R_z / p["z"], W_z, p["u"])
    return {"relevance": (R_u + R_skip).sum(-1), "mixer_in": R_u.sum(-1), "mixer_out": R_out.sum(-1), "bias": R_bias}


@pytest.mark.parametrize("kind", ["mamba1", "mamba2"])
def test_one_layer_is_what_the_formulas_give_by_hand(kind):
    model, ids = own(kind), prompt()[0]
    with mp.attach(model) as probe:
        found = relevance(probe, ids, target=7)
    for row in range(2):
        parts = parts_of(model, ids[row].numpy(), kind == "mamba2")
        want = by_hand(parts, 7, kind == "mamba2")
        assert abs(found["logit"].values[row, 0] - parts["logits"][-1, 7]) < 1e-12
        assert np.abs(found["relevance"].values[row, 0] - want["relevance"]).max() < 1e-10
        assert np.abs(found["residual"].values[0, row, 0] - want["relevance"]).max() < 1e-10
        for place in ("mixer_in", "mixer_out"):
            assert np.abs(found[place].values[0, row, 0] - want[place]).max() < 1e-10
        assert abs(found["bias"].values[:, row, 0].sum() - want["bias"]) < 1e-10
        assert np.abs(want["relevance"]).max() > 0.05
        assert abs(want["bias"]) > 1e-3


# -- (b) gradient x input -------------------------------------------------------------------------------------------


def test_gradient_rules_agree_with_finite_differences():
    """R_s = d logit / d scale of the embedding of s, at 1, by central differences."""
    model, (ids, mask), step = own("mamba1", "mamba2", "s4d"), prompt(), 1e-5
    with mp.attach(model) as probe:
        found = relevance(probe, ids, mask, target=5, tokens=[4, 8], rules="gradient")
        for query, at in enumerate((4, 8)):
            for token in range(LENGTH):
                logit = {}
                for sign in (1, -1):
                    scale = torch.ones(LENGTH, 1, dtype=torch.float64)
                    scale[token] += sign * step
                    handle = model.get_input_embeddings().register_forward_hook(lambda _m, _a, e, s=scale: e * s)
                    with torch.no_grad():
                        logit[sign] = model(ids, attention_mask=mask).logits[[0, 1], [3 + at, at], 5].numpy()
                    handle.remove()
                want = (logit[1] - logit[-1]) / (2 * step)
                rows = [1] if token < 3 else [0, 1]
                assert np.abs(found["relevance"].values[rows, query, token] - want[rows]).max() < 1e-7
    assert np.isnan(found["relevance"].values[0, :, :3]).all()
    assert "bias" not in found
    assert float(found["conservation_error"].max()) > 0.1, "plain gradients do not conserve"


# -- (d) conservation -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("kind", sorted(BLOCKS))
def test_without_biases_relevance_adds_up_to_the_logit(kind, dtype):
    model, (ids, mask) = without_biases(own(kind, kind, dtype=dtype)), prompt()
    with mp.attach(model) as probe:
        found = relevance(probe, ids, mask, tokens=[3, 8])
    total, logit = found["relevance"].sum("token").values, found["logit"].values
    bound = 1e-5 if dtype == torch.float32 else 1e-10
    assert (np.abs(total - logit) <= bound * np.abs(logit)).all()
    for place in ("residual", "mixer_in", "mixer_out"):
        assert np.abs(found[place].values[np.isfinite(found[place].values)]).max() > 0.01
    assert (np.abs(found["residual"].sum("token").values - logit) <= bound * np.abs(logit)).all()
    assert not found["bias"].values.any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", ["Mamba", "Mamba2", "FalconMamba"])
def test_transformers_families_conserve_with_biases(name, dtype):
    options = {"residual_in_fp32": False} if dtype == torch.float64 else {}
    model = library(name, use_bias=True, **options).to(dtype)
    ids, mask = prompt()
    with mp.attach(model) as probe:
        native = model(ids, attention_mask=mask).logits
        found = relevance(probe, ids, mask, tokens=[2, 8])
        assert torch.equal(model(ids, attention_mask=mask).logits, native), "nothing of the rules is left behind"
    bound = 1e-5 if dtype == torch.float32 else 1e-10
    for error in ("conservation_error", "residual_error", "mixer_error"):
        assert float(found[error].max()) < bound
    gap = found["logit"].values - found["relevance"].sum("token").values
    assert np.abs(gap).max() > 0.05, "the biases matter here"
    assert np.abs(gap - found["bias"].sum("site").values).max() < bound * 30
    assert found.sizes["site"] == 6
    assert np.abs(found["logit"].values[1, 1] - native[1, 8].max().item()) < 1e-4


def test_the_heads_bias_has_the_relevance_that_it_adds_to_the_logit():
    model, ids = own("mamba1"), prompt()[0]
    model.lm_head.bias = nn.Parameter(torch.randn(61, dtype=torch.float64))
    with mp.attach(model) as probe:
        found = relevance(probe, ids, target=9)
    assert found["bias"].sel(site="lm_head").values[:, 0] == pytest.approx(model.lm_head.bias[9].item())


MUTANTS = {
    "gate": ("shared", lambda y, gate: y * gate),
    "silu": ("silu", F.silu),
    "norm": ("normed", lambda hidden, eps: hidden * torch.rsqrt(hidden.square().mean(-1, keepdim=True) + eps)),
}


@pytest.mark.parametrize("part", sorted(MUTANTS))
def test_each_rule_is_needed(part, monkeypatch):
    monkeypatch.setattr(rules, *MUTANTS[part])
    with (
        mp.attach(own("mamba1", "mamba2")) as probe,
        pytest.raises(ValueError, match=r"not conserved \(conservation_error .*tolerance 1e-10; inputs .* logit"),
    ):
        relevance(probe, prompt()[0])


def test_the_selection_is_held(monkeypatch):
    scan = rules.MambaLRP.scan

    class Moving(dict):
        def items(self):
            return [(name, _Kept(each)) for name, each in super().items()]

    class _Kept:
        def __init__(self, tensor):
            self.tensor = tensor

        def detach(self):
            return self.tensor

    monkeypatch.setattr(rules.MambaLRP, "scan", lambda self, x, z, s, fixed: scan(self, x, z, Moving(s), fixed))
    with mp.attach(own("mamba1")) as probe, pytest.raises(ValueError, match="relevance is not conserved"):
        relevance(probe, prompt()[0])


# -- (c) constructions ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mixer", ["mamba1", "mamba2", "s4d"])
@pytest.mark.parametrize("code", ["one-hot", "constant-weight"])
def test_the_answer_of_a_construction_is_split_as_its_weights_say(mixer, code):
    """The residual adds the query's key, which no value's row of the head reads: all of the logit is the mixer's.

    The gate's half goes to the query. Mamba's other half is what the scan read: the value, since the key acted through
    B and C, which are held. In S4D a channel's line before SiLU is 2 key + 2 value - 3 = 1: of that half the value and
    the key have 2/1 each, the convolution's bias -3/1.
    """
    built = mp.constructions.mqar(mixer, n_keys=16, n_values=16, key_code=code, dtype=torch.float64)
    task = mp.tasks.mqar(batch=3, length=32, n_pairs=4, vocab=32, seed=1)
    with mp.attach(built.model) as probe:
        found = relevance(probe, task, tokens="queries")
    assert found.sizes["query"] == 4
    logit, rows = found["logit"].values, np.arange(3)[:, None]
    source = np.take_along_axis(task.source_token, found["query_token"].values, 1)
    R, queries = found["relevance"].values, np.arange(4)
    value, key, query = (R[rows, queries, at] / logit for at in (source, source - 1, found["query_token"].values))
    want = (1.0, 1.0, -1.5) if mixer == "s4d" else (0.5, 0.0, 0.0)
    assert np.abs(query - 0.5).max() < 1e-7
    assert np.abs(value - want[0]).max() < 1e-7
    assert np.abs(key - want[1]).max() < 1e-7
    assert np.abs(found["bias"].sum("site").values / logit - want[2]).max() < 1e-7
    assert (found["target_id"].values == found["top_id"].values).all()


# -- requests -------------------------------------------------------------------------------------------------------


def test_padding_batches_queries_and_switched_off_gradients_change_nothing():
    model, (ids, mask) = own("mamba1", "mamba2"), prompt()
    with mp.attach(model) as probe:
        whole = relevance(probe, ids, mask, tokens=[4, 8])
        alone = relevance(probe, ids[:1, 3:], tokens=[8])
        one = relevance(probe, ids, mask, tokens=[8], batch_size=1)
        with torch.inference_mode():
            again = relevance(probe, ids, mask, tokens=[4, 8], target=whole["target_id"].values)
    assert np.abs(alone["relevance"].values[0, 0] - whole["relevance"].values[0, 1, 3:]).max() < 1e-12
    assert np.abs(one["relevance"].values[:, 0] - whole["relevance"].values[:, 1])[:, 3:].max() < 1e-12
    np.testing.assert_array_equal(again["relevance"].values, whole["relevance"].values)
    assert not whole["relevance"].values[1, 0, 5:].any(), "what comes after the query has none"
    assert whole["relevance"].values[1, 1, 5:9].all()
    assert whole.attrs["target_rule"] == "the model's own top logit there"
    assert whole["query_token"].values.tolist() == [[7, 11], [4, 8]]


def test_the_last_valid_token_is_the_default_and_a_tasks_last_query():
    ids, mask = prompt()
    mask[:, -1] = 0
    with mp.attach(library("Mamba")) as probe:
        assert relevance(probe, ids, mask)["query_token"].values.ravel().tolist() == [LENGTH - 2] * 2
        task = mp.tasks.mqar(batch=2, length=16, n_pairs=3, vocab=60)
        found, top = relevance(probe, task), relevance(probe, task, target="top")
    last = [np.flatnonzero(row >= 0)[-1] for row in task.target]
    assert found["query_token"].values.ravel().tolist() == last
    assert found["target_id"].values.ravel().tolist() == task.target[[0, 1], last].tolist()
    assert (top["target_id"].values == top["top_id"].values).all()
    assert found.attrs["tokens_rule"] == "the last query of each row"
    assert found["role"].dims == ("batch", "token")


def test_wrong_requests_are_refused():
    (ids, mask), model = prompt(), library("Mamba")
    task = mp.tasks.mqar(batch=2, length=16, n_pairs=3, vocab=60)
    asks = {
        r"unknown rules 'mambalr': did you mean 'mambalrp'": {"rules": "mambalr"},
        r"tokens must be positions 0 \.\. 8 in row 0; got \[9\]": {"tokens": [9]},
        r"tokens are positions: a list for every row": {"tokens": [0.5]},
        r"tokens has 3 rows and the input 2": {"tokens": np.zeros((3, 1), int)},
        r"tokens='queries' needs a Task": {"tokens": "queries"},
        r"unknown tokens 'querie': did you mean 'queries'": {"tokens": "querie"},
        r'target="answer" needs a Task': {"target": "answer"},
        r"unknown target 'answers': did you mean 'answer'": {"target": "answers"},
        r"target ids must lie in 0 \.\. 60; got 61 \.\. 61": {"target": 61},
        r"target is an id, one a row \(2,\), or .* got int64 of shape \(3,\)": {"target": np.arange(3)},
    }
    with mp.attach(model) as probe:
        for match, options in asks.items():
            with pytest.raises(ValueError, match=match):
                relevance(probe, ids, mask, **options)
        with pytest.raises(ValueError, match=r'no answer is asked for at token 0 of row 0: pass target="top"'):
            relevance(probe, task, tokens=[0])
        with pytest.raises(ValueError, match="starts from the unedited probe"), probe.edit(mp.ablate("conv")):
            relevance(probe, ids)
        with pytest.raises(ValueError, match="a recording is open"), probe.recording():
            relevance(probe, ids)
        assert all(tap.rules is None for tap in probe._taps.values())


def test_models_with_parts_that_have_no_rule_are_refused_by_name():
    with (
        mp.attach(library("Jamba")) as probe,
        pytest.raises(ValueError, match=r"JambaForCausalLM .* Supported: MambaForCausalLM .*LanguageModel"),
    ):
        relevance(probe, prompt()[0])
    with mp.attach(MambaBlock(8)) as probe, pytest.raises(ValueError, match=r"MambaBlock .* has no logits"):
        relevance(probe, torch.zeros(1, 4, 8))
    with (
        mp.attach(library("Mamba").bfloat16()) as probe,
        pytest.raises(ValueError, match=r"needs float32 or float64.*got torch\.bfloat16: model\.float\(\)"),
    ):
        relevance(probe, prompt()[0])


def test_another_norm_is_refused():
    model = own("mamba1")

    class Doubled(nn.RMSNorm):
        def forward(self, x):
            return 2 * super().forward(x)

    model.backbone.norm_f = Doubled(8, 1e-5).double()
    with (
        mp.attach(model) as probe,
        pytest.raises(ValueError, match=r"the last norm by its rule differs .* by 5\.0e-01"),
    ):
        relevance(probe, prompt()[0])


def test_the_tolerance_is_the_rounding_of_a_sum_over_tokens_where_rows_are_long():
    from mamba_probe.relevance.conserving import _tolerance

    model = mp.blocks.MambaBlock(4)
    assert [_tolerance(model, n) for n in (64, 2**14)] == [1e-5, 2**14 * 2.0**-24]
    assert [_tolerance(model.double(), n) for n in (64, 2**14)] == [1e-10, 1e-10]
