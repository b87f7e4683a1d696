"""A soak: a recording of many prompts, killed every few seconds, resumed to the end, against one that was let be.

python tests/streaming/soak.py [--prompts 2000] [--seconds 3] [--seed 0] [--out benchmarks/results/soak.md]
"""

import argparse
import random
import shutil
import subprocess
import sys
import tempfile
import warnings
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

import dask
import recorded
import torch
import xarray as xr

import mamba_probe as mp
from mamba_probe import provenance
from mamba_probe.trace.blocks import committed

BATCH = 10
VARIABLES = ("delta", "A", "B", "C", "y")


def record(probe, path, prompts):
    ids = torch.randint(1, 41, (prompts, 48), generator=torch.Generator().manual_seed(8))
    mask = (torch.arange(48) < torch.randint(8, 49, (prompts, 1), generator=torch.Generator().manual_seed(9))).long()
    options = {"variables": VARIABLES, "batch_size": BATCH, "max_memory": "1MB", "resume": True}
    return probe.record(ids, mask, store=path, **options)


def soak(folder, prompts, seconds, seed):
    """Returns kills, blocks at each kill, and whether all was equal in the end."""
    torch.set_num_threads(1)
    dask.config.set(scheduler="synchronous")  # its threads would not come along into a fork
    chance, path, at = random.Random(seed), folder / "killed.zarr", []
    probe = mp.attach(recorded.model(n_layer=3))
    while recorded.killed(lambda: record(probe, path, prompts), chance.uniform(0.2, 2 * seconds)):
        at.append(len(committed(path)) if path.exists() else 0)
        seconds *= 1.0 if at[-1] < prompts // BATCH else 2.0  # all is there: let it find so
        if path.exists():
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                assert mp.open_trace(path).sizes["batch"] == BATCH * at[-1]
    assert at == sorted(at), "a block that was whole is gone"
    whole = record(probe, folder / "whole.zarr", prompts).load()
    equal = mp.open_trace(path).load().equals(whole)
    held = record(probe, None, prompts) if prompts <= 50 else whole
    xr.testing.assert_equal(whole, held)
    same = recorded.values(path) == recorded.values(folder / "whole.zarr")
    return at, len(committed(path)), bool(equal and same and mp.verify(path).whole)


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--prompts", type=int, default=2000)
    parser.add_argument("--seconds", type=float, default=3.0, help="between kills, on average")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path)
    given = parser.parse_args()
    folder = Path(tempfile.mkdtemp())
    try:
        at, blocks, equal = soak(folder, given.prompts, given.seconds, given.seed)
    finally:
        shutil.rmtree(folder)
    git = ["git", "-C", str(Path(__file__).parents[2]), "rev-parse", "--short", "HEAD"]
    commit = subprocess.run(git, capture_output=True, text=True, check=True).stdout.strip()
    versions = ", ".join(f"{name} {found}" for name, found in provenance.versions().items())
    told = f"""# Soak: a recording killed again and again

`python tests/streaming/soak.py --prompts {given.prompts} --seconds {given.seconds:g} --seed {given.seed}` at {commit};
{versions}. A Mamba-1 model of 3 layers, {given.prompts} prompts of 8 to 48 tokens, {", ".join(VARIABLES)}, CPU.

| | |
|---|---|
| kills (SIGKILL, at random moments, {given.seconds:g} s apart on average) | {len(at)} |
| kills with more blocks than at the one before | {sum(b > a for a, b in zip([0, *at], at, strict=False))} |
| blocks in the end, of {BATCH} prompts each | {blocks} of {-(-given.prompts // BATCH)} |
| whole blocks lost at a kill | 0 |
| equal to the uninterrupted run: every value, every byte of chunks and journal | {"yes" if equal else "NO"} |
"""
    print(told)
    if given.out is not None:
        given.out.write_text(told)
    sys.exit(0 if equal else 1)


if __name__ == "__main__":
    main()
