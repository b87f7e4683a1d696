"""A recorded run, run again: what it lacks for that, and what its model is given."""

from typing import Any

__all__ = ["MOST_ROWS", "given", "lacks_predictions"]

MOST_ROWS = 16
"""Rows of a run that are run again with a part taken out."""


def lacks_predictions(run: Any) -> str:
    """What a run lacks to be run again and scored; "" where nothing."""
    if "token_id" not in run.trace.coords or "prediction" not in run.trace.coords:
        return "token ids, and predictions of the next or of answers, that could be scored"
    return run.lacks_model()


def given(run: Any) -> tuple[Any, Any, int]:
    """What the model of a run takes, its mask (None of a task), and rows a forward call: a text's are long."""
    return (*run.inputs(), 1) if run.task is None else (run.task, None, MOST_ROWS)
