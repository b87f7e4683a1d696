"""One self-contained HTML page: what the paper claims, and apart from it what we constructed and measured."""

from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path

import torch

from mamba_probe.pages import embedded
from mamba_probe.pages import write_page as write
from mamba_probe.provenance import versions
from mamba_probe.reproduce.claim import PAPER, Claim, Result
from mamba_probe.reproduce.table import AS_IT_MUST, FAILS, HOLDS, count, readable, sentence
from mamba_probe.reproduce.template import TEMPLATE

__all__ = ["write_page"]

MARKS = {HOLDS: "holds", AS_IT_MUST: "must", FAILS: "fails"}


def write_page(pairs: Sequence[tuple[Claim, Result]], directory: Path) -> Path:
    """Write DIRECTORY/index.html from results whose figures are there; it needs no other file."""
    sections = [
        {
            "claim": claim, "said": sentence(result.rows), "failed": count(result.rows)[FAILS],
            "tables": readable(result.rows), "png": embedded(directory / f"{claim.name}.png"),
            "left_out": result.left_out, "says": result.says,
        }
        for claim, result in pairs
    ]  # fmt: skip
    rows = [row for _, result in pairs for row in result.rows]
    return write(
        directory / "index.html", TEMPLATE, paper=PAPER, sections=sections, said=sentence(rows), marks=MARKS,
        provenance=_provenance(pairs),
    )  # fmt: skip


def _provenance(pairs: Sequence[tuple[Claim, Result]]) -> list[tuple[str, str]]:
    """What the numbers depend on."""
    dtypes = sorted({row.dtype for _, result in pairs for row in result.rows})
    seeds = sorted({result.seed for _, result in pairs})
    seconds = ", ".join(f"{claim.name} {result.seconds:.0f}" for claim, result in pairs)
    return [
        ("versions", ", ".join(f"{name} {found}" for name, found in versions().items())),
        ("seed", f"{', '.join(map(str, seeds))} of every draw; the twins' is one more"),
        ("dtype", f"{', '.join(dtypes)}, as each row says"),
        ("device", f"cpu, {torch.get_num_threads()} threads"),
        ("seconds", f"{seconds} (measurements, figures left out)"),
        ("created at", datetime.now(UTC).isoformat(timespec="seconds")),
    ]
