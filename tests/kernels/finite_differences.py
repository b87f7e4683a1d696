"""torch's gradcheck through the Triton scan and its backward, float64 in and out: a script, one line a case.

To be interpreted, by `interpret.py`. (Compiled, float64 gradients are held to those of the naive scan, 1e-12,
which no difference shows: `test_gpu_backward`, `test_gpu_chunked_backward`.) One random direction of all inputs and one
of all answers stand for them, but for the smallest calls, and with "all" for any: of those every derivative is taken by
itself.

Differences over 6e-6 are right to 1e-9 of a derivative, and held to 2e-9: a step that is rounded to float32, by 6e-8,
shows in the backward, and in the forward, whose error is divided by 6e-6, far more.
"""

import sys
from functools import partial

import pytest
import torch
from oracle import by_name, cast, draw, featured

from mamba_probe.kernels.scan import Emit, backward, fused, selective_scan

STEP = 3e-6
"""To either side."""

ROWS = {
    "mamba": (2, 1, 2, False),
    "heads": (2, 2, 2, False),
    "mamba2": (2, 2, 3, True),
    "smallest": (1, 1, 1, False),
    "smallest2": (1, 1, 1, True),
}
CASES = (  # rows, groups, features, what is not given, what is emitted: every two features with, without and alone
    ("mamba", 1, (), (), Emit(("delta", "A_bar", "B_bar", "h", "y", "delta_cumsum"))),
    ("heads", 2, ("zoh", "seq_idx", "log_decay"), ("D", "initial_state"), Emit(("A_bar",))),
    ("mamba", 2, ("constant", "seq_idx", "log_decay"), ("z",), Emit(("h", "delta"), (0, 2), (1,))),
    ("heads", 1, ("constant", "zoh", "log_decay"), ("delta_bias",), None),
    ("mamba", 1, ("constant", "zoh", "seq_idx"), ("delta_softplus", "z"), Emit(("B_bar", "y"), (1,))),
    ("mamba2", 1, (), (), Emit(("delta", "A_bar", "B_bar", "y", "delta_cumsum"))),
    ("mamba2", 2, ("zoh", "seq_idx", "log_decay"), ("D", "initial_state"), Emit(("A_bar",))),
    ("mamba2", 1, ("constant", "seq_idx", "log_decay"), ("z",), Emit(("y", "delta"), (0, 2), (1,))),
    ("mamba2", 2, ("constant", "zoh", "log_decay"), ("delta_bias",), None),
    ("mamba2", 1, ("constant", "zoh", "seq_idx"), ("delta_softplus", "z"), Emit(("B_bar", "A_bar"), (1,))),
)
SMALLEST = (("smallest", 1, (), (), None), ("smallest2", 1, (), (), None))
LONGER = (
    ("mamba", 1, ("log_decay",), (), Emit(("A_bar", "y"), tokens=(0, 9)), 13),
    ("mamba2", 1, ("zoh",), (), Emit(("A_bar", "y"), tokens=(0, 16)), 18),
    ("mamba2", 1, (), ("delta_bias",), Emit(("h",), tokens=(0, 9)), 13),
)


def drawn(rows, group, features, missing, token):
    """Of the steps one is below the lower limit and one above the upper one, and none near them."""
    given = cast(featured(draw(None, 1, token, group, shape=ROWS[rows]), features), torch.float64)
    if "seq_idx" in features:
        given["seq_idx"] = (torch.arange(token) > token // 2).long()[None]
    given = {name: value for name, value in given.items() if name not in missing}
    if "delta_softplus" in missing:
        given |= {name: given[name].abs() / 4 for name in ("delta", "delta_bias")}
    steps = given["delta"] + given.get("delta_bias", 0.0)
    steps = steps if "delta_softplus" in missing else torch.nn.functional.softplus(steps)
    first, *_, last = steps.flatten().sort().values.unfold(0, 2, 1).tolist()
    assert min(first[1] - first[0], last[1] - last[0]) > 1e-3
    return given | {"delta_limits": (sum(first) / 2, sum(last) / 2)}


def differentiated(rows, group, features, missing, emit, token=3, whole=False):
    given = drawn(rows, group, features, missing, token)
    tensors = {name: value for name, value in given.items() if torch.is_tensor(value) and name != "seq_idx"}
    sizes = [value.numel() for value in tensors.values()]

    def call(numbers):
        parts = zip(tensors.items(), numbers.split(sizes), strict=True)
        changed = {name: part.view(value.shape) for (name, value), part in parts}
        answers = by_name(selective_scan(**given | changed, emit=emit, backend="triton")).values()
        assert all(value.dtype == torch.float64 for value in answers)
        return tuple(answers) if whole else torch.cat([value.flatten() for value in answers])

    numbers = torch.cat([value.flatten() for value in tensors.values()]).requires_grad_()
    options = {"fast_mode": not whole, "check_undefined_grad": whole}
    with torch.no_grad():
        answers = call(numbers)
    largest = max(answer.abs().max().item() for answer in (answers if whole else [answers]))
    # Rounding of the two that are subtracted; of a direction it is taken times the lengths of both.
    atol = torch.finfo(torch.float64).eps * largest / STEP if whole else 1e-12
    assert torch.autograd.gradcheck(call, numbers, eps=STEP, atol=atol, rtol=2e-9, **options)


def cut(*row, whole=False):
    """A sequence in two chunks; for `backward`, in two segments too, each of two blocks of 4 tokens."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(fused, "SEGMENT", 8)
        patch.setattr(fused, "launch", partial(fused.launch, tile=fused.Tile(4, 4, 2), segment=8))
        patch.setattr(backward, "backward", partial(backward.backward, tile=backward.Tile(4, 4, 2, 8, 1)))
        differentiated(*row, whole=whole)


def main():
    torch.use_deterministic_algorithms(True, warn_only=True)  # torch.empty answers NaN: what is not written shows
    cases = [(differentiated, *row) for row in CASES] + [(cut, *row) for row in LONGER]
    for check, *given in cases:
        check(*given, whole="all" in sys.argv)
        print("held", check.__name__, *given, flush=True)
    for given in SMALLEST if "all" in sys.argv else ():
        differentiated(*given, token=4, whole=True)
        print("held", *given, flush=True)


if __name__ == "__main__":
    main()
