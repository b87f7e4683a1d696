"""Progress: a bar on a terminal, a line an evaluation elsewhere."""

import sys

from mamba_probe.training import progress, sweep, train


def test_lines_where_there_is_no_terminal(config, capsys):
    with progress("recall") as say:
        result = train(config, say=say)
    said = capsys.readouterr()
    assert said.out == ""
    lines = said.err.splitlines()
    assert len(lines) == 4
    assert lines[-1].startswith(f"recall at 0.01, step 12 of 12: loss {result.last.loss:.3f}, accuracy ")


def test_a_bar_a_rate_on_a_terminal(config, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    with progress("recall") as say:
        sweep(config, tmp_path, learning_rates=(1e-3, 1e-2), trial=3, say=say)
    said = capsys.readouterr()
    assert said.out == ""
    assert "recall at 0.001: " in said.err
    assert "recall at 0.01: " in said.err
    assert "12/12" in said.err
    assert "loss " in said.err
