"""The help of every command, as the command line prints it."""

from typing import Any

from docutils import nodes
from sphinx.util.docutils import SphinxDirective

__all__ = ["CommandLine", "setup"]


class CommandLine(SphinxDirective):
    """A section for each command of mamba-probe."""

    def run(self) -> list[nodes.Node]:
        """Ask the program itself."""
        from typer.main import get_command

        from mamba_probe.cli import app

        commands: Any = get_command(app)
        return [self._section(name) for name in ("", *commands.commands)]

    def _section(self, name: str) -> nodes.section:
        from typer.testing import CliRunner

        from mamba_probe.cli import app

        said = CliRunner().invoke(app, [*name.split(), "--help"], env={"TERMINAL_WIDTH": "100", "NO_COLOR": "1"})
        if said.exit_code:
            raise self.error(f"mamba-probe {name} --help: {said.output}")
        title = f"mamba-probe {name}".strip()
        section = nodes.section(ids=[nodes.make_id(title)])
        section += nodes.title("", title)
        section += nodes.literal_block("", said.output.strip("\n"), language="text")
        return section


def setup(app: Any) -> dict[str, bool]:
    """Register the directive."""
    app.add_directive("command-line", CommandLine)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
