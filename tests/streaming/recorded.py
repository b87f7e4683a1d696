"""Small recordings that several tests make, in this process or in one that is killed while it makes them.

    python recorded.py FOLDER SEED TRIALS KIND       kills TRIALS recordings, each in a process of its own; prints JSON

KIND is what is killed: "record" at a random moment, "resume" until it is whole, or "grow" (a `recording()`).
"""

import json
import os
import random
import signal
import sys
import time
import warnings
from pathlib import Path

import torch

import mamba_probe as mp
from mamba_probe import blocks

VARIABLES = ("delta", "A", "B", "out")
IDS = torch.randint(1, 41, (11, 13), generator=torch.Generator().manual_seed(3))
MASK = torch.ones_like(IDS)
MASK[1, :4], MASK[4, 9:], MASK[8, 5:] = 0, 0, 0


def model(kind="mamba1", seed=0, n_layer=2, dtype=torch.float32):
    made = {
        "mamba1": lambda: blocks.MambaBlock(8, d_state=4), "s4d": lambda: blocks.S4DBlock(8, d_state=4),
        "mamba2": lambda: blocks.Mamba2Block(8, d_state=4, n_heads=4, n_groups=2),
    }[kind]  # fmt: skip
    torch.manual_seed(seed)
    found = blocks.LanguageModel([made() for _ in range(n_layer)], 41)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for _, parameter in sorted(found.named_parameters()):
            parameter += 0.1 * torch.randn(parameter.shape, generator=generator)
    return found.eval().to(dtype)


def record(probe, path, **options):
    return probe.record(IDS, MASK, store=path, **({"variables": VARIABLES, "batch_size": 4} | options))


def record_by_two(probe, path, **options):
    """More blocks to be killed between."""
    return record(probe, path, batch_size=2, **options)


def grown(probe, path, **options):
    """Calls of other lengths and batch sizes."""
    with probe.recording(variables=VARIABLES, store=path, **options) as recorder, torch.no_grad():
        for rows, length in ((2, 3), (1, 13), (3, 2), (2, 70)):
            probe.model(IDS[:rows].repeat(1, 6)[:, :length])
    return recorder


def values(path):
    """Every file of a store but what tells the time of its making, and locks."""
    return {str(file.relative_to(path)): file.read_bytes() for file in sorted(Path(path).rglob("*"))
            if file.is_file() and file != Path(path) / "zarr.json" and not file.name.startswith("shard-")}  # fmt: skip


def killed(action, after):
    """Run `action` in a process that is killed so many seconds after it began, if it is not over; whether it was."""
    child = os.fork()
    if not child:
        try:
            action()
        finally:
            os._exit(0)
    ends = time.monotonic() + after
    while time.monotonic() < ends:
        if os.waitpid(child, os.WNOHANG)[0]:
            return False
        time.sleep(0.0005)
    os.kill(child, signal.SIGKILL)
    return os.WIFSIGNALED(os.waitpid(child, 0)[1])


def at_point(action, point, told=None):
    """Run `action` in a process that kills itself at a point: the n-th time it opens a file to write, or renames.

    How many points there were is written to the file `told`.
    """
    child = os.fork()
    if not child:
        passed = [0]

        def hook(event, arguments):
            writes = event == "open" and isinstance(arguments[1], str) and set(arguments[1]) & set("wax+")
            if writes or event in ("os.rename", "os.mkdir"):
                if passed[0] == point:
                    os.kill(os.getpid(), signal.SIGKILL)
                passed[0] += 1

        sys.addaudithook(hook)
        try:
            action()
            if told:
                told.write_text(str(passed[0]))
        finally:
            os._exit(0)
    return os.WIFSIGNALED(os.waitpid(child, 0)[1])


def act(kind, probe, path):
    return lambda: grown(probe, path) if kind == "grow" else record_by_two(probe, path, resume=True)


def main(folder, seed, trials, kind):
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    chance = random.Random(seed)
    probe = mp.attach(model())
    first, began = act(kind, probe, folder / "first.zarr"), time.monotonic()
    at_point(first, -1, folder / "points")
    points, seconds = int((folder / "points").read_text()), time.monotonic() - began
    counts = {"killed": 0, "runs": 0, "points": points, "seconds": seconds}
    timed = 0.3 if trials >= 40 else 0.0  # on a machine under load all of a few moments may be too early
    for trial in range(trials):
        path = folder / f"{trial}.zarr"
        action = act(kind, probe, path)
        while True:
            part = chance.random() if kind == "resume" else (trial + chance.random()) / trials  # early ones and late
            dead = at_point(action, int(part * points)) if chance.random() >= timed else killed(action, part * seconds)
            counts["killed"] += dead
            counts["runs"] += 1
            if kind != "resume" or not dead:
                break
    print(json.dumps(counts))


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]), sys.argv[4])
