"""The independent oracle as a fixture; `oracle.py` is a plain module since the interpreted script imports it too."""

import sys
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from types import ModuleType

import pytest

collect_ignore_glob = ["interpreted*.py", "oracle.py", "resources*.py"]  # scripts and a module: no tests, no doctests


@pytest.fixture(scope="session")
def oracle() -> ModuleType:
    spec = spec_from_file_location("scan_oracle", Path(__file__).with_name("oracle.py"))
    assert spec is not None
    assert spec.loader is not None
    module = sys.modules["scan_oracle"] = module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
