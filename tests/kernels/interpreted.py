"""The Triton kernel through its interpreter on CPU tensors: a script for `interpret.py`, one line a case.

A process of its own, since Triton reads the variable when it is imported. Tiny sizes: the cost is programs x tokens.
With the argument "all", larger ones too.
"""

import sys

import torch
from oracle import EMITTED, SHAPES, by_name, cast, chosen, closed_form, draw, errors, featured, violations

from mamba_probe.kernels.scan import Emit, chunked, fused, selective_scan

WHOLE = sys.argv[1:] == ["all"]
EMITTED = tuple(name for name in EMITTED if not name.startswith("mass"))  # a kernel of its own: test_mass
SPANS = (  # features, spans, programs at once, states: a span waits for all before it, or for one
    (("zoh", "seq_idx"), 3, 264, 5),
    (("log_decay",), 2, 264, 16),
    (("constant",), 3, 1, 17),
    (("seq_idx", "log_decay"), 2, 1, 5),
)
TOKENS, CHANNELS = (0, 2, 40), (3, 1)
PER_TOKEN = ("x", "delta", "B", "C", "z")
PAIRWISE = (  # family, features, rows and tokens of a block, chunks, states: every two of them meet
    ("mamba", ("zoh",), (8, 8, 3), 5),
    ("mamba", ("seq_idx", "constant"), (16, 4, 2), 2),
    ("mamba", ("log_decay",), (4, 16, 1), 33),
    ("mamba", ("zoh", "seq_idx"), (8, 16, 2), 16),
    ("mamba_heads", ("constant",), (8, 8, 2), 33),
    ("mamba_heads", ("seq_idx", "log_decay"), (32, 4, 3), 5),
    ("mamba_heads", ("zoh", "log_decay"), (4, 16, 2), 1),
    ("mamba_heads", ("zoh", "constant"), (16, 8, 1), 2),
)


def triton(arguments, **options):
    return by_name(selective_scan(**arguments, **options, backend="triton"))


def bound(family, batch, token, group):
    arguments = draw(family, batch, token, group)
    naive = by_name(selective_scan(**arguments, emit=Emit(EMITTED), backend="naive"))
    found = triton(arguments, emit=Emit(EMITTED))
    assert set(found) == {"out", "last_state", *EMITTED}
    broken = violations(found, closed_form(**arguments), naive)
    assert not broken, (family, batch, token, group, broken)


def double(family):
    arguments = cast(draw(family, 1, 5, 2), torch.float64)
    assert max(errors(triton(arguments, emit=Emit(EMITTED)), closed_form(**arguments)).values()) < 1e-12


def plain(family):
    arguments = {name: draw(family, 1, 5)[name] for name in ("x", "delta", "A", "B", "C")}
    arguments["delta"] += 2
    assert max(errors(triton(arguments), closed_form(**arguments)).values()) < 1e-6


def narrow(family):
    arguments = cast(draw(family, 1, 9), torch.bfloat16, PER_TOKEN)
    naive = by_name(selective_scan(**cast(arguments, torch.float32), emit=Emit(EMITTED), backend="naive"))
    found = triton(arguments, emit=Emit(EMITTED))
    assert found["out"].dtype == torch.bfloat16
    broken = violations(found, closed_form(**arguments), naive, out_bound=torch.finfo(torch.bfloat16).eps)
    assert not broken, (family, broken)


def selection_and_split(family):
    arguments = draw(family, 1, 41, 2)
    exact = closed_form(**arguments)
    bare = triton(arguments)
    assert set(bare) == {"out", "last_state"}
    part = triton(arguments, emit=Emit(EMITTED, tokens=TOKENS, channels=CHANNELS))
    assert (part["out"] - bare["out"]).abs().max() <= 1e-6 * bare["out"].abs().max()
    assert max(errors(part, chosen(exact, TOKENS, CHANNELS)).values()) < 1e-6
    first = selective_scan(**arguments | {name: arguments[name][:, :17] for name in PER_TOKEN}, backend="triton")
    rest = {name: arguments[name][:, 17:] for name in PER_TOKEN} | {"initial_state": first.last_state}
    second = triton(arguments | rest)
    joined = {"out": torch.cat([first.y, second["out"]], 1), "last_state": second["last_state"]}
    assert max(errors(joined, bare).values()) < 1e-6


