"""Which rows a training sees, and which it never can: seeds of three splits that share none."""

import torch
from jaxtyping import Int
from torch import Tensor

from mamba_probe.tasks import Task
from mamba_probe.trace.contract import unknown_name
from mamba_probe.training.config import Config

__all__ = ["SPLITS", "held_out", "rows", "seed_of"]

SPLITS = ("training", "validation", "test")
"""What is learned from; what stops a training and chooses its rate; what its card counts."""
LARGEST_INDEX = 2**32 - 1


def seed_of(split: str, seed: int, index: int) -> int:
    """Return the task seed of batch `index` of a training with this seed.

    seed 2^34 + 4 index + k, with k = 0, 1, 2 for training, validation, test. Seeds of different splits differ modulo
    4: no training, whatever its seed, draws a batch that any evaluation draws. They are fed to numpy's SeedSequence,
    which makes neighbours independent. Source: ours.

    Arguments:
        split: one of `SPLITS`.
        seed: of the training.
        index: of the batch: for training the step, 0 .. 2^32 - 1.

    Raises:
        ValueError: an unknown split, or an index out of range.

    Example:
        >>> [seed_of(split, seed=0, index=3) for split in SPLITS]
        [12, 13, 14]
    """
    if split not in SPLITS:
        raise unknown_name("split", split, SPLITS)
    if not 0 <= index <= LARGEST_INDEX:
        raise ValueError(f"index of a batch must be in 0 .. {LARGEST_INDEX}; got {index}")
    return (seed << 34) + (index << 2) + SPLITS.index(split)


def rows(config: Config, step: int) -> tuple[Int[Tensor, "batch token"], Int[Tensor, "batch token"]]:
    """Return the token ids and targets of a training step, on the CPU: a function of seed and step alone."""
    index = step if config.fixed_batches is None else step % config.fixed_batches
    task = config.draw(config.batch, seed_of("training", config.seed, index), index)
    return torch.from_numpy(task.input_ids), torch.from_numpy(task.target)


def held_out(config: Config, split: str, index: int) -> Task:
    """Return a batch that no training draws.

    Raises:
        ValueError: `split` is "training", or unknown.
    """
    if split == "training":
        raise ValueError('held-out rows are of split "validation" or "test"; got "training"')
    return config.draw(config.batch, seed_of(split, config.seed, index))
