"""The Triton kernel without a GPU: small constructions through its interpreter."""

import os
import subprocess
import sys
from pathlib import Path

import pytest


@pytest.mark.parametrize(("given", "cases"), [([], 4), pytest.param(["all"], 8, marks=pytest.mark.long)])
def test_the_interpreted_kernel_holds_the_tolerances(given, cases):
    script = Path(__file__).with_name("interpreted.py")
    environment = os.environ | {"TRITON_INTERPRET": "1", "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        [sys.executable, script, *given], env=environment, capture_output=True, text=True, timeout=240
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert len(done.stdout.splitlines()) == cases
