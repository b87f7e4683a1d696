import math
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mamba_probe.tasks import KINDS, function_approximation


@st.composite
def sizes(draw):
    n_pieces = draw(st.integers(2, 9))
    length = draw(st.integers(n_pieces, n_pieces + 50))
    kind, batch, seed = draw(st.sampled_from(KINDS)), draw(st.integers(1, 5)), draw(st.integers(0, 2**32))
    return {"kind": kind, "batch": batch, "length": length, "n_pieces": n_pieces, "seed": seed}


@settings(deadline=None, max_examples=80)
@given(sizes())
def test_values_change_at_the_jumps_and_nowhere_else(size):
    """Piece by piece: the samples from one jump to the next, cut by whole numbers, are what the formula says."""
    signals, length = function_approximation(**size), size["length"]
    assert signals.t.tolist() == [i / length for i in range(length)]
    for jumps, values in zip(signals.jumps, signals.values, strict=True):
        edges = [0, *(round(jump * length) for jump in jumps), length]
        assert len(edges) == size["n_pieces"] + 1
        pieces = [values[low:high] for low, high in pairwise(edges)]
        assert all(len(piece) for piece in pieces)
        for k, (piece, low) in enumerate(zip(pieces, edges, strict=False)):
            if size["kind"] == "smooth_jump":
                sine = [math.sin(2 * math.pi * (low + i) / length) for i in range(len(piece))]
                assert np.allclose(piece - np.array(sine), k % 2, atol=1e-12)
            else:
                assert len(set(piece)) == 1
        levels = [piece[0] for piece in pieces]
        if size["kind"] == "steps":
            assert levels == [(k + 1) % 2 for k in range(len(levels))]
        elif size["kind"] == "piecewise_constant":
            assert len(set(levels)) == len(levels)


@settings(deadline=None, max_examples=20)
@given(sizes())
def test_params_give_the_signals_again(size):
    signals = function_approximation(**size)
    again = function_approximation(**signals.params)
    assert signals.kind == again.kind == size["kind"]
    assert np.array_equal(signals.values, again.values)
    assert np.array_equal(signals.jumps, again.jumps)


@pytest.mark.parametrize("jump", [0.5, 1 / 3])
def test_given_jumps_hold_for_every_function(jump):
    signals = function_approximation("steps", batch=3, length=256, jumps=[jump])
    assert np.array_equal(signals.values, np.tile((np.arange(256) / 256 < jump).astype(float), (3, 1)))
    assert signals.jumps.tolist() == [[jump]] * 3
    assert function_approximation(**signals.params).params == signals.params


def test_levels_are_standard_normal_and_jumps_are_uniform():
    signals = function_approximation("piecewise_constant", batch=6000, length=5, n_pieces=3, seed=1)
    sets, count = np.unique(np.rint(signals.jumps * 5), axis=0, return_counts=True)
    assert sets.tolist() == [[1, 2], [1, 3], [1, 4], [2, 3], [2, 4], [3, 4]]
    assert ((count - 1000) ** 2 / 1000).sum() < 28.0  # 5 degrees of freedom, p = 4e-5
    first, last = signals.values[:, 0], signals.values[:, -1]
    for level in (first, last):
        assert abs(level.mean()) < 4 / math.sqrt(6000)
        assert abs(level.var() - 1) < 4 * math.sqrt(2 / 6000)
    assert abs((first * last).mean()) < 4 / math.sqrt(6000)


def test_repr():
    shown = repr(function_approximation("piecewise_constant", batch=2, length=64, n_pieces=8))
    assert shown == "Signals(piecewise_constant: batch=2, length=64, n_pieces=8)"


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"kind": "step"}, r"kind='step' is unknown; known: .*; did you mean 'steps'\?"),
        ({"n_pieces": 1}, r"n_pieces >= 2 \(got 1\)"),
        ({"length": 7, "n_pieces": 8}, r"length >= n_pieces \(got 7 < 8\)"),
        ({"batch": 0}, r"batch >= 1 \(got 0\)"),
        ({"jumps": [0.2, 0.4]}, r"len\(jumps\) == n_pieces - 1 \(got 2, 1\)"),
        ({"jumps": 0.5}, r"len\(jumps\) == n_pieces - 1 \(got 1, 1\)"),
        ({"jumps": [1.0]}, r"0 < jumps < 1, finite \(got \[1.0\]\)"),
        ({"jumps": [float("nan")]}, r"0 < jumps < 1, finite \(got \[nan\]\)"),
        ({"n_pieces": 3, "jumps": [0.6, 0.4]}, r"a sample of each piece: ceil\(16 \* jumps\) increasing"),
        ({"n_pieces": 3, "jumps": [0.51, 0.52]}, r"a sample of each piece: .* and <= 15 \(got \[9.0, 9.0\]\)"),
        ({"jumps": [0.99]}, r"a sample of each piece: .* \(got \[16.0\]\)"),
        ({"length": 16.0}, r"sizes and seed are integers; got length=16.0"),
    ],
)
def test_impossible_arguments(changed, message):
    with pytest.raises(ValueError, match=message):
        function_approximation(**({"length": 16} | changed))
