"""Sizes that cannot be, refused with the inequality that fails."""

import numpy as np

__all__ = ["MOST", "require", "require_integers"]

MOST = 2**31
"""Tokens of all rows of a task, and so any of its sizes."""


def require_integers(task: str, **sizes: object) -> None:
    """Refuse sizes, or a seed, that are not integers.

    Raises:
        ValueError: naming each of them, a negative seed, or sizes beyond `MOST`.
    """
    wrong = [f"{name}={value!r}" for name, value in sizes.items() if not isinstance(value, int | np.integer)]
    if wrong:
        raise ValueError(f"{task}: sizes and seed are integers; got {', '.join(wrong)}")
    numbers: dict[str, int] = {name: int(value) for name, value in sizes.items()}  # type: ignore[call-overload]
    if numbers.get("seed", 0) < 0:
        raise ValueError(f"{task}: seed is at least 0; got {numbers['seed']}")
    large = [f"{name}={value}" for name, value in numbers.items() if name != "seed" and value > MOST]
    if large or numbers.get("batch", 1) * numbers.get("length", 1) > MOST:
        raise ValueError(f"{task}: sizes and tokens of all rows are at most {MOST}; got {', '.join(large) or numbers}")


def require(task: str, needs: dict[str, bool]) -> None:
    """Refuse arguments that do not fit each other; `needs` says of each inequality whether it is met.

    Raises:
        ValueError: naming every inequality that is not.
    """
    failed = [need for need, met in needs.items() if not met]
    if failed:
        raise ValueError(f"{task}: needs {'; '.join(failed)}")
