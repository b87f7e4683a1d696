"""What every construction shares: saving, the randomised twin, a global seed left alone."""

import json

import pytest
import torch
from safetensors.torch import load_file

import mamba_probe as mp
from mamba_probe.constructions import haar, induction, keep_nth, mqar, mqar_gated, window_sums

BUILDERS = {
    "haar": lambda **more: haar(length=16, levels=2, **more),
    "haar, mamba2": lambda **more: haar(length=16, levels=2, variant="ramps", mixer="mamba2", **more),
    "window_sums": lambda **more: window_sums(length=15, windows=3, **more),
    "keep_nth": lambda **more: keep_nth(n_tokens=4, length=16, n=3, **more),
    "keep_nth, mamba2": lambda **more: keep_nth(n_tokens=4, length=16, n=3, mixer="mamba2", **more),
    "mqar": lambda **more: mqar(n_keys=8, n_values=8, **more),
    "mqar, mamba2": lambda **more: mqar("mamba2", n_keys=8, n_values=8, key_code="constant-weight", **more),
    "mqar, overwrite": lambda **more: mqar(n_keys=8, n_values=8, writes="overwrite", **more),
    "mqar, random": lambda **more: mqar(n_keys=8, n_values=8, key_code="random", bits=(6, 5), seed=0, **more),
    "mqar, s4d": lambda **more: mqar("s4d", n_keys=8, n_values=8, **more),
    "mqar_gated": lambda **more: mqar_gated(n_keys=8, n_values=8, n_pairs=2, length=16, **more),
    "induction": lambda **more: induction(n_tokens=5, **more),
    "induction, special": lambda **more: induction("special", n_tokens=5, **more),
    "induction, special, mamba2": lambda **more: induction("special", "mamba2", n_tokens=5, **more),
    "induction, mamba2": lambda **more: induction("every", "mamba2", n_tokens=5, **more),
    "induction, s4d": lambda **more: induction("every", "s4d", n_tokens=5, **more),
}
OURS = ["haar, mamba2", "mqar, s4d", "induction, s4d"]  # blocks that transformers lacks
LANGUAGE = [name for name in BUILDERS if name.startswith(("mqar", "induction")) and name not in ("mqar_gated", *OURS)]


@pytest.fixture(params=BUILDERS)
def build(request):
    return BUILDERS[request.param]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_save_writes_the_weights_and_their_config(build, dtype, tmp_path):
    construction = build(dtype=dtype)
    construction.save(tmp_path / "new")
    config = json.loads((tmp_path / "new" / "config.json").read_text())
    if config["model_type"] == "mamba_probe":
        assert type(construction.model).__module__ == "mamba_probe.blocks"
    else:
        assert config["architectures"] == [type(construction.model).__name__]
        assert config["dtype"] == str(dtype).removeprefix("torch.")
    assert "transformers_version" not in config
    saved = load_file(tmp_path / "new" / "model.safetensors")
    own = construction.model.state_dict()
    assert saved.keys() == own.keys()
    for name, weight in saved.items():
        assert weight.dtype == dtype
        assert torch.equal(weight, own[name])


def test_bare_mixers_save_their_own_names(tmp_path):
    BUILDERS["haar"]().save(tmp_path)
    assert {"A_log", "D", "conv1d.weight", "dt_proj.bias"} <= load_file(tmp_path / "model.safetensors").keys()


@pytest.mark.parametrize("name", LANGUAGE)
def test_transformers_reads_the_saved_language_model(name, tmp_path):
    construction = BUILDERS[name]()
    model, info = type(construction.model).from_pretrained(construction.save(tmp_path), output_loading_info=True)
    assert not any(info.values())
    ids = torch.arange(16)[None] % construction.model.config.vocab_size
    with torch.no_grad():
        assert torch.equal(model(ids).logits, construction.model(ids).logits)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_load_reads_the_directory(build, dtype, tmp_path):
    construction = build(dtype=dtype)
    loaded = mp.load(construction.save(tmp_path), dtype=dtype)
    assert type(loaded) is type(construction.model)
    own = construction.model.state_dict()
    assert loaded.state_dict().keys() == own.keys()
    assert all(torch.equal(weight, own[name]) for name, weight in loaded.state_dict().items())


def test_save_overwrites_only_when_told(tmp_path):
    construction = BUILDERS["haar"]()
    construction.save(tmp_path)
    with pytest.raises(ValueError, match=r"holds config.json and model.safetensors: .*overwrite=True"):
        construction.save(tmp_path)
    construction.randomised(0).save(tmp_path, overwrite=True)
    assert (load_file(tmp_path / "model.safetensors")["D"] != 0).all()


def test_weights_do_not_depend_on_the_global_seed_nor_move_it(build):
    torch.manual_seed(1)
    first = build().model.state_dict()
    after = torch.rand(1)
    torch.manual_seed(1)
    assert torch.equal(after, torch.rand(1))
    torch.manual_seed(2)
    assert all(torch.equal(weight, first[name]) for name, weight in build().model.state_dict().items())


def test_skip_connection_is_off_and_model_in_eval_mode(build):
    construction = build()
    assert not construction.model.training
    skips = [value for name, value in construction.model.state_dict().items() if name.rpartition(".")[2] == "D"]
    shifts = construction.sizes.get("layer") == 2  # the previous token goes past the first state
    assert [bool(skip.any()) for skip in skips] == ([True, False] if shifts else [False])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_randomised_twin_has_the_sizes_and_other_weights(build, dtype):
    construction = build(dtype=dtype)
    twin, again, other = (construction.randomised(seed) for seed in (3, 3, 4))
    assert type(twin.model) is type(construction.model)
    assert twin.bound is None
    own = construction.model.state_dict()
    for name, weight in twin.model.state_dict().items():
        assert weight.shape == own[name].shape
        assert weight.dtype == dtype
        assert torch.equal(weight, again.model.state_dict()[name])
        assert not torch.equal(weight, other.model.state_dict()[name])
        assert (weight != own[name]).all()
    assert "randomised(seed=3)" in repr(twin)


def test_channels_are_one_label_each(build):
    sizes = build().sizes
    assert len(build().channels) == sizes.get("layer", 1) * sizes["channel"]


def test_states_and_signatures_are_told(build):
    construction, text = build(), build().describe()
    assert construction.states
    assert construction.signatures
    assert "\nstates: " in text
    assert all(f"{name} {value:.4g}" in text for name, value in construction.signatures.items())
    assert not construction.randomised(0).signatures


def test_describe_says_size_claim_and_bound():
    text = keep_nth(n_tokens=4, length=16, n=3).describe()
    assert "model=6, channel=6, state=1" in text
    assert "error bound: 5.1e-14" in text
    assert "4 x token, 1 x position, 1 x one" in text
    assert "error bound: none" in haar(16, 2).randomised(0).describe()
