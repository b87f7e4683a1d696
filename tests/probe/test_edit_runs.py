"""Edits while a model generates, at the extremes, in what is differentiated, and what is refused of them."""

import numpy as np
import pytest
import torch
from edited import Change, mixer, run

import mamba_probe as mp

IDS = torch.randint(1, 61, (2, 6), generator=torch.Generator().manual_seed(4))
OPTIONS = {"do_sample": False, "pad_token_id": 0, "return_dict_in_generate": True, "output_logits": True}


def logits(model, family, ids, changes):
    """The whole language model in float64, with the edits."""

    def rms(u, norm):
        scale = np.sqrt((u**2).mean(-1, keepdims=True) + norm.variance_epsilon)
        return u / scale * norm.weight.detach().double().numpy()

    u = model.backbone.embeddings.weight.detach().double().numpy()[ids]
    for layer, block in enumerate(model.backbone.layers):
        mine = [change for change in changes if change.layer in (None, layer)]
        u = u + run(family, block.mixer, rms(u, block.norm), np.ones(ids.shape), mine)["out"]
    return rms(u, model.backbone.norm_f) @ model.lm_head.weight.detach().double().numpy().T


GENERATED = (
    [Change("scale", "B", 3.0, {"token": 7}, layer=0), Change("assign", "h", 0.5, {"token": [2, 8]}, layer=1)],
    [Change("assign", "A_bar", 0.0, {"token": [6, 9]}), Change("zero", "x", None, {"token": 8, "batch": 1})],
    [Change("scale", "delta", 0.3, {"token": [3, 6, 10]}), Change("scale", "y", 2.0, layer=1)],
    [Change("zero", "C", None, {"token": 9}), Change("assign", "z", 1.0, {"token": 5}), Change("ablate", "decay")],
    [Change("ablate", "conv", layer=0), Change("ablate", "gate", layer=1), Change("freeze", "delta", 0.2)],
)


@pytest.mark.parametrize("changes", GENERATED, ids=str)
def test_tokens_count_over_prefill_and_decoding(build, family, changes):
    model = build() if family == "mamba" else build(time_step_limit=(0.0, float("inf")))  # decoding has no limits
    with mp.attach(model) as probe, probe.edit(*[one.edit() for one in changes]):
        made = model.generate(IDS, max_new_tokens=6, min_new_tokens=6, **OPTIONS)
        again = model.generate(IDS, max_new_tokens=6, min_new_tokens=6, **OPTIONS)
    assert again.sequences.equal(made.sequences), "a new sequence is counted from its own beginning"
    for step, found in enumerate(made.logits):
        expected = logits(model, family, made.sequences[:, : 6 + step].numpy(), changes)[:, -1]
        assert abs(found.numpy() - expected).max() <= 2e-5 * abs(expected).max(), step


def test_a_swap_of_all_tokens_goes_on_with_the_other_runs_tokens(model):
    ids = torch.randint(1, 61, (2, 12), generator=torch.Generator().manual_seed(8))
    with mp.attach(model) as probe:
        other = probe.record(ids, variables=["B"], layers=[0])
        with probe.edit(mp.swap("B", other, layer=0)), probe.recording(variables=["B"], layers=[0]) as recorder:
            model.generate(IDS, max_new_tokens=6, min_new_tokens=6, **OPTIONS)
    assert (recorder.dataset["B"].values == other["B"].values[:, :, :11]).all()


CUT = (
    [Change("assign", "h", 0.5, {"token": [4, 6]}), Change("scale", "B", 2.0, {"token": [3, 8]}, layer=1)],
    [Change("assign", "A_bar", 0.0, {"token": 5}), Change("zero", "C", None, {"token": 7})],
)


@pytest.mark.parametrize("changes", CUT, ids=str)
@pytest.mark.parametrize("family", ["mamba2"])  # transformers drops a Mamba-1 state here
def test_tokens_count_over_a_prompt_in_pieces_of_several(build, family, changes):
    model = build()
    ids = torch.randint(1, 61, (2, 10), generator=torch.Generator().manual_seed(9))
    with mp.attach(model) as probe, torch.no_grad(), probe.edit(*[one.edit() for one in changes]):
        begun = model(ids[:, :5], use_cache=True)
        rest = model(ids[:, 5:], cache_params=begun.cache_params, use_cache=True)
    expected = logits(model, family, ids.numpy(), changes)
    found = torch.cat([begun.logits, rest.logits], 1).numpy()
    assert abs(found - expected).max() <= 2e-5 * abs(expected).max()