def block(family, features, tile, state):
    """Any tile and number of chunks, with every feature; token strides as transformers has them."""
    head, head_channel, _, scalar = SHAPES[family]
    arguments = featured(draw(None, 1, 37 if WHOLE else 21, 2, shape=(head, head_channel, state, scalar)), features)
    arguments |= {name: arguments[name].transpose(1, 2).contiguous().transpose(1, 2) for name in ("x", "delta")}
    naive = by_name(selective_scan(**arguments, emit=Emit(EMITTED), backend="naive"))
    rule, fused.choose_tile = fused.choose_tile, lambda a: fused.Tile(*tile)
    found = triton(arguments, emit=Emit(EMITTED))
    fused.choose_tile = rule
    broken = violations(found, closed_form(**arguments), naive)
    assert not broken, (family, features, tile, broken)


def handover(features, spans, programs, state):
    """A sequence in several programs, and states that begin in the middle of it."""
    arguments = featured(draw(None, 1, 41, 2, shape=(4, 3, state, True)), features)
    naive = by_name(selective_scan(**arguments, emit=Emit(EMITTED), backend="naive"))
    before = chunked.choose_tile, chunked.PROGRAMS, chunked.BOUNDARY
    chunked.choose_tile, chunked.PROGRAMS, chunked.BOUNDARY = lambda a: chunked.Tile(16, 16, spans), programs, 16
    found = triton(arguments, emit=Emit(EMITTED))
    chunked.choose_tile, chunked.PROGRAMS, chunked.BOUNDARY = before
    broken = violations(found, closed_form(**arguments), naive)
    assert not broken, (features, spans, programs, broken)


def strided(family):
    """A and the bias with any strides, as an expanded or a sliced parameter has them."""
    arguments = draw(family, 1, 9)
    expected = triton(arguments)
    for name in ("A", "delta_bias"):
        arguments[name] = torch.stack([arguments[name], torch.full_like(arguments[name], -7.0)], -1)[..., 0]
        assert not arguments[name].is_contiguous()
    assert all(torch.equal(value, expected[name]) for name, value in triton(arguments).items())


def rounded(family):
    """Emit.dtype rounds what has a state axis, and only that."""
    arguments, states = draw(family, 1, 9), ("A_bar", "B_bar", "h")
    whole, narrow = (triton(arguments, emit=Emit(EMITTED, dtype=dtype)) for dtype in (None, torch.float16))
    for name in states:
        assert torch.equal(narrow[name], whole[name].to(torch.float16)), name
    assert max(errors({name: narrow[name] for name in set(narrow) - set(states)}, whole).values()) < 1e-6


def small_delta():
    """Softplus keeps its relative accuracy at small steps, and is the identity above 20."""
    raw = torch.tensor([-30.0, -20.0, -14.0, -5.0, 0.0, 5.0, 19.0, 21.0])
    one = torch.ones(1, 8, 1, 1)
    delta = triton(
        {"x": one, "delta": raw[None, :, None], "A": -one[0, :1, 0], "B": one, "C": one, "delta_softplus": True},
        emit=Emit(("delta",)),
    )["delta"].flatten()
    exact = torch.nn.functional.softplus(raw.double())
    assert ((delta - exact) / exact).abs().max() < 5e-7


def nan_passes(name):
    arguments = draw("mamba", 1, 4)
    arguments[name].view(-1)[0] = float("nan")
    found = triton(arguments, emit=Emit(("delta", "A_bar")))
    assert found["out"].isnan().any()
    assert found["A_bar"].isnan().any()
    assert found["delta"].isnan().any() == (name == "delta")


def main():
    torch.use_deterministic_algorithms(True)  # torch.empty answers NaN: an output that is not written shows
    cases = [(bound, family, 2, token, 2) for family in SHAPES for token in (1, 3)]
    cases += [(bound, family, 1, 65 if WHOLE else 33, 2) for family in SHAPES] + [(selection_and_split, "mamba")]
    cases += [(check, family) for check in (double, plain, narrow, strided, rounded) for family in SHAPES]
    cases += [(block, *row) for row in PAIRWISE] + [(handover, *row) for row in SPANS]
    cases += [(small_delta,), (nan_passes, "delta"), (nan_passes, "A")]
    if WHOLE:
        cases += [
            (bound, family, batch, token, 1) for family in ("mamba", "mamba2") for batch, token in ((3, 64), (1, 257))
        ]
        cases += [(selection_and_split, family) for family in ("mamba2", "mamba_heads")]
    for check, *arguments in cases:
        check(*arguments)
        print("held", check.__name__, *arguments, flush=True)


if __name__ == "__main__":
    main()
