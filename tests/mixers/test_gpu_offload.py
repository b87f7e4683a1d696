"""On a GPU: a model of which accelerate keeps a part elsewhere is probed as the whole one."""

import pytest
import torch

import mamba_probe as mp

pytestmark = [
    pytest.mark.gpu,
    # what older transformers get wrong they get wrong here and there alike
    pytest.mark.filterwarnings("ignore::mamba_probe.formats.releases.KnownErrorWarning"),
]
VARIABLES = ("delta", "A", "B", "C", "h", "z", "out")


def halved(model):
    """Every other layer on the CPU, the rest on the GPU."""
    core = model.base_model_prefix
    parts = [name for name, _ in getattr(model, core).named_children()]
    layers = range(len(getattr(model, core).layers))
    places = {f"{core}.{name}": 0 for name in parts if name != "layers"} | {"lm_head": 0}
    return places | {f"{core}.layers.{number}": "cpu" if number % 2 else 0 for number in layers}


@pytest.mark.parametrize("family", ["mamba", "mamba2", "jamba", "falcon_h1"])
@pytest.mark.parametrize("where", ["auto", "halved"])
def test_an_offloaded_model_is_probed_as_the_whole_one(family, where, every_family, tmp_path):
    model = every_family[family]()
    model.save_pretrained(tmp_path)
    away = mp.load(str(tmp_path), device_map=halved(model) if where == "halved" else where)
    whole = mp.load(str(tmp_path), device="cuda")
    assert any(parameter.is_meta for parameter in away.parameters()) == (where == "halved")
    ids = torch.randint(1, 61, (2, 33), generator=torch.Generator().manual_seed(2)).cuda()
    options = {"max_new_tokens": 4, "min_new_tokens": 4, "do_sample": False, "pad_token_id": 0}
    native, text = whole(ids).logits, whole.generate(ids, **options)
    traces = []
    for each in (whole, away):
        with mp.attach(each) as probe:
            assert probe.backend == "triton"
            assert (each(ids).logits - native).abs().max() <= 1e-5 * native.abs().max()
            assert torch.equal(each.generate(ids, **options), text)
            traces.append(probe.record(ids, variables=VARIABLES))
            assert float(probe.parity(ids)["out_vs_native"].max()) <= 2e-6
            with probe.edit(mp.ablate("gate"), mp.zero("B", token=5)):
                traces.append(probe.record(ids, variables=VARIABLES))
    assert traces[0].attrs["model_hash"] == traces[2].attrs["model_hash"]
    for one, other in (traces[::2], traces[1::2]):
        for name in VARIABLES:
            assert float(abs(one[name] - other[name]).max()) <= 2e-6 * float(abs(one[name]).max()), name
