"""Running a page: its blocks in their order, in one namespace, in an empty folder."""

import doctest
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import shell
from pages import ROOT, Block, blocks

__all__ = ["run"]

SHELL = ("sh", "console")
PYTHON = ("python", "check")
NO_CODE = ("mermaid", "bibtex")


def run(page: Path, folder: Path, printed: Callable[[], str], swap: Callable[[str, ModuleType], None]) -> None:
    """Run the blocks of `page` as one script that stands in `folder`, the working directory.

    Args:
        page: a Markdown file.
        folder: where the script is written, each line of code in the page's own place.
        printed: what was printed since it was last called.
        swap: puts a module into sys.modules by its name, until the test ends.

    Raises:
        ValueError: a block has no rule here and no marker, does not print what the page says, or names what is not
            there. What a block raises comes as it is.
    """
    found = blocks(page.read_text())
    script = folder / f"{page.stem}.py".replace("-", "_")
    script.write_text(_as_script(found))
    module = ModuleType("__main__")
    module.__file__ = str(script)
    swap("__main__", module)
    printed()
    shown: str | None = None
    for block in found:
        if block.language == "text" and not block.marker:
            _compare(page, block, shown)
        elif block.language == "check":
            _run_python(block, script, module, printed)
        elif block.language == "python":
            shown = _run_python(block, script, module, printed)
        elif block.language in SHELL:
            shown = _run_shell(block)
        elif block.language not in NO_CODE and not block.marker:
            raise ValueError(f"{page.name}:{block.line}: a block of {block.language or 'no language'!r} is neither run")
    if "matplotlib.pyplot" in sys.modules:
        sys.modules["matplotlib.pyplot"].close("all")


def _as_script(found: list[Block]) -> str:
    lines: list[str] = []
    for block in found:
        if block.language in PYTHON and not block.marker:
            lines += [""] * (block.line - 1 - len(lines)) + block.code.splitlines()
    return "\n".join(lines) + "\n"


def _run_python(block: Block, script: Path, module: ModuleType, printed: Callable[[], str]) -> str | None:
    code = compile("\n" * (block.line - 1) + block.code, str(script), "exec")
    if block.marker.startswith("run by "):
        test = ROOT / block.marker.removeprefix("run by ")
        if not test.exists() or f"{script.stem.replace('_', '-')}.md" not in test.read_text().replace("_", "-"):
            raise ValueError(f"line {block.line}: {test} is not there, or does not name the page")
    if block.marker:
        return None
    exec(code, vars(module))
    return printed()


def _run_shell(block: Block) -> str | None:
    words = shell.commands(block.code)
    for each in words:
        shell.check(each)
    return None if block.marker else "".join(shell.run(each) for each in words)


def _compare(page: Path, block: Block, shown: str | None) -> None:
    if shown is None:
        raise ValueError(f"{page.name}:{block.line}: output of a block that did not run")
    clean, said = (
        "\n".join(line.rstrip() for line in text.strip().splitlines()) + "\n" for text in (shown, block.code)
    )
    if not doctest.OutputChecker().check_output(said, clean, doctest.ELLIPSIS):
        raise ValueError(f"{page.name}:{block.line}: the page says\n{said}and what was printed is\n{clean}")


def _bare(text: str) -> str:
    """Without blank lines around and blanks at the ends of lines."""
    return "\n".join(line.rstrip() for line in text.strip().splitlines()) + "\n"
