"""Makes the modules here importable by each other, and keeps pictures off screens."""

import sys
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path

import matplotlib
import pytest

STANDING_BY = ("harness", "scan_cases", "checkpoint_cases", "probe_cases", "trace_cases", "call_cases", "provoked")


@pytest.fixture(autouse=True)
def _no_screen():
    matplotlib.use("agg")


for _name in STANDING_BY:
    _spec = spec_from_file_location(_name, Path(__file__).parent / f"{_name}.py")
    assert _spec is not None
    assert _spec.loader is not None
    _module = sys.modules[_name] = module_from_spec(_spec)
    _spec.loader.exec_module(_module)
