"""Every example runs offline and draws its picture; those of the gallery are short and ask a question."""

import re
import subprocess
import sys
from importlib import import_module
from pathlib import Path

import pytest

FOLDER = Path(__file__).parents[2] / "examples"
EXAMPLES = sorted(FOLDER.glob("*.py"))
NO_PICTURE = {"record_many_gpus"}
SHORT = {"memory_horizon"}
"""Run by `make test`; all run under long, and the docs build runs those that draw."""
LINES = 50
"""Of a script of the gallery that are not blank."""


@pytest.mark.parametrize(
    "script",
    [pytest.param(each, id=each.stem, marks=[pytest.mark.long] * (each.stem not in SHORT)) for each in EXAMPLES],
)
def test_example(script, tmp_path):
    done = subprocess.run([sys.executable, script], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip()
    drawn = sorted(path.stem for path in tmp_path.glob("*.png"))
    assert script.stem in drawn or script.stem in NO_PICTURE, drawn
    assert all((tmp_path / f"{name}.png").stat().st_size > 10_000 for name in drawn)


def test_the_list_has_every_script():
    listed = re.findall(r"^\| \[(\w+)\.py\]\(\1\.py\) \| \S.*\? .*\|$", (FOLDER / "README.md").read_text(), re.M)
    assert sorted(listed) == [script.stem for script in EXAMPLES]


def test_the_gallery_has_every_script_that_draws_soon(monkeypatch):
    monkeypatch.syspath_prepend(str(FOLDER.parent / "docs/_extensions"))
    titles = import_module("gallery").drawn(FOLDER)
    assert {script.stem for script in EXAMPLES} - set(titles) == NO_PICTURE | {"train_recall"}
    assert len(set(titles.values())) == len(titles)
    analyses = {path.parent.name for path in (FOLDER.parent / "analyses").glob("*/plot.py")} - {"comparison"}
    for name in [*analyses, "patching", "compare"]:
        script = FOLDER / f"{'haar' if name == 'wavelet_alignment' else name}.py"
        assert f"{name}.plot(" in script.read_text() or name == "compare", name
    for name in titles:
        head, _, code = (FOLDER / f"{name}.py").read_text().partition('\n"""\n\n')
        question, how = head.split("\n\n")[1:3]
        assert question.strip().endswith("?"), name
        assert len(how) > 120, f"{name}: how its picture is read"
        assert len([line for line in code.splitlines() if line.strip()]) <= LINES, name
