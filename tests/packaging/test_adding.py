"""The page on adding an analysis: its code, put where it says, is an analysis."""

import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]

CODE = """
import sys, mamba_probe.analyses
mamba_probe.analyses.__path__.append({folder!r})
sys.path.append({tests!r})
import doctest, numpy as np, pytest, mamba_probe as mp
from mamba_probe.analyses import write_share
from mamba_probe.analyses.common.analysis import analyses
from mamba_probe.report import analyse, draw, finding
from mamba_probe.run import record_task
assert doctest.testmod(write_share) == (0, 2)
run = record_task(mp.load("zoo:mqar-mamba1"), "mqar", rows=3, length=20, n_pairs=2)
result = analyse(run, "out", names=("write_share",))["write_share"]
delta = run.trace["delta"].values[0].astype(float)
brute = np.sort(delta, axis=1)[:, -2:].sum(1) / delta.sum(1)
assert np.abs(result["share"].values[0] - brute).max() < 1e-12
assert result["layer_share_low"] <= result["layer_share"] <= result["layer_share_high"]
assert all({{"long_name", "units"}} <= set(each.attrs) for each in result.values())
draw("write_share", result, "out", beside=result)
print(finding("write_share", result).sentence)
with pytest.raises(ValueError, match="share of the tokens"):
    write_share.measure(run.trace, top=2.0)
assert "write_share" in analyses()
import test_write_share as planted
planted.test_it_is_what_a_loop_over_sorted_steps_adds()
planted.test_equal_steps_have_the_null()
"""


def files():
    """The page's code by the file that it is for, the parts of one in their order."""
    page = (ROOT / "docs/adding-an-analysis.md").read_text()
    found = re.findall(r"```python\n# ([^,\n]+)(?:, continued)?\n(.*?)```", page, re.S)
    assert len(found) == len(re.findall("```python", page)) == 6
    whole = {}
    for name, code in found:
        whole[name] = "\n\n".join([*([whole[name]] if name in whole else []), code])
    return whole


def test_the_pages_code_is_an_analysis(tmp_path):
    assert list(files()) == ["analyses/write_share.py", "tests/analyses/test_write_share.py"]
    for name, code in files().items():
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(code)
    done = subprocess.run(
        [sys.executable, "-c", CODE.format(folder=str(tmp_path / "analyses"), tests=str(tmp_path / "tests/analyses"))],
        capture_output=True, text=True, cwd=tmp_path,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stdout == (
        "The 10% of tokens with the largest delta take 1 of the summed delta in layer 0 (time-invariant 0.1).\n"
    )
    assert (tmp_path / "out/write_share.svg").exists()
