"""One short trainer for the zoo and the examples: our blocks, our scan, fresh rows each step, exact resume."""

from mamba_probe.training.card import UNSEEN_BATCHES, counted, describe
from mamba_probe.training.checkpoint import Point
from mamba_probe.training.config import SCHEDULES, TASKS, Config
from mamba_probe.training.data import SPLITS, held_out, rows, seed_of
from mamba_probe.training.progress import progress
from mamba_probe.training.recipes import RECIPES, Recipe
from mamba_probe.training.run import Outcome, run, run_all
from mamba_probe.training.sweep import LEARNING_RATES, Sweep, sweep
from mamba_probe.training.trainer import Result, answered, initial, train

__all__ = [
    "LEARNING_RATES", "RECIPES", "SCHEDULES", "SPLITS", "TASKS", "UNSEEN_BATCHES", "Config", "Outcome", "Point",
    "Recipe", "Result", "Sweep", "answered", "counted", "describe", "held_out", "initial", "progress", "rows", "run",
    "run_all", "seed_of", "sweep", "train",
]  # fmt: skip
