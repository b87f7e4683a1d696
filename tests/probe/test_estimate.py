"""What a recording is said to weigh is what it weighs."""

import pytest
import torch
from typer.testing import CliRunner

import mamba_probe as mp
from mamba_probe import blocks, cli
from mamba_probe.trace.memory import readable
from mamba_probe.trace.schema import VARIABLES

BLOCKS = {
    "mamba": lambda: blocks.MambaBlock(12, d_inner=20, d_state=3),
    "mamba2": lambda: blocks.Mamba2Block(12, n_heads=4, n_groups=2, d_inner=24, d_state=5),
    "s4d": lambda: blocks.S4DBlock(12, d_inner=20, d_state=3),
}


@pytest.fixture(params=BLOCKS)
def model(request):
    torch.manual_seed(0)
    return blocks.LanguageModel([BLOCKS[request.param]() for _ in range(2)], vocab_size=11).eval()


@pytest.mark.parametrize("given", [{}, {"layers": [1], "tokens": [0, 1, 2], "channels": [1, 3]}])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_each_variable_weighs_what_is_said(model, given, dtype):
    ids = torch.randint(0, 11, (3, 17), generator=torch.Generator().manual_seed(1))
    with mp.attach(model.to(dtype)) as probe:
        family = next(iter(probe.groups)).split(":")[0]
        names = [name for name, variable in VARIABLES.items() if variable.dims(family)]
        said = probe.estimate(ids, variables=names, **given)
        trace = probe.record(ids, variables=names, **given)
    assert {name: trace[name].nbytes for name in names} == dict(said.variables)
    assert said.nbytes == sum(trace[name].nbytes for name in names)
    assert (said.layers, said.rows, said.tokens) == (len(trace.layer), 3, 17)
    assert readable(said.nbytes) in str(said)


def test_it_refuses_what_record_refuses(model):
    with mp.attach(model) as probe:
        with pytest.raises(ValueError, match="unknown variable 'detla': did you mean 'delta'"):
            probe.estimate(torch.zeros(1, 4, dtype=torch.int64), variables=["detla"])
        with pytest.raises(ValueError, match=r"token id 11 .* is out of range"):
            probe.estimate(torch.full((1, 4), 11))


@pytest.mark.parametrize(
    ("size", "said"), [(0, "0 B"), (999, "999 B"), (1000, "1 kB"), (999_600, "1 MB"), (1_234_567, "1.23 MB")]
)
def test_sizes_are_said_as_people_say_them(size, said):
    assert readable(size) == said


def test_inspect_tells_layers_sizes_and_weights(monkeypatch):
    monkeypatch.setattr(cli.out, "width", 160)
    result = CliRunner().invoke(cli.app, ["inspect", "zoo:trained-mqar-mamba2", "--length", "100"])
    assert result.exit_code == 0
    head = 4 * 100
    for expected in (
        "Probe attached to LanguageModel", "backbone.layers.0.mixer", "Mamba2Block", "mamba2: 4 heads of 32",
        "step size, after bias, softplus and limits", readable(4 * head), readable(4 * head * 32 * 32),
        "blocks.{layer}.hook_mixer_in", "blocks.{layer}.mixer.hook_A_bar",
    ):  # fmt: skip
        assert expected in result.stdout
