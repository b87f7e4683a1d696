"""An exact sweep of a 130M-sized model over 64 tokens on a CUDA device, and its approximation by gradients.

    python benchmarks/patching_gpu.py -o benchmarks/results/patching-h200.md

transformers' MambaForCausalLM, 24 layers of 768, random weights, float32; two prompts that differ in one token; the
default quantities. Wall seconds, the second time. `--tiny` runs on a CPU, to see that it works.
"""

import argparse
import os
import platform
import subprocess
import time
from pathlib import Path

import torch
import transformers
import triton
from transformers import MambaConfig, MambaForCausalLM

import mamba_probe as mp


def build(device, layers, width):
    torch.manual_seed(0)
    config = MambaConfig(vocab_size=1024, hidden_size=width, num_hidden_layers=layers, use_cache=False)
    return MambaForCausalLM(config).to(device).eval()


def timed(device, call):
    call()
    if device == "cuda":
        torch.cuda.synchronize()
    start = time.perf_counter()
    found = call()
    if device == "cuda":
        torch.cuda.synchronize()
    return found, time.perf_counter() - start


def measure(device, layers, width, n_token):
    """Lines of the table."""
    model = build(device, layers, width)
    base = torch.randint(1, 1024, (1, n_token), generator=torch.Generator().manual_seed(1))
    source = base.clone()
    source[0, n_token // 4] = 7
    base, source = base.to(device), source.to(device)
    forwards = []
    handle = model.register_forward_hook(lambda *_: forwards.append(1))

    def answer(logits):
        return logits[:, -1, 5] - logits[:, -1, 6]

    with mp.attach(model) as probe:
        exact, seconds = timed(device, lambda: mp.patching.sweep(probe, base, source, answer, progress=False))
        n_forward = len(forwards) // 2
        quick, seconds_quick = timed(device, lambda: mp.patching.attribute(probe, base, source, answer, exact=exact))
    handle.remove()
    cells = exact["patched"].size
    lines = [
        "| | seconds | forwards | cells |",
        "|---|---|---|---|",
        f"| exact sweep | {seconds:.2f} | {n_forward} | {cells} |",
        f"| attribution, its error reported | {seconds_quick:.2f} | 2, one of them back | {cells} |",
        "",
        "| attribution against the exact | RMS error | Pearson | signs that agree |",
        "|---|---|---|---|",
    ]
    for name in quick["quantity"].values:
        one = quick.sel(quantity=name)
        lines.append(
            f"| {name} | {one.error_rms.item():.2f} | {one.pearson.item():.3f} | {one.sign_agreement.item():.2f} |"
        )
    return lines


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-o", "--output", type=Path)
    parser.add_argument("--tiny", action="store_true")
    given = parser.parse_args()
    device = "cpu" if given.tiny else "cuda"
    layers, width, n_token = (3, 32, 12) if given.tiny else (24, 768, 64)
    lines = measure(device, layers, width, n_token)
    head = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True).stdout.strip()
    card = platform.machine() if given.tiny else torch.cuda.get_device_name()
    where = (
        f"{card}; Python {platform.python_version()}, torch {torch.__version__}, triton {triton.__version__},"
        f" transformers {transformers.__version__}; {layers} layers of {width}, {n_token} tokens; commit"
        f" {os.environ.get('COMMIT') or head or 'unknown'}."
    )
    text = "\n".join(["# `benchmarks/patching_gpu.py`", "", where, "", *lines, ""])
    print(text)
    if given.output:
        given.output.write_text(text)


if __name__ == "__main__":
    main()