def test_what_is_kept_on_the_device_is_what_was_executed(model):
    with mp.attach(model) as probe, torch.no_grad(), probe.edit(mp.scale("y", 2.0, token=3), mp.zero("h", token=2)):
        trace = probe.record(IDS, variables=["y", "h"])
        with probe.recording(variables=["y", "h"], keep="device") as recorder:
            model(IDS)
    (call,) = recorder.tensors
    for at, layer in enumerate(trace["layer"].values):
        for name in ("y", "h"):
            assert (call[layer, name].numpy() == trace[name].values[at]).all()
    assert (trace["h"].isel(token=2).values == 0).all()


def test_a_continued_sequence_that_was_not_seen_is_refused_where_tokens_are_named(model):
    with mp.attach(model) as probe, torch.no_grad():
        begun = model(IDS, use_cache=True)

        def step():
            return model(IDS[:, :1], cache_params=begun.cache_params, use_cache=True)

        for edit in (mp.zero("B", token=6), mp.zero("h", token=6)):
            with pytest.raises(ValueError, match=r"has not seen.*enter the block before"), probe.edit(edit):
                step()
        with probe.edit(mp.zero("B")):
            step()
        with pytest.raises(ValueError, match=r"zero\(B, token=99\) never acted"), probe.edit(mp.zero("B", token=99)):
            model(IDS)
        with (
            pytest.raises(ValueError, match=r"zero\(B, token=99\) never acted"),
            probe.edit(mp.zero("B", token=99)),
            probe.edit(mp.zero("C")),
        ):
            model(IDS)


@pytest.mark.parametrize("kind", ["mamba", "mamba2", "zamba"])
def test_a_decay_of_0_forgets_and_of_1_keeps_exactly(kind):
    model, u = mixer(kind), torch.randn(2, 9, 4, generator=torch.Generator().manual_seed(2))
    twin = torch.cat([torch.randn(2, 5, 4, generator=torch.Generator().manual_seed(3)), u[:, 5:]], 1)
    with mp.attach(model) as probe:
        with probe.edit(mp.assign("A_bar", 0.0, token=8)):
            states = [probe.record(each, variables=["h", "delta", "B", "x"]) for each in (u, twin)]
        with probe.edit(mp.assign("A_bar", 1.0, token=[6, 7]), mp.zero("B", token=[6, 7])):
            kept = probe.record(u, variables=["h"])["h"].values
    forgot = [each["h"].isel(token=8).values for each in states]
    assert (forgot[0] == forgot[1]).all(), "nothing of what came before"
    assert (states[0]["h"].isel(token=7).values != states[1]["h"].isel(token=7).values).all()
    assert (kept[:, :, 6] == kept[:, :, 5]).all()
    assert (kept[:, :, 7] == kept[:, :, 5]).all()


DIFFERENTIATED = (
    ("own mamba", mp.assign("delta", 0.3, token=2)), ("own mamba", mp.scale("A_bar", 0.5, token=[1, 3])),
    ("own mamba", mp.scale("A_bar", 0.0, token=2)), ("own mamba2", mp.zero("A_bar", head=1)),
    ("own mamba", mp.clamp("A_bar", high=0.95)), ("own mamba2", mp.clamp("delta", 0.01, 0.05)),
    ("own mamba2", mp.freeze("B")), ("own mamba", mp.freeze("x", value=0.4, channel=2)),
    ("own mamba2", mp.scale("h", 0.5, token=[1, 3], head=2)), ("own mamba", mp.assign("h", 0.3, token=2, state=1)),
    ("own mamba", mp.scale("y", 2.0, token=1)), ("own mamba2", mp.scale("z", 2.0)), ("own mamba", mp.ablate("conv")),
    ("own mamba2", mp.ablate("decay")), ("own mamba", mp.ablate("gate")), ("own mamba2", mp.ablate("gate")),
    ("s4d", mp.scale("h", 0.5, token=2)), ("s4d", mp.ablate("decay")), ("own mamba", mp.zero("C", token=3)),
)  # fmt: skip


@pytest.mark.parametrize(("kind", "edit"), DIFFERENTIATED, ids=str)
def test_gradients_pass_through_edits(kind, edit):
    model = mixer(kind)
    u = torch.randn(1, 4, 4, generator=torch.Generator().manual_seed(1), dtype=torch.float64, requires_grad=True)
    with mp.attach(model) as probe, probe.edit(edit):
        assert torch.autograd.gradcheck(model, (u,), atol=1e-7)


