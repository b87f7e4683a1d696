"""The code of docs/streaming.md runs as it stands."""

import re
from pathlib import Path

PAGE = Path(__file__).parents[2] / "docs" / "streaming.md"


def test_the_page_runs(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    names: dict[str, object] = {}
    blocks = re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.S)
    assert len(blocks) == 2
    for block in blocks:
        exec(compile(block, "streaming.md", "exec"), names)
    assert "layer 0, batch 2 to 3, token 0 to 63" in capsys.readouterr().out
