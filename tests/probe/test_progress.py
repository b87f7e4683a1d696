"""The bar of long work: on a terminal, and nowhere else but in a notebook; no name in it steers the terminal."""

import sys

import pytest
import torch

import mamba_probe as mp
from mamba_probe.progress import bar


def on_a_terminal(monkeypatch, yes=True):
    """To be called within a test: pytest has another stderr while it sets one up."""
    monkeypatch.setattr(sys.stderr, "isatty", lambda: yes, raising=False)


def test_a_terminal_shows_each_step_and_the_count(capsys, monkeypatch):
    on_a_terminal(monkeypatch)
    with bar("recording", 2, shown=True) as step:
        step("rows 0 to 7 \x1b[31m\u202e")
        step("")
        step("")
    said = capsys.readouterr()
    assert said.out == ""
    assert "recording:   0%" in said.err
    assert "rows 0 to 7 \\x1b[31m\\u202e" in said.err
    assert "2/2 [" in said.err
    assert "\u202e" not in said.err
    assert "\x1b[31m" not in said.err


@pytest.mark.parametrize("is_terminal", [False, True])
def test_nothing_is_said_unasked_or_where_nobody_looks(is_terminal, capsys, monkeypatch):
    on_a_terminal(monkeypatch, is_terminal)
    with bar("recording", 2, shown=not is_terminal) as step:
        step("rows")
        step("")
    assert capsys.readouterr() == ("", "")


def test_of_an_unknown_number_the_count_is_shown(capsys, monkeypatch):
    on_a_terminal(monkeypatch)
    with bar("reading", None, shown=True) as step:
        for _ in range(3):
            step("")
    assert "3it [" in capsys.readouterr().err


def test_a_recording_has_a_bar_of_its_calls(model, capsys, monkeypatch):
    on_a_terminal(monkeypatch)
    with mp.attach(model) as probe:
        probe.record(torch.arange(24).reshape(4, 6), batch_size=2, progress=True)
        assert "2/2 [" in capsys.readouterr().err
        probe.record(torch.arange(24).reshape(4, 6), batch_size=2)
    assert capsys.readouterr() == ("", "")
