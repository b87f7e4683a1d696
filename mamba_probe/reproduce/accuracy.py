"""How often a construction answers a task: one row a cell, beside its randomised twin or chance."""

from collections.abc import Callable, Mapping

import torch

from mamba_probe.constructions import Construction
from mamba_probe.reproduce.evaluate import MIXERS, answered, dtype_of, estimator, head, sizes_of
from mamba_probe.reproduce.table import Cell, Row, counted
from mamba_probe.tasks import Task

__all__ = ["accuracy_rows"]


def accuracy_rows(
    cell: Cell, seed: int, *, builder: Callable[..., Construction], task_of: Callable[..., Task],
    named: Callable[[Cell], str], shown: Mapping[str, str],
) -> list[Row]:  # fmt: skip
    """Measure one cell.

    Arguments:
        cell: `build` for the builder, its dtype by name; `task` for the generator; `null` "twin" or "chance".
        seed: of the task; the twin's is one more.
        builder: of the construction.
        task_of: the generator.
        named: says what was built.
        shown: names in the table of arguments of the task.
    """
    construction = builder(**cell.build | {"dtype": getattr(torch, cell.build["dtype"])})
    task = task_of(**cell.task, seed=seed)
    assert task.answers is not None
    chance = 1 / len(task.answers)
    null, null_is = chance, f"chance, 1 of {len(task.answers)}"
    if cell.null == "twin":
        few = head(task)
        correct, total = answered(construction.randomised(seed + 1), few)
        null, null_is = correct / total, f"randomised twin, seed {seed + 1}, {total} queries ({null_is})"
    correct, total = answered(construction, task)
    sizes = {name: cell.task[argument] for argument, name in shown.items() if argument in cell.task}
    return [
        counted(
            cell, (correct, total), what=named(cell), mixer=MIXERS[cell.build.get("mixer", "mamba1")],
            dtype=dtype_of(construction), sizes=sizes | sizes_of(construction), null=null, null_is=null_is,
            estimator=f"{estimator(construction)}, the largest logit at each query",
            over=f"{len(task.input_ids)} sequences, {total} queries",
        )
    ]  # fmt: skip
