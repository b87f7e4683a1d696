"""Every code block of the documentation runs as it stands, or says why not."""

import re
import sys
from pathlib import Path

import pytest
import shell
from pages import PAGES, ROOT, blocks, is_long
from running import NO_CODE, PYTHON, SHELL, run


def page_of(path):
    marks = [pytest.mark.long] if is_long(path.read_text()) else []
    return pytest.param(path, id=str(path.relative_to(ROOT)), marks=marks)


@pytest.fixture
def run_page(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)

    def swap(name, module):
        monkeypatch.setitem(sys.modules, name, module)

    return lambda page: run(page, tmp_path, lambda: capsys.readouterr().out, swap)


@pytest.mark.parametrize("page", [page_of(page) for page in PAGES if blocks(page.read_text())])
def test_the_page_runs(page, run_page):
    run_page(page)


@pytest.mark.parametrize("page", [pytest.param(page, id=str(page.relative_to(ROOT))) for page in PAGES])
def test_no_block_is_left_out(page):
    """Every fence is a block that has a rule, or a marker with a reason."""
    text = page.read_text()
    found = [block for block in blocks(text) if block.language != "check"]
    assert 2 * len(found) == len(re.findall(r"^\s*(?:```|~~~)", text, re.M)), "a fence that the parser does not see"
    for block in found:
        ruled = block.language in (*PYTHON, *SHELL, *NO_CODE, "text")
        assert ruled or block.marker, f"line {block.line}: neither run nor marked"
        assert bool(block.marker) == bool(block.reason)


def test_all_pages_are_there():
    assert len(PAGES) > 30
    assert all(page.is_file() for page in PAGES)


def test_the_readme_needs_few_lines():
    (block,) = (block for block in blocks((ROOT / "README.md").read_text()) if block.language == "python")
    assert len([line for line in block.code.splitlines() if line.strip()]) <= 12


def test_the_ci_runs_what_the_readme_says():
    assert "make test" in (ROOT / ".ci/run").read_text()


@pytest.mark.parametrize(
    ("text", "error"),
    [
        ("```python\n1 / 0\n```", ZeroDivisionError),
        ("<!-- not run: a reason -->\n```python\n1 +\n```", SyntaxError),
        ("```python\nx = 1\n```\n\n<!-- check\nassert x == 2\n-->", AssertionError),
        ("```python\nprint(1)\n```\n\n```text\n2\n```", "the page says"),
        ("<!-- not run: a reason -->\n```python\nprint(1)\n```\n\n```text\n1\n```", "did not run"),
        ("```json\n{}\n```", "neither run"),
        ("```python\nimport warnings\nwarnings.warn('deprecated')\n```", UserWarning),
        ("```sh\nmake nothing\n```", "no such target"),
        ("```sh\nmamba-probe nothing\n```", "no command"),
        ("```sh\nmamba-probe zoo --nothing\n```", Exception),
        ("<!-- not run: a reason -->\n```sh\nmamba-probe report M --nothing 1 -o out\n```", Exception),
        ("```sh\nmamba-probe inspect nowhere\n```", "exit code 2"),
        ("```sh\ntorchrun --nproc-per-node 8 examples/nothing.py\n```", "no such file"),
        ("```sh\ntorchrun --nothing 8 examples/haar.py\n```", SystemExit),
        ('```sh\npip install "mamba-probe[nothing]"\n```', "no extra"),
        ("```sh\nfrobnicate\n```", "no check"),
        ("<!-- not run -->\n```sh\nmake test\n```", "is no marker"),
        ("<!-- not run: a reason -->\ntext\n", "marks no block"),
        ("<!-- run by tests/docs/pages.py: a reason -->\n```python\nx\n```", "does not name the page"),
    ],
)
def test_what_is_wrong_fails(text, error, tmp_path, run_page):
    page = tmp_path / "a-planted-fault.md"
    page.write_text(text)
    kind, said = (ValueError, error) if isinstance(error, str) else (error, "")
    with pytest.raises(kind, match=said or None):
        run_page(page)


def test_what_is_right_passes(tmp_path, run_page):
    page = tmp_path / "page.md"
    page.write_text(
        "```python\nx = 1.25\nprint(x)\n```\n\n```text\n1.2...\n```\n\n"
        "- a list\n\n  ```python\n  print(x + 1)\n  ```\n\n  ```text\n  2.25\n  ```\n\n<!-- check\nassert x\n-->\n\n"
        "```sh\nA=1 make test && cd here  # and so on\n$ .venv/bin/python examples/haar.py\n```\n"
    )
    run_page(page)
    assert (tmp_path / "page.py").read_text().splitlines()[1:3] == ["x = 1.25", "print(x)"]


def test_commands_are_told_apart():
    found = shell.commands("# a comment\nmake a && X=1 make b \\\n  c  # why\n\nmamba-probe zoo")
    assert found == [["make", "a"], ["make", "b", "c"], ["mamba-probe", "zoo"]]
    assert Path(shell.__file__).parent == Path(__file__).parent
