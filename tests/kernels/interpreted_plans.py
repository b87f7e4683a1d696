"""A second call by the plan of a first: a script for `interpret.py`.

It imports what it needs when it runs, since pytest imports it too, in search of doctests.
"""

from typing import Any

import torch

from mamba_probe.kernels.scan import Emit, arguments, operators, selective_scan

NAMES = ("delta", "A_bar", "B_bar", "h", "y", "delta_cumsum", "B", "C")


def answers(given: dict[str, Any], emit: Emit | None, is_trained: bool) -> dict[Any, torch.Tensor]:
    """All of them, and the gradients."""
    from oracle import by_name

    if not is_trained:
        return by_name(selective_scan(**given, emit=emit, backend="triton"))
    given = {name: v.clone().requires_grad_() if isinstance(v, torch.Tensor) else v for name, v in given.items()}
    tensors = [v for v in given.values() if isinstance(v, torch.Tensor)]
    found = by_name(selective_scan(**given, emit=emit, backend="triton"))
    whole = torch.stack([(value * (k + 1)).sum() for k, value in enumerate(found.values())]).sum()
    return found | dict(enumerate(torch.autograd.grad(whole, tensors)))


def compared(shape, emit, is_trained):
    """By a plan that other numbers have made, and by its own."""
    from oracle import draw

    first, second = (draw(None, 1, 4, seed=seed, shape=shape) for seed in (1, 2))
    arguments._forms.clear()
    operators._known.clear()
    answers(first, emit, is_trained)
    (form,) = arguments._forms.values()
    plans = list(form.plans)
    found = answers(second, emit, is_trained)
    assert plans, "none was kept"
    assert list(form.plans) == plans, "one was made again"
    arguments._forms.clear()
    operators._known.clear()
    for name, value in answers(second, emit, is_trained).items():
        assert torch.equal(value, found[name]), name
    print("equal", flush=True)


def main():
    torch.use_deterministic_algorithms(True)  # torch.empty answers NaN: an output that is not written shows
    for shape in ((2, 1, 2, False), (2, 2, 2, True)):
        compared(shape, None, is_trained=True)
        compared(shape, Emit((*NAMES, "energy", "mass", "mass_distance"), (1, 3), (1,)), is_trained=False)
        compared(shape, Emit(NAMES), is_trained=True)


if __name__ == "__main__":
    main()
