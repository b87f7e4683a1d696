"""Models whose weights accelerate keeps elsewhere: probed, they compute and say what the whole model does."""

import copy
from contextlib import nullcontext

import accelerate
import pytest
import torch
import transformers

import mamba_probe as mp
from mamba_probe.mixers.offload import held, place, refuse_absent

CPU = torch.device("cpu")
VARIABLES = ("delta", "A", "B", "C", "h", "z", "u", "out")
BUILDERS = ("mamba", "falcon", "jamba", "zamba", "mamba2", "bamba", "zamba2", "granite", "nemotron_h", "falcon_h1")

OLDER = transformers.__version__.startswith("5.16")
WARNED = pytest.warns(UserWarning, match="on a device type different") if OLDER else nullcontext()
"""What that release says of every offloaded model that generates."""


def whole_on_cpu(model, folder):
    accelerate.cpu_offload(model, execution_device=CPU)


def whole_on_disk(model, folder):
    accelerate.disk_offload(model, str(folder), execution_device=CPU)


def by_map(model, folder):
    """Every other layer on disk, the rest elsewhere in memory."""
    core = model.base_model_prefix
    parts = [name for name, _ in getattr(model, core).named_children()]
    places = {f"{core}.{name}": "cpu" for name in parts if name != "layers"} | {"lm_head": "cpu"}
    for number in range(len(getattr(model, core).layers)):
        places[f"{core}.layers.{number}"] = "disk" if number % 2 else "cpu"
    accelerate.dispatch_model(model, places, main_device=CPU, offload_dir=str(folder), force_hooks=True)


WAYS = {"cpu_offload": whole_on_cpu, "disk_offload": whole_on_disk, "device_map": by_map}


def _grid(sampled):
    """Every family in every way; `make test` takes one way a family, which take turns."""
    for row, family in enumerate(BUILDERS):
        for at, way in enumerate(WAYS):
            yield pytest.param(family, way, marks=() if sampled(row, at) else pytest.mark.long)


@pytest.fixture
def pair(family, every_family):
    """A model, and its twin to be offloaded."""
    model = every_family[family]()
    return model, copy.deepcopy(model)


def ids_of(length):
    return torch.randint(1, 61, (2, length), generator=torch.Generator().manual_seed(4))


def run(model, ids):
    with torch.no_grad():
        return model(ids).logits


@pytest.mark.parametrize(("family", "way"), list(_grid(lambda row, at: at == row % 3)))
def test_an_offloaded_model_is_probed_as_the_whole_one(pair, way, tmp_path):
    model, away = pair
    ids, mask = ids_of(9), torch.ones(2, 9, dtype=torch.long)
    mask[0, :3] = 0
    WAYS[way](away, tmp_path)
    native, forwards = run(away, ids), [module.__dict__.get("forward") for module in away.modules()]
    assert any(parameter.is_meta for parameter in away.parameters())
    traces, weights = [], []
    for each in (model, away):
        with mp.attach(each) as probe:
            assert (run(each, ids) - native).abs().max() <= 2e-6 * native.abs().max()
            traces.append(probe.record(ids, mask, variables=VARIABLES))
            weights.append(probe.weights())
            parity = probe.parity(ids, mask)
            for name in ("out_vs_native", "delta", "B", "C"):
                assert float(parity[name].max()) <= 2e-6, name
            assert float(parity["logits_vs_native"]) <= 2e-5
    for a, b in (traces, weights):
        assert a.equals(b)
    assert traces[0].attrs["model_hash"] == traces[1].attrs["model_hash"]
    assert [module.__dict__.get("forward") for module in away.modules()] == forwards
    assert torch.equal(run(away, ids), native)
    assert any(parameter.is_meta for parameter in away.parameters()), "what was brought is taken away again"


