"""One self-contained HTML page: what the paper claims, and apart from it what we constructed and measured."""

import base64
import os
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path

import torch

from mamba_probe.provenance import versions
from mamba_probe.reproduce.claim import PAPER, Claim, Result
from mamba_probe.reproduce.table import AS_IT_MUST, FAILS, HOLDS, count, readable, sentence
from mamba_probe.reproduce.template import TEMPLATE

__all__ = ["write_page"]

MARKS = {HOLDS: "holds", AS_IT_MUST: "must", FAILS: "fails"}


def write_page(pairs: Sequence[tuple[Claim, Result]], directory: Path) -> Path:
    """Write DIRECTORY/index.html from results whose figures are there; it needs no other file."""
    from jinja2 import Environment, StrictUndefined

    sections = [
        {
            "claim": claim, "said": sentence(result.rows), "failed": count(result.rows)[FAILS],
            "tables": readable(result.rows), "png": _embedded(directory / f"{claim.name}.png"),
            "left_out": result.left_out, "says": result.says,
        }
        for claim, result in pairs
    ]  # fmt: skip
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    rows = [row for _, result in pairs for row in result.rows]
    page = environment.from_string(TEMPLATE).render(
        paper=PAPER, sections=sections, said=sentence(rows), marks=MARKS, provenance=_provenance(pairs)
    )
    path = directory / "index.html"
    partial = path.with_suffix(".partial")
    partial.write_text(page, encoding="utf-8")
    os.replace(partial, path)
    return path


def _embedded(png: Path) -> str:
    return "data:image/png;base64," + base64.b64encode(png.read_bytes()).decode()


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
