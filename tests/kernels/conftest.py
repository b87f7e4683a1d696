"""The independent oracle as a fixture; `oracle.py` is a plain module since the interpreted scripts import it too."""

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from types import ModuleType

import pytest
import torch

collect_ignore_glob = ["interpreted*.py", "oracle.py", "resources*.py"]  # scripts and a module: no tests, no doctests


@pytest.fixture(scope="session")
def oracle() -> ModuleType:
    spec = spec_from_file_location("scan_oracle", Path(__file__).with_name("oracle.py"))
    assert spec is not None
    assert spec.loader is not None
    module = sys.modules["scan_oracle"] = module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="session")
def script() -> Callable[..., list[str]]:
    """Runs a script of this folder in a fresh interpreter, in which Triton was not imported yet; answers its lines.

    TRITON_INTERPRET stays out of this process.
    """

    def run(name: str, *arguments: str, **environment: str) -> list[str]:
        clean = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
        command = [sys.executable, "-W", "ignore", Path(__file__).with_name(name), *arguments]
        done = subprocess.run(command, env=clean | environment, capture_output=True, text=True, timeout=590)
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout.splitlines()

    return run


@pytest.fixture
def cuda() -> Iterator[None]:
    """A CUDA device, where torch.empty answers NaN: an output that is not written shows. Without one a test fails."""
    assert torch.cuda.is_available(), "these tests need a CUDA device"
    torch.use_deterministic_algorithms(True, warn_only=True)
    assert torch.empty(4, device="cuda").isnan().all()
    yield
    torch.use_deterministic_algorithms(False)
    torch.cuda.empty_cache()
