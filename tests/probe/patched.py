"""Two runs to patch between, a metric, and models whose every weight is perturbed."""

import torch

from mamba_probe import patching
from mamba_probe.blocks import LanguageModel, Mamba2Block, MambaBlock

BASE = torch.randint(1, 61, (2, 9), generator=torch.Generator().manual_seed(5))
SOURCE = torch.randint(1, 61, (2, 9), generator=torch.Generator().manual_seed(6))
MASK = torch.ones_like(BASE)
MASK[0, :3] = 0
RUNS = tuple({"input_ids": ids, "attention_mask": MASK} for ids in (BASE, SOURCE))
SCAN = ("delta", "A_bar", "B", "C", "x", "z", "y", "h")
AROUND = ("resid_pre", "mixer_in", "mixer_out", "resid_post")


def answer(logits):
    """Two logits, of another token in each row: the metric is given the rows in order."""
    each = torch.arange(len(logits))
    return logits[each, -1, 7 + each] - logits[each, -2, 11]


def quiet(probe, base=RUNS[0], source=RUNS[1], metric=answer, **options):
    return patching.sweep(probe, base, source, metric, progress=False, **options)


def perturbed(model, seed=0):
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in sorted(model.named_parameters()):
            noise = torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype)
            parameter += noise * (0.1 if name.endswith("A_log") else 0.3)
    return model.eval()


def double_model(family):
    """Two layers of ours in float64 throughout."""
    torch.manual_seed(0)
    blocks = {
        "mamba": lambda layer: MambaBlock(8, d_state=4, layer_idx=layer),
        "mamba2": lambda layer: Mamba2Block(8, n_heads=4, d_state=4, n_groups=2, layer_idx=layer),
    }
    return perturbed(LanguageModel([blocks[family](layer) for layer in range(2)], 61).double())
