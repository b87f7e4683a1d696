"""Seeded tasks whose answers, and the tokens that hold them, are known."""

from mamba_probe.tasks.associative_recall import mqar
from mamba_probe.tasks.task import ROLES, Task

__all__ = ["ROLES", "Task", "mqar"]
