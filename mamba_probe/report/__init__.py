"""From a recorded run to results, pictures and one self-contained page."""

from mamba_probe.report.analysing import ANALYSES, analyse, analyse_beside
from mamba_probe.report.beside import load_beside, named
from mamba_probe.report.figures import draw
from mamba_probe.report.findings import Finding, Row, finding
from mamba_probe.report.page import write_report

__all__ = [
    "ANALYSES",
    "Finding",
    "Row",
    "analyse",
    "analyse_beside",
    "draw",
    "finding",
    "load_beside",
    "named",
    "write_report",
]