@pytest.mark.parametrize("kind", ["own mamba", "own mamba2"])
def test_gradients_by_the_value_of_an_edit(kind):
    model = mixer(kind)
    u = torch.randn(1, 4, 4, generator=torch.Generator().manual_seed(1), dtype=torch.float64)

    def out(factor, state):
        with mp.attach(model) as probe, probe.edit(mp.scale("B", factor), mp.assign("h", state, token=1)):
            return model(u)

    given = [torch.rand(3, dtype=torch.float64, requires_grad=True) for _ in range(2)]
    assert torch.autograd.gradcheck(out, given, atol=1e-7)


def test_values_of_a_quantity_of_channels_have_its_axes():
    model, u = mixer("mamba"), torch.randn(2, 5, 4)
    by_channel, by_row = torch.rand(8), torch.rand(2, 5, 8)
    with (
        mp.attach(model) as probe,
        probe.edit(mp.assign("x", by_channel), mp.assign("y", by_row), mp.assign("h", by_row[:, :1, :, None], token=3)),
    ):
        trace = probe.record(u, variables=["x", "y", "h"]).isel(layer=0)
    assert (trace["x"].values == by_channel.numpy()).all()
    assert (trace["y"].values == by_row.numpy()).all()
    assert (trace["h"].isel(token=3).values == by_row[:, 0, :, None].numpy()).all()


def test_edits_that_change_nothing_keep_the_bits_of_a_bfloat16_model(model):
    model.bfloat16()
    with mp.attach(model) as probe, torch.no_grad():
        plain = model(IDS).logits
        hooked, _ = probe.run_with_cache(IDS)
        with probe.edit(*[mp.scale(target, 1.0) for target in ("delta", "B", "C", "x", "z", "y")]):
            assert torch.equal(model(IDS).logits, plain)
    assert torch.equal(hooked, plain)


def test_what_edits_refuse():
    model, u = mixer("mamba2"), torch.randn(2, 5, 4)
    for made, match in (
        (lambda: mp.assign("h", 0.0), "h needs token="),
        (lambda: mp.zero("B", token=-1), "token is an index from 0 on"),
        (lambda: mp.zero("B", token=[1, 1]), "names an index twice"),
        (lambda: mp.zero("B", channel=1), "unknown axis of B 'channel'"),
        (lambda: mp.clamp("B"), "needs low"),
        (lambda: mp.scale("delta", -1.0), "delta is a step size and cannot be negative"),
        (lambda: mp.zero("conv"), r"unknown quantity to zero 'conv'.*ablated"),
        (lambda: mp.freeze("h", token=1), r"unknown quantity to freeze 'h'.*can be assigned, scaled"),
    ):
        with pytest.raises(ValueError, match=match):
            made()
    with mp.attach(model) as probe:
        trace = probe.record(u, variables=["B"], tokens=[1, 2])
        padded = probe.record(u, torch.tensor([[0, 1, 1, 1, 1], [1, 1, 1, 1, 1]]), variables=["B"])
        for edit, match in (
            (mp.zero("delta", head=9), "there are 4 along head"),
            (mp.assign("B", torch.ones(5)), r"broadcasts to .*\(2, 5, 2, 3\) .*group, state\); got \(5,\)"),
            (mp.assign("B", 1j), "B is real here, and the value complex"),
            (mp.swap("B", trace), "holds no token 0, which this one has"),
            (mp.swap("C", trace), "the trace holds no C"),
            (mp.swap("C", {}), "the cache holds no blocks.1.mixer.hook_C"),
            (mp.swap("B", padded), "the other run has padding, or no number, at token 0 of row 0"),
            (mp.zero("A_bar", state=1), "has no axis state"),
            (mp.zero("B", batch=4), "there are 2 along batch"),
        ):
            with pytest.raises(ValueError, match=match), probe.edit(edit):
                model(u)
        with probe.edit(mp.swap("B", trace, token=[1, 2])):
            model(u)
    complex_h = mp.clamp("h", 0, 1, token=1)
    with (
        mp.attach(mixer("s4d")) as probe,
        pytest.raises(ValueError, match="complex and has no order"),
        probe.edit(complex_h),
    ):
        probe.record(u.double())