@pytest.mark.parametrize(("family", "way"), list(_grid(lambda row, at: at == 0 and row % 3 == 0)))
def test_generate_is_recorded_and_edits_act(pair, way, tmp_path):
    model, away = pair
    ids = ids_of(6)[:1]
    options = {"max_new_tokens": 4, "min_new_tokens": 4, "do_sample": False, "pad_token_id": 0}
    WAYS[way](away, tmp_path)
    produced, traces = [], []
    for each in (model, away):
        with mp.attach(each) as probe:
            warned = WARNED if each is away else nullcontext()
            with probe.recording(variables=("delta", "h", "out")) as recorder, warned:
                produced.append(each.generate(ids, **options))
            traces.append(recorder.dataset)
            with probe.edit(mp.ablate("gate"), mp.ablate("conv")):
                traces.append(probe.record(ids, variables=("out", "z")))
    assert torch.equal(model.generate(ids, **options), produced[0])
    assert torch.equal(*produced)
    for a, b in (traces[::2], traces[1::2]):
        assert a.drop_vars(a.data_vars).equals(b.drop_vars(b.data_vars))
        for name in a.data_vars:
            assert float(abs(a[name] - b[name]).max()) <= 2e-6 * float(abs(b[name]).max()), name


@pytest.mark.parametrize("family", ["mamba", "zamba", "mamba2", "falcon_h1"])
def test_hooks_put_on_and_taken_off_around_a_probe_leave_the_library(pair):
    model, away = pair
    ids = ids_of(7)
    native = run(model, ids)
    probe = mp.attach(away)
    accelerate.cpu_offload(away, execution_device=CPU)
    assert probe.attached
    assert probe.record(ids)["delta"].equals(mp.attach(model).record(ids)["delta"])
    twin = copy.deepcopy(away)
    assert torch.equal(run(twin, ids), native), "a copy is not probed"
    mp.detach(twin)
    mp.attach(twin).detach()
    accelerate.hooks.remove_hook_from_submodules(away)
    assert probe.attached
    probe.detach()
    assert not any(hasattr(module.forward, "tap") for module in away.modules())
    assert torch.equal(run(away, ids), native)
    with mp.attach(away) as again:  # accelerate leaves the library's own forward on each instance
        assert float(again.parity(ids)["out_vs_native"].max()) <= 2e-6


def test_what_is_not_brought_is_refused_and_never_computed_with(every_family):
    model = every_family["mamba"]()
    linear = torch.nn.Linear(2, 2, device="meta")
    with held(linear):
        assert linear.weight.is_meta, "no hook brings it"
    assert place(linear) == torch.device("meta")
    with pytest.raises(ValueError, match="layer 3: its scan was given tensors on the meta device"):
        refuse_absent(3, "scan", (torch.ones(1), None, linear.weight))
    twice = copy.deepcopy(model)
    accelerate.cpu_offload(model, execution_device=CPU, preload_module_classes=["MambaBlock"])
    with pytest.raises(
        ValueError, match=r"layer 0: A_log is on the meta device, and no hook .* preload_module_classes"
    ):
        mp.attach(model)
    accelerate.cpu_offload(twice, execution_device=CPU)
    with mp.attach(twice):
        conv = twice.backbone.layers[1].mixer.conv1d
        accelerate.hooks.remove_hook_from_module(conv)
        conv.to("meta")
        with pytest.raises(ValueError, match="layer 1: its convolution was given tensors on the meta device"):
            run(twice, ids_of(5))


def test_another_forward_of_its_own_is_refused(every_family):
    model = every_family["mamba2"]()
    mixer = model.backbone.layers[0].mixer
    mixer.forward = lambda *args, **kwargs: None
    for hooks in (False, True):  # plain, and inside accelerate's
        if hooks:
            accelerate.cpu_offload(model, execution_device=CPU)
        with pytest.raises(ValueError, match=r"layers.0.mixer already has a forward of its own: another tool"):
            mp.attach(model)


NAMED = ("auto", "balanced", "balanced_low_0", "sequential")


@pytest.mark.parametrize("places", [*NAMED, {"": "cpu"}, {"model": "cpu", "lm_head": "cpu"}])
def test_a_checkpoint_is_loaded_onto_a_map_and_probed(places, tmp_path, every_family):
    model, ids = every_family["jamba"](), ids_of(8)
    model.save_pretrained(tmp_path)
    loaded = mp.load(tmp_path, device_map=places)
    found = run(loaded, ids.to(place(loaded))).cpu()
    assert (found - run(model, ids)).abs().max() <= 2e-6 * found.abs().max()
    with mp.attach(loaded) as probe:
        assert float(probe.parity(ids)["out_vs_oracle"].max()) <= 2e-6
