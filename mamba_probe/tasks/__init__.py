"""Seeded tasks whose answers, and the tokens that hold them, are known."""

from mamba_probe.tasks.associative_recall import mqar
from mamba_probe.tasks.function_approximation import KINDS, Signals, function_approximation
from mamba_probe.tasks.induction import induction, induction_every_token
from mamba_probe.tasks.keep_nth import keep_nth
from mamba_probe.tasks.repeated import repeated_tokens
from mamba_probe.tasks.selective_copying import selective_copying
from mamba_probe.tasks.task import ROLES, Task

__all__ = [
    "KINDS",
    "ROLES",
    "Signals",
    "Task",
    "function_approximation",
    "induction",
    "induction_every_token",
    "keep_nth",
    "mqar",
    "repeated_tokens",
    "selective_copying",
]
