"""Sizes that cannot be, refused with the inequality that fails."""

import numpy as np

__all__ = ["require", "require_integers"]


def require_integers(task: str, **sizes: object) -> None:
    """Refuse sizes, or a seed, that are not integers.

    Raises:
        ValueError: naming each of them.
    """
    wrong = [f"{name}={value!r}" for name, value in sizes.items() if not isinstance(value, int | np.integer)]
    if wrong:
        raise ValueError(f"{task}: sizes and seed are integers; got {', '.join(wrong)}")


def require(task: str, needs: dict[str, bool]) -> None:
    """Refuse arguments that do not fit each other; `needs` says of each inequality whether it is met.

    Raises:
        ValueError: naming every inequality that is not.
    """
    failed = [need for need, met in needs.items() if not met]
    if failed:
        raise ValueError(f"{task}: needs {'; '.join(failed)}")
