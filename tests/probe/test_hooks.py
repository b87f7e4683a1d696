"""Hooks: what they are handed, what they may give back, gradients, filters of names, and what is refused."""

from pathlib import Path
from typing import Any

import pytest
import torch

import mamba_probe as mp
from mamba_probe.hooks import ABSENT, AROUND, SCAN

IDS = torch.randint(1, 61, (2, 9), generator=torch.Generator().manual_seed(6))
DELTA = "blocks.1.mixer.hook_delta"


def exact(kind) -> Any:
    """Two of our own blocks with an embedding, float64, all weights perturbed."""
    torch.manual_seed(1)
    options = {"d_inner": 6, "d_state": 3}
    make = {
        "mamba": lambda layer: mp.blocks.MambaBlock(4, dt_rank=2, layer_idx=layer, **options),
        "mamba2": lambda layer: mp.blocks.Mamba2Block(4, n_heads=2, n_groups=2, layer_idx=layer, **options),
        "s4d": lambda layer: mp.blocks.S4DBlock(4, layer_idx=layer, **options),
    }[kind]
    model = mp.blocks.LanguageModel([make(0), make(1)], vocab_size=61).double()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.2 * torch.randn_like(parameter)
    return model


@pytest.mark.parametrize("kind", ["mamba", "mamba2", "s4d"])
def test_gradients_equal_finite_differences(kind):
    """dL/dt along a direction, at every name."""
    model, step = exact(kind), 1e-5
    with mp.attach(model) as probe:
        names = [name for name in probe.hook_names() if not name.endswith(("hook_h", "hook_B_bar"))]
        for name in [*names, "blocks.0.mixer.hook_h.4"]:
            gradient, along = {}, {}

            def keep(tensor, hook, into=gradient):
                into["found"] = tensor

            def move(tensor, hook, by, along=along):
                if "way" not in along:
                    along["way"] = torch.randn(
                        tensor.shape, dtype=tensor.dtype, generator=torch.Generator().manual_seed(2)
                    )
                return tensor + by * along["way"]

            probe.run_with_hooks(IDS, bwd_hooks=[(name, keep)]).square().sum().backward()
            with torch.no_grad():
                up, down = (
                    probe.run_with_hooks(IDS, fwd_hooks=[(name, lambda t, hook, by=by: move(t, hook, by))])
                    .square()
                    .sum()
                    for by in (step, -step)
                )
            way = along["way"]
            product = gradient["found"].conj() * way if way.is_complex() else gradient["found"] * way
            expected = (up - down) / (2 * step)
            torch.testing.assert_close(product.real.sum(), expected, rtol=1e-5, atol=1e-8, msg=name)


def test_a_returned_gradient_replaces_and_the_context_is_shared():
    model = exact("mamba")
    seen = {}

    def forward(tensor, hook):
        hook.ctx["tensor"] = tensor.detach()

    def backward(gradient, hook):
        seen.update(hook.ctx)
        return torch.zeros_like(gradient)

    with mp.attach(model) as probe:
        for name, weight in (("mixer.hook_in_proj", "in_proj"), ("mixer.hook_ssm_dt", "dt_proj")):
            model.zero_grad()
            at = f"blocks.1.{name}"
            probe.run_with_hooks(IDS, fwd_hooks=[(at, forward)], bwd_hooks=[(at, backward)]).sum().backward()
            assert (getattr(model.backbone.layers[1].mixer, weight).weight.grad == 0).all()
            assert (getattr(model.backbone.layers[0].mixer, weight).weight.grad != 0).any()
            assert seen["tensor"].shape[:2] == (2, 9)


