"""What late steps of a recorded generate() cost beside early ones, on a CPU and a tiny model: ratios only.

python benchmarks/generation.py [--steps 2000] [--window 100]
"""

import argparse
import gc
from itertools import pairwise
from statistics import fmean, median
from time import perf_counter

import torch
from torch import nn
from transformers import MambaConfig, MambaForCausalLM

import mamba_probe as mp

CONFIG = MambaConfig(vocab_size=61, hidden_size=24, state_size=8, num_hidden_layers=2, time_step_rank=3)
VARIABLES = ("delta", "B", "C", "h", "delta_cumsum")


def main() -> None:
    parser = argparse.ArgumentParser(description="Ratio of the cost of late and early steps of generate().")
    parser.add_argument("--steps", type=int, default=2000, help="tokens generated")
    parser.add_argument("--window", type=int, default=100, help="steps a median is taken over")
    options = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    model = MambaForCausalLM(CONFIG).eval()
    model.generation_config.eos_token_id = None
    print(f"step {options.steps} against step 20: medians of {options.window} steps from step 20 on, and of the last")
    print(f"untouched        {ratio(timed(model, options.steps), options.window)}")
    for keep in ("host", "device"):
        with mp.attach(model) as probe, probe.recording(variables=VARIABLES, keep=keep) as recorder:
            seconds = timed(model, options.steps)
        assert recorder.n_calls == options.steps
        print(f'keep="{keep}"'.ljust(16), ratio(seconds, options.window))


def timed(model: nn.Module, steps: int) -> list[float]:
    """Seconds of each step, from one forward's beginning to the next one's."""
    begun: list[float] = []
    handle = model.register_forward_pre_hook(lambda *_: begun.append(perf_counter()))
    ids = torch.randint(1, 61, (2, 16), generator=torch.Generator().manual_seed(0))
    gc.collect()
    model.generate(ids, max_new_tokens=steps, do_sample=False, pad_token_id=0)  # pyright: ignore[reportCallIssue]
    handle.remove()
    return [after - before for before, after in pairwise(begun)]


def ratio(seconds: list[float], window: int) -> str:
    """The late median by the early one, and the means of all steps, which have what comes now and then."""
    early, late = median(seconds[20 : 20 + window]), median(seconds[-window:])
    half = len(seconds) // 2
    means = fmean(seconds[half:]) / fmean(seconds[:half])
    return f"{late / early:.2f} (mean of the second half by the first: {means:.2f})"


if __name__ == "__main__":
    main()
