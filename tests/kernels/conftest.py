"""Modules that scripts of this folder import too, as fixtures; and a CUDA device."""

import sys
from collections.abc import Iterator
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from types import ModuleType

import pytest
import torch

collect_ignore_glob = ["finite_*.py", "gradients.py", "interpreted*.py", "oracle.py", "resources*.py", "stress.py"]
"""Scripts and their modules: no tests, no doctests."""


def load(name: str) -> ModuleType:
    """A module of this folder, by the name that scripts import it by."""
    spec = spec_from_file_location(name, Path(__file__).with_name(f"{name}.py"))
    assert spec is not None
    assert spec.loader is not None
    module = sys.modules[name] = module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="session")
def oracle() -> ModuleType:
    """The scan in closed form, independent of ours."""
    return load("oracle")


@pytest.fixture(scope="session")
def stress() -> ModuleType:
    """Scans at the ends of float32, and what they answer."""
    return load("stress")


@pytest.fixture(scope="session")
def gradients(oracle: ModuleType) -> ModuleType:
    """Gradients of a kernel's own backward against autograd; it imports `oracle`, and Triton."""
    return load("gradients")


@pytest.fixture
def cuda() -> Iterator[None]:
    """A CUDA device, where torch.empty answers NaN: an output that is not written shows. Without one a test fails."""
    assert torch.cuda.is_available(), "these tests need a CUDA device"
    torch.use_deterministic_algorithms(True, warn_only=True)
    assert torch.empty(4, device="cuda").isnan().all()
    yield
    torch.use_deterministic_algorithms(False)
    torch.cuda.empty_cache()