def test_the_four_kinds_of_filters(model):
    with mp.attach(model) as probe:
        names = probe.hook_names()
        assert list(probe.run_with_cache(IDS, names_filter=DELTA)[1]) == [DELTA]
        assert list(probe.run_with_cache(IDS, names_filter=[names[3], names[0]])[1]) == [names[3], names[0]]
        chosen = probe.run_with_cache(IDS, names_filter=lambda name: name.endswith("hook_B"))[1]
        assert list(chosen) == ["blocks.0.mixer.hook_B", "blocks.1.mixer.hook_B"]
        assert list(probe.run_with_cache(IDS)[1]) == names
        one = probe.run_with_cache(IDS, names_filter=["blocks.0.mixer.hook_h", "blocks.0.mixer.hook_h.4"])[1]
        assert torch.equal(one["h", 0][:, 4], one["blocks.0.mixer.hook_h.4"])
        for wrong, match in (
            (lambda name: False, "true for none of the hook points"),
            ([], "names are a name, a list of names"),
            (3, "names are a name, a list of names"),
            ("blocks.1.mixer.hook_detla", "did you mean 'blocks.1.mixer.hook_delta'"),
            ("blocks.7.mixer.hook_delta", "unknown hook point 'blocks.7"),
            ("blocks.1.hook_delta", "did you mean 'blocks.1.mixer.hook_delta'"),
            ("hook_embed", "is no name of a hook point"),
            ("blocks.1.mixer.hook_delta.3", "unknown hook point"),
        ):
            with pytest.raises(ValueError, match=match):
                probe.run_with_cache(IDS, names_filter=wrong)


@pytest.mark.parametrize("last", ABSENT)
def test_names_that_mean_something_else_elsewhere_are_refused_with_what_to_use(last, model):
    with mp.attach(model) as probe:
        known = probe.hook_names()
        for place in (last, f"mixer.{last}"):
            with pytest.raises(ValueError, match=rf"no hook point 'blocks.0.{place}': "):
                probe.run_with_cache(IDS, names_filter=f"blocks.0.{place}")
        instead = [word.strip(",;") for word in ABSENT[last].split() if "hook_" in word and "{" not in word]
        exists = [f"blocks.0.{word}" in known or word == "mixer.hook_x_proj" for word in instead]
        assert all(exists)
        assert instead or "probe.weights()" in ABSENT[last]


def test_what_a_function_is_handed_and_may_give(model):
    calls = []

    def double(delta, hook):
        calls.append((hook.name, hook.layer(), delta.shape, hook.ctx))
        return 2 * delta

    with mp.attach(model) as probe, torch.no_grad():
        plain = model(IDS).logits
        doubled = probe.run_with_hooks(IDS, fwd_hooks=[(DELTA, double)])
        again = probe.run_with_hooks(IDS, fwd_hooks=[(DELTA, double), (DELTA, lambda delta, hook: delta / 2)])
        with probe.edit(mp.scale("delta", 2.0, layer=1)):
            assert torch.equal(model(IDS).logits, doubled)
        kept = probe.run_with_hooks(IDS, fwd_hooks=[(DELTA, lambda delta, hook: None)])
        assert torch.equal(again, kept)
        for wrong, match in (
            (lambda delta, hook: delta[:, :1], rf"hook on {DELTA} must return a tensor \(2, 9, .*got \(2, 1, "),
            (lambda delta, hook: 3.0, "or None; got float"),
            (lambda delta, hook: -delta, "returned values below 0"),
        ):
            with pytest.raises(ValueError, match=match):
                probe.run_with_hooks(IDS, fwd_hooks=[(DELTA, wrong)])
        with pytest.raises(ValueError, match=r"can only be read: return None, and edit at mixer.hook_h.\{token\}"):
            probe.run_with_hooks(IDS, fwd_hooks=[("blocks.0.mixer.hook_h", lambda h, hook: h)])
        assert torch.equal(model(IDS).logits, plain)
    name, layer, shape, ctx = calls[0]
    assert (name, layer, tuple(shape[:2]), ctx) == (DELTA, 1, (2, 9), {})


