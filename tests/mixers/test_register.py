"""A family of one's own: docs/adding-a-family.md, whose code runs here as it stands, and what `register` refuses."""

import re
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch
from torch import nn

import mamba_probe as mp
from mamba_probe import mixers
from mamba_probe.mixers import MixerAdapter, find_mixers, register

PAGE = Path(__file__).parents[2] / "docs" / "adding-a-family.md"


@pytest.fixture
def page(monkeypatch):
    """What the page's code leaves."""
    monkeypatch.setattr(mixers, "_REGISTERED", [])
    made = ModuleType("my_family")
    monkeypatch.setitem(sys.modules, "my_family", made)
    for block in re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.S):
        exec(compile(block, PAGE.name, "exec"), made.__dict__)
    return made


def test_the_page_is_a_family_in_under_sixty_lines(page, capsys):
    adapter = re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.S)[1]
    assert len(adapter.splitlines()) < 60
    probe = mp.attach(page.model)
    assert "mamba: 8 channels, state 4, no gate" in repr(probe)
    mp.detach(page.model)


def test_what_is_recorded_is_what_a_loop_of_float64_makes(page):
    for layer, mixer in enumerate(page.model):
        w = {name: tensor.detach().double() for name, tensor in mixer.state_dict().items()}
        u = page.hidden.double() if layer == 0 else page.model[0](page.hidden).detach().double()
        delta = torch.log1p(torch.exp(u @ w["step.weight"].T + w["step.bias"]))
        state = torch.zeros(2, 8, 4, dtype=torch.float64)
        for token in range(30):
            step = delta[:, token, :, None]
            write = (u[:, token] @ w["write.weight"].T)[:, None]
            state = torch.exp(-step * torch.exp(w["log_rate"])) * state + step * write * u[:, token, :, None]
            found = torch.from_numpy(page.trace["h"].sel(layer=layer, token=token).values)
            assert (found - state).abs().max() < 1e-5
        named = torch.from_numpy(page.trace["delta"].sel(layer=layer).values)
        assert (named - delta).abs().max() < 1e-5


def test_a_subclass_of_the_mixer_is_not_read_as_it(page):
    class Other(page.ToyMixer):
        pass

    with pytest.raises(ValueError, match=r"no state-space layer to probe.*ToyMixer of my_family"):
        find_mixers(Other(4, 2))


def test_registered_again_the_newer_one_counts(page):
    newer = type("Newer", (page.ToyAdapter,), {})
    assert register(newer) is newer
    assert [type(adapter) for adapter in find_mixers(page.model)] == [newer, newer]


def test_what_is_no_adapter_is_refused():
    with pytest.raises(ValueError, match=r"a subclass of mamba_probe.mixers.MixerAdapter; got .*Linear"):
        register(nn.Linear)  # pyright: ignore
    with pytest.raises(ValueError, match=r"a subclass of .*; got 3"):
        register(3)  # pyright: ignore
    half = type("Half", (MixerAdapter,), {"family": "mamba", "weights": lambda self: {}})
    with pytest.raises(ValueError, match=r"^Half leaves open what every adapter has: class_path, oracle, replacements"):
        register(half)


def faulty(page, monkeypatch, **members):
    """The page's model, with an adapter that says something else."""
    monkeypatch.setattr(mixers, "_REGISTERED", [])
    register(type("Faulty", (page.ToyAdapter,), members))
    return page.model


@pytest.mark.parametrize(
    "wrong", [lambda rate: -rate.abs(), lambda rate: torch.exp(rate), lambda rate: -torch.exp(rate)[:4]]
)
def test_an_A_that_is_not_the_scans_is_refused(page, monkeypatch, wrong):
    """No output shows it: A of the trace is read from the weights, the scan is given another."""
    model = faulty(page, monkeypatch, statics=lambda self: {"A": (("channel", "state"), wrong(self.mixer.log_rate))})
    with mp.attach(model) as probe, pytest.raises(ValueError, match=r"A of layer 0: Faulty.statics\(\) says another"):
        probe.parity(page.hidden)


def test_a_forward_with_another_argument_is_refused(page, monkeypatch):
    with pytest.raises(ValueError, match=r"ToyMixer.forward has no argument 'u', .* it has hidden_states: set `takes`"):
        mp.attach(faulty(page, monkeypatch, takes="u"))


def test_a_scan_that_is_reached_in_another_way_is_said_to_be(page, monkeypatch):
    with pytest.raises(ValueError, match="does not call a function other_scan by its plain name"):
        mp.attach(faulty(page, monkeypatch, replacements=lambda *_: {"other_scan": None}))
    model = faulty(page, monkeypatch, replacements=lambda *_: {"toy_scan": page.toy_scan})
    with mp.attach(model) as probe:
        for call in (probe.parity, probe.record):
            with pytest.raises(ValueError, match=r"layer 0: ToyMixer.forward ran without tap.scan"):
                call(page.hidden)


def test_a_gate_that_the_scan_has_not_is_not_ablated_in_silence(page):
    never = pytest.raises(ValueError, match=r"ablate\(gate\) never acted")
    with mp.attach(page.model) as probe, never, probe.edit(mp.ablate("gate")):
        page.model(page.hidden)
