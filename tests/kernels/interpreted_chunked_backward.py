"""The backward of A (head,) through Triton's interpreter, against autograd of the float64 naive scan: one line a case.

With the argument "all", every pair of features with every tile, and each answer alone; otherwise cases in which every
two choices meet. The bound is that of `gradients`.
"""

import sys
from itertools import combinations

import pytest
import torch
from gradients import NARROW, assert_same, checked, compare
from oracle import cast, draw, featured
from triton.runtime.errors import OutOfResources

from mamba_probe.kernels.emission import Emit
from mamba_probe.kernels.scan import chunked_backward
from mamba_probe.kernels.scan.backward import Upstream
from mamba_probe.kernels.scan.chunked_backward import Tile, backward, choose_tile

EMITTED = ("delta", "A_bar", "B_bar", "y")
ALL = Emit(EMITTED)
SOME = Emit(EMITTED, tokens=(0, 2, 11, 36), channels=(3, 1))
FEATURES = ("constant", "zoh", "seq_idx", "log_decay")
TILES = (Tile(16, 3, 16, 16), Tile(32, 1, 32, 16), Tile(64, 2, 16, 32), Tile(16, 2, 64, 32))
PAIRWISE = (  # features, groups, head_channel, state, tile, what is emitted
    ((), 1, 3, 5, 0, None),
    (("constant",), 2, 17, 16, 1, SOME),
    (("zoh",), 1, 1, 12, 2, ALL),
    (("seq_idx", "constant"), 2, 3, 33, 3, ALL),
    (("log_decay",), 2, 17, 5, 3, SOME),
    (("zoh", "seq_idx"), 1, 3, 16, 1, SOME),
    (("seq_idx", "log_decay"), 1, 1, 33, 0, ALL),
    (("zoh", "log_decay", "constant"), 2, 1, 5, 2, None),
    (FEATURES, 1, 17, 12, 0, SOME),
)


def holds(given, emit=None, tile=TILES[1], asked=None):
    """float64 sums resets as log2 of a decay of -2048 each, which leaves 1e-13 of a token's decay and more of many."""
    compare(given, lambda a, upstream: backward(a, None, upstream, tile), emit, asked, exactly=1e-10)


def drawn(batch=1, token=37, group=1, shape=(4, 3, 5), features=(), dtype=None):
    given = featured(draw(None, batch, token, group, shape=(*shape, True)), features)
    return given if dtype is None else cast(given, dtype, None if dtype == torch.float64 else NARROW)


def block(features, group, head_channel, state, tile, emit):
    given = drawn(1, 37, group, (4, head_channel, state), features)
    given |= {name: given[name].transpose(1, 2).contiguous().transpose(1, 2) for name in ("x", "delta", "z")}
    holds(given, emit, TILES[tile])


def bare():
    given = {name: drawn()[name] for name in ("x", "delta", "A", "B", "C")}
    holds(given)
    holds(given, asked=("last_state",))
    holds(given, Emit(("y",)), asked=("out", "y"))


def double():
    """The rule's tile too."""
    holds(drawn(features=("zoh", "seq_idx"), dtype=torch.float64), ALL, None)


def rule(dtype):
    holds(drawn(dtype=dtype), tile=None)


def narrow(dtype):
    holds(drawn(features=("log_decay",), dtype=dtype), Emit(EMITTED, dtype=torch.bfloat16))


def alone(name):
    """One answer's gradient and no other, so that a term that is left out cannot hide."""
    emit = None if name in ("out", "last_state") else Emit((name,), SOME.tokens, SOME.channels)
    holds(drawn(), emit, asked=(name,))


def summed():
    """delta_cumsum's gradient beside delta's, and one that was expanded, as that of a sum is."""
    holds(drawn(), Emit(("delta", "delta_cumsum")), asked=("out", "delta", "delta_cumsum"))
    a = checked({name: value for name, value in drawn().items() if name != "z"})
    ones = torch.ones(()).expand(a.x.shape)
    expanded, dense = (backward(a, None, Upstream(out=up), TILES[1]) for up in (ones, ones.contiguous()))
    assert_same(expanded, dense)


