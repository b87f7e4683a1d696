"""From a recorded run to results, pictures and one self-contained page."""

from mamba_probe.reference import load_beside, named
from mamba_probe.report.analysing import MAIN, analyse, analyse_beside, measurable
from mamba_probe.report.comparing import caution, differences, draw_comparison, labelled
from mamba_probe.report.figures import draw
from mamba_probe.report.findings import Finding, finding
from mamba_probe.report.page import write_report

__all__ = [
    "MAIN",
    "Finding",
    "analyse",
    "analyse_beside",
    "caution",
    "differences",
    "draw",
    "draw_comparison",
    "finding",
    "labelled",
    "load_beside",
    "measurable",
    "named",
    "write_report",
]
