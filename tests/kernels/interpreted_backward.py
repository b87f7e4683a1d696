"""The Triton backward through its interpreter against autograd of the float64 naive scan: one line a case.

With the argument "all", every pair of features; otherwise cases in which every two choices meet. The bound is the
project's for gradients: max(1e-5, 2 x the error of autograd through the float32 naive scan), for 16 bits their own eps.
"""

import sys
from itertools import combinations
from typing import Any

import torch
from oracle import FEATURES, cast, draw, featured

from mamba_probe.kernels.emission import Emit
from mamba_probe.kernels.scan import arguments, fused, naive
from mamba_probe.kernels.scan.backward import Tile, Upstream, backward, choose_tile

GIVEN = ("x", "delta", "A", "B", "C", "D", "z", "delta_bias", "initial_state", "log_decay")
PER_TOKEN = ("x", "delta", "B", "C", "z", "log_decay")
ANSWERED = ("out", "last_state", "delta", "A_bar", "B_bar", "h", "y", "delta_cumsum")
STATES = ("A_bar", "B_bar", "h")
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


def checked(given, emit):
    options = dict.fromkeys(("D", "z", "delta_bias", "initial_state", "seq_idx", "log_decay"))
    options |= {"delta_softplus": False, "delta_limits": (0.0, float("inf")), "discretization": "euler"}
    return arguments.check(**options | given, emit=emit)


def answers(a):
    out, last, emission = naive.scan(a)
    found = {"out": out, "last_state": last} | {name: getattr(emission, name) for name in ANSWERED[2:]}
    return {name: value for name, value in found.items() if value is not None}


def autograd(given: dict[str, Any], emit, upstream):
    given = {
        name: value.detach().clone().requires_grad_() if name in GIVEN and value is not None else value
        for name, value in given.items()
    }
    found = answers(checked(given, emit))
    names = [name for name in GIVEN if given.get(name) is not None]
    grads = torch.autograd.grad(
        [found[name] for name in upstream],
        [given[name] for name in names],
        [upstream[name].to(found[name].dtype) for name in upstream],
        allow_unused=True,
    )
    return {
        name: torch.zeros_like(given[name]) if grad is None else grad for name, grad in zip(names, grads, strict=True)
    }


def saved(a, tile):
    """The states that the forward kernel leaves for the backward, checked against those of the naive scan."""
    tokens = range(tile.segment - 1, a.n_token - 1, tile.segment)
    if not tokens:
        return None
    shape = len(a.x), len(tokens), *a.state_shape[1:]
    states = torch.empty(shape, dtype=a.dtype)
    bare = arguments.Arguments(**vars(a) | {"emit": Emit()})
    nothing = torch.empty_like(a.x), torch.empty(a.state_shape, dtype=a.dtype), {}, None, None
    fused.launch(bare, *nothing, fused.Tile(8, min(8, tile.segment), 2), states, tile.segment)
    exact: Any = naive.scan(arguments.Arguments(**vars(a) | {"emit": Emit(("h",), tokens=list(tokens))}))[2].h
    assert (states - exact).abs().max() <= 1e-5 * exact.abs().max()
    return states


def error(value, exact):
    return (value.double() - exact).abs().max().item() / (exact.abs().max().item() or 1.0)


def of_dtype(given, dtype):
    return {
        name: value.to(dtype) if torch.is_tensor(value) and value.is_floating_point() else value
        for name, value in given.items()
    }


def compared(given, emit, asked, go_back, exactly=1e-12):
    """Of `asked`, all of what is answered where None, the gradients back to every argument, by `go_back(a, upstream)`
    and by autograd; in float64 `exactly` that near."""
    double = of_dtype(given, torch.float64)
    exact_answers = answers(checked(double, emit))
    generator = torch.Generator().manual_seed(5)
    dtypes = {"out": given["x"].dtype, "delta_cumsum": torch.float64}
    dtypes |= dict.fromkeys(STATES, emit.dtype) if emit and emit.dtype else {}
    a = checked(given, emit)
    upstream = {
        name: torch.randn(exact_answers[name].shape, generator=generator).to(dtypes.get(name, a.dtype))
        for name in (asked or exact_answers)
    }
    exact = autograd(double, emit, upstream)
    plain = autograd(of_dtype(given, torch.float32), emit, upstream)
    found = go_back(a, Upstream(**upstream))
    if given.get("D") is not None and given["D"].ndim == 1:
        found["D"] = found["D"].sum(1)
    assert set(found) == set(exact), set(found) ^ set(exact)
    for name, value in found.items():
        assert value.shape == exact[name].shape, name
        assert value.dtype == given[name].dtype, name
        limit = exactly if value.dtype == torch.float64 else max(1e-5, 2 * error(plain[name], exact[name]))
        if value.dtype in (torch.bfloat16, torch.float16):
            limit = max(limit, torch.finfo(value.dtype).eps)
        assert error(value, exact[name]) <= limit, (name, error(value, exact[name]), limit)


def holds(given, emit=None, tile=TILES[0], asked=None):
    compared(given, emit, asked, lambda a, upstream: backward(a, saved(a, tile), upstream, tile))


def block(features, rows, tile, state, emit):
    given: dict[str, Any] = featured(draw(None, 1, 21, 2, shape=(*rows, state, False)), features)
    given |= {name: given[name].transpose(1, 2).contiguous().transpose(1, 2) for name in ("x", "delta")}
    holds(given, emit, TILES[tile])


def bare():
    given = draw("mamba", 2, 21)
    holds({name: given[name] for name in ("x", "delta", "A", "B", "C")})


def double():
    holds(cast(draw("mamba", 1, 21), torch.float64), ALL, TILES[1])


def narrow(dtype):
    given = cast(draw("mamba", 2, 21), dtype, PER_TOKEN)
    holds(given, Emit(ALL.variables, dtype=torch.bfloat16), choose_tile(checked(given, None))._replace(segment=16))


def alone(name):
    """One answer's gradient and no other, so that a term that is left out cannot hide."""
    emit = None if name in ("out", "last_state") else Emit((name,), SOME.tokens, SOME.channels)
    holds(draw("mamba", 1, 21), emit, TILES[1], (name,))


def summed():
    """delta_cumsum's gradient, and one that was expanded, as that of a sum is."""
    given = draw("mamba", 2, 21)
    holds(given, Emit(("delta", "delta_cumsum")), TILES[0], ("out", "delta", "delta_cumsum"))
    a = checked(given, None)
    ones = torch.ones(()).expand(a.x.shape)
    states = saved(a, TILES[0])
    expanded, dense = (backward(a, states, Upstream(out=up), TILES[0]) for up in (ones, ones.contiguous()))
    assert all(torch.equal(expanded[name], dense[name]) for name in dense)


def twice():
    a = checked(draw("mamba_heads", 1, 13, 2), None)
    states, up = saved(a, TILES[1]), Upstream(out=torch.randn(a.x.shape))
    first, second = (backward(a, states, up, TILES[1]) for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)


def one_token():
    holds(draw("mamba", 2, 1), ALL)


def main():
    torch.use_deterministic_algorithms(True)  # torch.empty answers NaN: an output that is not written shows
    cases = [(bare,), (double,), (summed,), (twice,), (one_token,), (narrow, torch.bfloat16), (narrow, torch.float16)]
    cases += [(alone, name) for name in ANSWERED[:-1]] + [(block, *row) for row in PAIRWISE]
    if sys.argv[1:] == ["all"]:
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
