"""What the analyses share: one canonical form of a trace, intervals, labelled results and a palette."""

from mamba_probe.analyses.common.attention import attention_row
from mamba_probe.analyses.common.bootstrap import interval, resamples
from mamba_probe.analyses.common.canonical import Canonical, Row
from mamba_probe.analyses.common.lazy import by_layer, read, stacked
from mamba_probe.analyses.common.result import described, refuse
from mamba_probe.analyses.common.runs import runs
from mamba_probe.analyses.common.selection import Selection

__all__ = [
    "Canonical", "Row", "Selection", "attention_row", "by_layer", "described", "interval", "read", "refuse",
    "resamples", "runs", "stacked",
]  # fmt: skip