def test_states_are_shown_as_they_were_edited_and_each_function_is_called_once(model):
    calls = []

    def zero(h, hook):
        calls.append(hook.name)
        return torch.zeros_like(h)

    shown = {}

    def show(h, hook):
        shown["h"] = h

    with mp.attach(model) as probe, torch.no_grad():
        fwd_hooks = [("blocks.0.mixer.hook_h.4", zero), ("blocks.0.mixer.hook_h", show)]
        found = probe.run_with_hooks(IDS, fwd_hooks=fwd_hooks)
        with probe.edit(mp.zero("h", layer=0, token=4)):
            assert torch.equal(found, model(IDS).logits)
    assert calls == ["blocks.0.mixer.hook_h.4"]
    assert (shown["h"][:, 4] == 0).all()
    assert (shown["h"][:, 5] != 0).any()


@pytest.mark.parametrize("target", ["delta", "A_bar", "B", "C", "x", "z", "y"])
def test_what_is_cached_under_an_edit_is_what_was_executed(model, target):
    with mp.attach(model) as probe, torch.no_grad():
        with probe.edit(mp.assign(target, 0.25, layer=1, token=3), mp.zero("h", layer=1, token=5)):
            cache = probe.run_with_cache(IDS)[1]
            trace = probe.record(IDS, variables=[target, "h"], layers=[1]).isel(layer=0)
        name = {"x": "ssm_input", "z": "skip", "y": "ssm_output"}.get(target, target)
        assert (cache[name, 1][:, 3] == 0.25).all()
        assert (cache["h", 1].numpy() == trace["h"].values).all()
        assert (cache["h", 1][:, 5] == 0).all()
        assert (cache[name, 1].numpy() == trace[target].values.reshape(cache[name, 1].shape)).all()


def test_hooks_that_never_fired_are_named_and_all_go_with_their_block(model):
    late = "blocks.0.mixer.hook_h.40"
    with mp.attach(model) as probe, torch.no_grad():
        plain = model(IDS).logits
        with pytest.raises(ValueError, match=rf"hooks that never fired: {late}"):
            probe.run_with_cache(IDS, names_filter=[DELTA, late])
        with pytest.raises(ValueError, match=rf"never fired: {DELTA}"), probe.hooks([(DELTA, print)]):
            pass
        with pytest.raises(KeyError), probe.hooks([("blocks.0.hook_mixer_out", lambda out, hook: 0 * out)]):
            raise KeyError
        with (
            probe.hooks([(DELTA, lambda delta, hook: 2 * delta)]) as same,
            probe.hooks([(DELTA, lambda d, hook: d / 2)]),
        ):
            assert same is probe
            model(IDS)
        assert torch.equal(model(IDS).logits, plain)
    with pytest.raises(ValueError, match="detached"), probe.hooks([(DELTA, print)]):
        pass


def test_gradients_that_cannot_come_are_refused(model):
    with mp.attach(model) as probe:
        for name, match in (
            ("blocks.0.mixer.hook_h", "name one token"),
            ("blocks.0.mixer.hook_B_bar", "take those of hook_delta and hook_B"),
        ):
            with pytest.raises(ValueError, match=rf"{name} can only be read, and no gradient passes there: {match}"):
                probe.run_with_hooks(IDS, bwd_hooks=[(name, print)])
        with torch.no_grad(), pytest.raises(ValueError, match=rf"no gradient reaches {DELTA}: run under torch.enable"):
            probe.run_with_hooks(IDS, bwd_hooks=[(DELTA, print)])
        silent = pytest.raises(ValueError, match=f"gradient hooks that never fired: {DELTA}")
        with silent, probe.hooks(bwd_hooks=[(DELTA, print)]):
            model(IDS)


def test_hooks_while_generating(model):
    deltas, states = [], []
    prompt = IDS[:, :5]
    hooks = [
        (DELTA, lambda delta, hook: deltas.append(delta.shape[1])),
        ("blocks.0.mixer.hook_h.7", lambda h, hook: states.append(h)),
    ]
    with mp.attach(model) as probe, torch.no_grad():
        with probe.hooks(hooks), probe.recording(variables=["h"], layers=[0]) as recorder:
            model.generate(prompt, max_new_tokens=4, min_new_tokens=4, do_sample=False, pad_token_id=0)
        begun = model(prompt, use_cache=True)
        unseen = pytest.raises(ValueError, match=r"hook\(blocks.0.mixer.hook_h.7\): this call continues a sequence")
        with unseen, probe.hooks(hooks[1:]):
            model(IDS[:, :1], cache_params=begun.cache_params, use_cache=True)
    assert deltas == [5, 1, 1, 1]
    recorded = recorder.dataset["h"].isel(layer=0, token=7).values
    assert (states[0].numpy() == recorded).all()


