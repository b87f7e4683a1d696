"""The Triton backward through its interpreter against autograd of the float64 naive scan: one line a case.

With the argument "all", every pair of features and each answer alone; otherwise cases in which every two choices
meet. The bound is that of `gradients`.
"""

import sys
from dataclasses import replace
from itertools import combinations
from typing import Any

import torch
from gradients import NARROW, assert_same, checked, compare, error, saved
from oracle import FEATURES, cast, draw, featured

from mamba_probe.kernels.emission import Emit
from mamba_probe.kernels.scan import fused, naive, sums
from mamba_probe.kernels.scan.backward import Tile, Upstream, backward, choose_tile

ANSWERED = ("out", "last_state", "delta", "A_bar", "B_bar", "h", "y", "delta_cumsum")
ALL = Emit(ANSWERED[2:-1])
SOME = Emit(ANSWERED[2:-1], tokens=(0, 2, 11, 20), channels=(3, 1))
TILES = (Tile(8, 4, 1, 8, 1), Tile(4, 8, 3, 8, 1), Tile(16, 4, 2, 4, 1), Tile(8, 8, 1, 16, 1), Tile(8, 16, 2, 64, 1))
PAIRWISE = (  # features, heads and head_channels, tile, states, what is emitted
    ((), (6, 1), 0, 5, None),
    ((), (6, 1), 1, 1, ALL),
    (("constant",), (4, 3), 2, 16, SOME),
    (("zoh",), (6, 1), 3, 33, ALL),
    (("seq_idx", "constant"), (6, 1), 4, 2, SOME),
    (("log_decay", "zoh"), (4, 3), 1, 5, SOME),
    (("seq_idx", "log_decay"), (6, 1), 0, 16, ALL),
    (("zoh", "seq_idx", "log_decay", "constant"), (4, 3), 3, 2, ALL),
)


def states_of(a, tile):
    """Those that the forward leaves for the backward, checked against the naive scan's; None where there are none."""
    tokens = range(tile.segment - 1, a.n_token - 1, tile.segment)
    if not tokens:
        return None
    states = saved(a, tile.segment, fused.Tile(8, min(8, tile.segment), 2))
    exact: Any = naive.scan(replace(a, emit=Emit(("h",), tokens=list(tokens))))[2].h
    assert (states - exact).abs().max() <= 1e-5 * exact.abs().max()
    return states


def holds(given, emit=None, tile=TILES[0], asked=None):
    compare(given, lambda a, upstream: backward(a, states_of(a, tile), upstream, tile), emit, asked)


def block(features, rows, tile, state, emit):
    given: dict[str, Any] = featured(draw(None, 1, 21, 2, shape=(*rows, state, False)), features)
    given |= {name: given[name].transpose(1, 2).contiguous().transpose(1, 2) for name in ("x", "delta")}
    holds(given, emit, TILES[tile])


def bare():
    given = draw("mamba", 1, 21)
    holds({name: given[name] for name in ("x", "delta", "A", "B", "C")})


def double():
    holds(cast(draw("mamba", 1, 21), torch.float64), ALL, TILES[1])


def narrow(dtype):
    given = cast(draw("mamba", 2, 21), dtype, NARROW)
    holds(given, Emit(ALL.variables, dtype=torch.bfloat16), choose_tile(checked(given))._replace(segment=16))


def alone(name):
    """One answer's gradient and no other, so that a term that is left out cannot hide."""
    emit = None if name in ("out", "last_state") else Emit((name,), SOME.tokens, SOME.channels)
    holds(draw("mamba", 1, 21), emit, TILES[1], (name,))


def summed():
    """delta_cumsum's gradient, and one that was expanded, as that of a sum is."""
    given = draw("mamba", 2, 21)
    holds(given, Emit(("delta", "delta_cumsum")), TILES[0], ("out", "delta", "delta_cumsum"))
    a = checked(given)
    ones = torch.ones(()).expand(a.x.shape)
    states = states_of(a, TILES[0])
    expanded, dense = (backward(a, states, Upstream(out=up), TILES[0]) for up in (ones, ones.contiguous()))
    assert_same(expanded, dense)


def twice():
    a = checked(draw("mamba_heads", 1, 9, 2))
    states, up = states_of(a, TILES[1]), Upstream(out=torch.randn(a.x.shape))
    assert_same(*(backward(a, states, up, TILES[1]) for _ in range(2)))


def parts():
    """More than are read at a time, of sums that do not fill their blocks, with channels between, and one added."""
    head, channel, state, n_projection, n_pair, counts = 6, 3, 50, 333, 12, (37, 5, 18)
    of = {
        "B": (37, 333), "C": (37, 333), "A": (5, head, channel, state), "D": (18, head, channel),
        "delta_bias": (5, head, channel), "delta": (1, n_pair, channel), "log_decay": (1, n_pair, channel, state),
    }  # fmt: skip
    given, more = {name: torch.randn(of[name]) for name in sums.NAMES}, torch.randn(n_projection)
    exact = {name: value.double().sum(0) for name, value in given.items()}
    exact |= {name: exact[name].sum(1) for name in ("A", "delta_bias", "delta", "log_decay")}
    exact["B"] += more
    dtypes = {"B": torch.bfloat16, "C": torch.float16}
    for names in (sums.NAMES, ("C", "D", "delta")):
        found = {name: torch.empty(exact[name].shape, dtype=dtypes.get(name, torch.float32)) for name in names}
        tiles = sums.tile(37), (4, 8), (16, 2)
        sizes = dict.fromkeys(found, 4) | {"B": 128, "C": 128, "delta": 16, "log_decay": 16}
        n_program = sum(-(-value.numel() // sizes[name]) for name, value in found.items())
        sums.sums_kernel[(n_program,)](
            *map(given.get, sums.NAMES), more, *map(found.get, sums.NAMES), n_projection, *counts, n_pair,
            n_pair * state, head, channel, channel, state, *tiles,
        )  # fmt: skip
        for name, value in found.items():
            assert error(value, exact[name]) <= max(5e-7, torch.finfo(value.dtype).eps), name


def one_token():
    holds(draw("mamba", 2, 1), ALL)


def main():
    torch.use_deterministic_algorithms(True)  # torch.empty answers NaN: an output that is not written shows
    cases = [
        (bare,),
        (double,),
        (summed,),
        (parts,),
        (one_token,),
        (narrow, torch.bfloat16),
    ]
    whole = sys.argv[1:] == ["all"]
    cases += [(twice,), (narrow, torch.float16)] if whole else []
    cases += [(alone, name) for name in (ANSWERED[:-1] if whole else ("last_state", "h"))]
    cases += [(block, *row) for row in PAIRWISE]
    if whole:
        features = [name for name in FEATURES if name != "complex"]
        chosen = [pair for n in range(3) for pair in combinations(features, n)]
        rows, states, emitted = ((6, 1), (4, 3)), (5, 16, 2, 33, 1), (None, ALL, SOME)
        cases += [
            (block, pair, rows[(i + j) % 2], j, states[(i + 2 * j) % 5], emitted[(i + j) % 3])
            for i, pair in enumerate(chosen)
            for j in range(len(TILES))
        ]
    for check, *given in cases:
        check(*given)
        print("held", check.__name__, *given, flush=True)


if __name__ == "__main__":
    main()
