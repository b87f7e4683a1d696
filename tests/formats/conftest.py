import inspect
import json
import warnings

import pytest
import torch
from safetensors.torch import save_file
from transformers import Mamba2Config, Mamba2ForCausalLM, MambaConfig, MambaForCausalLM
from transformers.models.mamba2.modeling_mamba2 import MambaRMSNormGated

from mamba_probe.formats.releases import KnownErrorWarning

SIZES = {"vocab_size": 24, "hidden_size": 16, "num_hidden_layers": 2, "state_size": 4}
MODELS = {
    "mamba": lambda **kw: MambaForCausalLM(MambaConfig(**{**SIZES, "time_step_rank": 3, **kw})),
    "mamba2": lambda **kw: Mamba2ForCausalLM(
        Mamba2Config(**{**SIZES, "num_heads": 8, "head_dim": 4, "n_groups": 2, "chunk_size": 8, **kw})
    ),
}
IDS = torch.arange(22).reshape(2, 11) % 24


def perturb(module):
    """Move every weight off its default, reproducibly: D = 1 or a zero bias would hide a lost tensor."""
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for weight in module.parameters():
            weight.add_(torch.randn(weight.shape, generator=generator) * 0.3)
    return module.eval()


def tiny(family, **config):
    return perturb(MODELS[family](**config))


def logits(model):
    with torch.no_grad():
        return model(IDS, use_cache=False).logits


def original_weights(model):
    """A transformers model's weights under the names of the original, the head always written."""
    weights = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    weights["backbone.embedding.weight"] = weights.pop("backbone.embeddings.weight")
    return weights


def write(folder, config, weights, file="pytorch_model.bin"):
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    if file.endswith(".bin"):
        torch.save(weights, folder / file)
    else:
        save_file({name: tensor.contiguous() for name, tensor in weights.items()}, folder / file)
    return folder


ORIGINAL = {
    "mamba": {"d_model": 16, "n_layer": 2, "vocab_size": 24, "ssm_cfg": {"d_state": 4, "dt_rank": 3}},
    "mamba2": {
        **{"d_model": 16, "n_layer": 2, "vocab_size": 24, "attn_layer_idx": [], "attn_cfg": {}, "d_intermediate": 0},
        "ssm_cfg": {"layer": "Mamba2", "d_state": 4, "headdim": 4, "ngroups": 2, "chunk_size": 8},
    },
}


NORMS_BY_GROUP = "group_size" in inspect.signature(MambaRMSNormGated).parameters  # transformers 5.23 and newer


@pytest.fixture(autouse=True)
def _older_releases_are_known_to_be_wrong():
    """There every model with two groups warns of it; test_releases.py tests that."""
    with warnings.catch_warnings():
        if not NORMS_BY_GROUP:
            warnings.simplefilter("ignore", KnownErrorWarning)
        yield


@pytest.fixture(params=["mamba", "mamba2"])
def family(request):
    return request.param


@pytest.fixture
def kit():
    """The helpers above, for test modules that cannot import them."""
    from types import SimpleNamespace

    return SimpleNamespace(
        tiny=tiny, perturb=perturb, logits=logits, original_weights=original_weights, write=write, ORIGINAL=ORIGINAL,
        NORMS_BY_GROUP=NORMS_BY_GROUP,
    )  # fmt: skip