def twice():
    a = checked(drawn(2, group=2))
    up = Upstream(out=torch.randn(a.x.shape))
    assert_same(*(backward(a, None, up, TILES[3]) for _ in range(2)))


def reset(dtype):
    """delta = 1e4 where B = 0 forgets all; what is small beside it must not be lost."""
    given = drawn(1, 40, dtype=dtype) | {"delta_limits": (0.0, float("inf"))}
    given["delta"][:, 21] = 1e4
    given["B"][:, 21] = 0.0
    given["A"][0] = -1e-6
    holds(given, tile=TILES[0])


def long_memory():
    given = drawn(1, 150, shape=(2, 3, 4))
    given["A"] = torch.full_like(given["A"], -1e-6)
    holds(given, tile=TILES[0])


def short():
    holds(drawn(token=1), ALL)
    holds(drawn(token=19, shape=(3, 1, 1)))


def states(token, emit, features):
    """A gradient of h, beside all others: at 66 tokens `fused` leaves states."""
    holds(drawn(1, token, shape=(2, 2, 3), features=features), emit)


def refused():
    a = checked(drawn(1, 3))
    with pytest.raises(ValueError, match="no gradient of the emitted `energy`"):
        backward(a, None, Upstream(energy=a.x))
    with pytest.raises(ValueError, match=r"`states` must be None where A is \(head,\)"):
        backward(a, a.x, Upstream(out=a.x))


def tiles():
    """Of inputs that would not fit shared memory with 64 tokens: 16."""
    sizes = {(64, 128): (64, 64), (128, 256): (64, 16), (64, 512): (16, 16)}
    for size, tokens in sizes.items():
        chosen = [
            choose_tile(checked(drawn(token=1, shape=(1, *size), dtype=dtype))) for dtype in (torch.bfloat16, None)
        ]
        assert tuple(tile.tokens for tile in chosen) == tokens, size


def too_large(monkeypatch):
    """What Triton says of the card is said of the call."""

    def full(*_given, **_options):
        raise OutOfResources(300_000, 232_448, "shared memory")

    monkeypatch.setattr(chunked_backward, "start", full)
    a = checked(drawn(token=3))
    with pytest.raises(
        ValueError, match=r'no gradients of 3 channels and 5 states a head: use backend="cpu"; .*300000'
    ):
        backward(a, None, Upstream(out=a.x))


def main():
    torch.use_deterministic_algorithms(True)  # torch.empty answers NaN: an output that is not written shows
    with_h = Emit((*EMITTED, "h"), tokens=(0, 5)), Emit(("h", "A_bar", "delta_cumsum"))
    cases = [(double,), (summed,), (long_memory,), (short,), (refused,), (tiles,)]
    cases += [(reset, None), (reset, torch.float64), (rule, None), (rule, torch.bfloat16)]
    cases += [(narrow, torch.bfloat16)]
    cases += [(states, 9, with_h[0], ("log_decay", "zoh")), (states, 66, with_h[1], ("seq_idx",))]
    whole = sys.argv[1:] == ["all"]
    cases += [(bare,), (twice,), (narrow, torch.float16)] if whole else []
    alone_too = ("out", "last_state", *EMITTED, "delta_cumsum") if whole else ("last_state", "A_bar")
    cases += [(alone, name) for name in alone_too] + [(block, *row) for row in PAIRWISE]
    if whole:
        chosen = [pair for n in range(3) for pair in combinations(FEATURES, n)]
        emitted, states_ = (None, ALL, SOME), (5, 16, 12, 33, 1)
        cases += [
            (block, pair, 1 + i % 2, (3, 17, 1)[(i + j) % 3], states_[(i + 2 * j) % 5], j, emitted[(i + j) % 3])
            for i, pair in enumerate(chosen)
            for j in range(len(TILES))
        ]
    with pytest.MonkeyPatch.context() as patch:
        too_large(patch)
    for check, *given in cases:
        check(*given)
        print("held", check.__name__, *given, flush=True)


if __name__ == "__main__":
    main()
