"""Progress: a bar on a terminal, a line an evaluation elsewhere."""

import io

from rich.console import Console

from mamba_probe.training import progress, sweep, train


def test_lines_where_there_is_no_terminal(config):
    console = Console(file=io.StringIO(), width=200)
    with progress("recall", console) as say:
        result = train(config, say=say)
    lines = console.file.getvalue().splitlines()
    assert len(lines) == 4
    assert lines[-1].startswith(f"recall at 0.01, step 12 of 12: loss {result.last.loss:.3f}, accuracy ")


def test_a_bar_a_rate_on_a_terminal(config, tmp_path):
    console = Console(file=io.StringIO(), width=120, force_terminal=True)
    with progress("recall", console) as say:
        sweep(config, tmp_path, learning_rates=(1e-3, 1e-2), trial=3, say=say)
    shown = console.file.getvalue()
    assert "recall at 0.001" in shown
    assert "recall at 0.01" in shown
    assert "12/12" in shown