def test_the_cache(model):
    with mp.attach(model) as probe:
        cache = probe.run_with_cache(IDS)[1]
    assert cache["delta", 1] is cache[DELTA] is cache["delta", -1]
    assert cache["resid_pre", -1] is cache["blocks.1.hook_resid_pre"]
    assert cache["ssm_out", 0, "mixer"] is cache["blocks.0.mixer.hook_ssm_out"]
    assert DELTA in cache
    assert "blocks.9.mixer.hook_delta" not in cache
    assert len(cache) == len(list(cache)) == len(dict(cache.items()))
    assert not any(tensor.requires_grad for tensor in cache.values())
    assert repr(cache).startswith("ActivationCache(blocks.0.hook_resid_pre (2, 9, 24), ")
    assert repr(cache).endswith(f"and {len(cache) - 12} more)")
    assert cache.to("meta")[DELTA].device.type == "meta"
    for wrong in ("delta", ("delta", 9), ("delta", -9), ("nothing", 0)):
        with pytest.raises(KeyError, match="the cache holds"):
            cache[wrong]


def test_a_swap_takes_from_a_cache_what_it_takes_from_a_trace(model):
    other = IDS.flip(1)
    with mp.attach(model) as probe, torch.no_grad():
        cache, made = probe.run_with_cache(other)[1], []
        trace = probe.record(other, variables=["delta", "A_bar", "B", "x", "z", "y", "h"])
        for target in ("delta", "A_bar", "B", "x", "z", "y", "h"):
            for source in (cache, trace):
                with probe.edit(mp.swap(target, source, layer=1, token=[3, 6])):
                    made.append(model(IDS).logits)
            assert torch.equal(*made[-2:]), target
            assert (made[-1] - model(IDS).logits).abs().max() > 1e-5, target


def scaled(delta, hook):
    return 2 * delta


def test_under_autocast(model):
    with mp.attach(model) as probe, torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        hooked = probe.run_with_hooks(IDS, fwd_hooks=[(DELTA, scaled)])
        with probe.edit(mp.scale("delta", 2.0, layer=1)):
            assert torch.equal(hooked, model(IDS).logits)


@pytest.mark.parametrize("family", ["mamba2"])
def test_under_torch_compile(model):
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="eager")
    with mp.attach(model) as probe, torch.no_grad(), probe.hooks([(DELTA, scaled)]):
        expected, found = model(IDS, use_cache=False).logits, compiled(IDS, use_cache=False).logits
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


PAGE = (Path(__file__).parents[2] / "docs/hooks.md").read_text()


def test_the_page_names_every_point():
    for point in (*AROUND, *(f"mixer.{name}" for name in SCAN)):
        assert f"`{point}`" in PAGE, point
    for verb in ("assign", "scale", "clamp", "zero", "freeze", "swap", "ablate"):
        assert f"`{verb}(" in PAGE, verb


def test_a_recording_inside_hooks_says_so(model):
    def half(tensor, hook):
        return tensor / 2

    hooks = [("blocks.0.mixer.hook_B", half), ("blocks.1.hook_resid_pre", half)]
    with mp.attach(model) as probe, probe.hooks(fwd_hooks=hooks):
        assert probe.record(IDS).attrs["edits"] == "hook(blocks.0.mixer.hook_B); hook(blocks.1.hook_resid_pre)"
        with pytest.raises(ValueError, match="start"):
            probe.parity(IDS)
    with mp.attach(model) as probe, probe.recording(variables=["delta"]) as recorder:
        probe.run_with_cache(IDS)
    assert "edits" not in recorder.dataset.attrs or not recorder.dataset.attrs["edits"]
