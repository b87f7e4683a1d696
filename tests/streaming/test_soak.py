"""The soak, which `soak.py` runs by itself: 2,000 prompts through kills every few seconds."""

import subprocess
import sys
from pathlib import Path

import pytest


@pytest.mark.long
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("seed", [1])
def test_two_thousand_prompts_through_kills(seed):
    script = Path(__file__).with_name("soak.py")
    command = [sys.executable, str(script), "--seed", str(seed)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=script.parents[2])
    assert done.returncode == 0, done.stdout + done.stderr[-3000:]
    assert "| yes |" in done.stdout
