"""The page's example runs as it stands."""

import re
from pathlib import Path

import mamba_probe as mp

PAGE = Path(__file__).parents[2] / "docs" / "training.md"


def test_the_example_of_the_page(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (block,) = re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.S)
    names = {}
    exec(compile(block, PAGE.name, "exec"), names)
    best, *counted = capsys.readouterr().out.replace("(", "").replace(")", "").replace(",", "").split()
    assert float(best) in (3e-3, 1e-2)
    correct, total = map(int, counted)
    assert correct / total > 0.5
    assert names["card"]["accuracy"]["total"] == 16 * 16 * 2
    assert type(mp.load("small")).__name__ == "LanguageModel"
