"""Wrong arguments of a scan: each answered by name, with what was expected and what came."""

import pytest
import torch

from mamba_probe.kernels.scan import Emit, selective_scan

BATCH, TOKEN, HEAD, CHANNEL, GROUP, STATE = 2, 5, 4, 3, 2, 6


@pytest.fixture
def good(oracle):
    return oracle.draw("mamba2", BATCH, TOKEN, GROUP, shape=(HEAD, CHANNEL, STATE, True))


WRONG_SHAPES = {
    "x": ((BATCH, TOKEN, HEAD), r"`x` must have shape \(batch, token, head, head_channel\); got \(2, 5, 4\)"),
    "delta": ((BATCH, HEAD, TOKEN), r"`delta` must have shape \(batch 2, token 5, head 4\); got \(2, 4, 5\)"),
    "A": ((STATE,), r"`A` must have shape \(head 4\); got \(6,\)"),
    "B": ((BATCH, TOKEN, STATE), r"`B` must have shape \(batch 2, token 5, group, state\); got \(2, 5, 6\)"),
    "C": ((BATCH, TOKEN, GROUP, 5), r"`C` must have shape \(batch 2, token 5, group 2, state 6\); got \(2, 5, 2, 5\)"),
    "D": ((CHANNEL,), r"`D` must have shape \(head 4\); got \(3,\)"),
    "z": ((BATCH, TOKEN, HEAD, 1), r"`z` must have shape \(batch 2, token 5, head 4, head_channel 3\)"),
    "delta_bias": ((1,), r"`delta_bias` must have shape \(head 4\); got \(1,\)"),
    "initial_state": (
        (BATCH, HEAD, STATE, CHANNEL),
        r"`initial_state` must have shape \(batch 2, head 4, head_channel 3, state 6\)",
    ),
}


@pytest.mark.parametrize("name", WRONG_SHAPES)
def test_shapes(good, name):
    shape, message = WRONG_SHAPES[name]
    with pytest.raises(ValueError, match=message):
        selective_scan(**good | {name: torch.zeros(shape)})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"A": torch.zeros(HEAD, STATE + 1)}, r"`A` must have shape \(head 4, state 6\); got \(4, 7\)"),
        ({"A": torch.zeros(HEAD, STATE, 1)}, r"`A` must have shape \(head 4, state 6\); got \(4, 6, 1\)"),
        ({"A": torch.tensor(1.0)}, r"`A` must have shape \(head 4\); got \(\)"),
        ({"D": torch.zeros(HEAD, 2)}, r"`D` must have shape \(head 4, head_channel 3\); got \(4, 2\)"),
        (
            {"A": torch.zeros(HEAD, dtype=torch.complex64)},
            r"`B` is torch.float32, `A` torch.complex64: A, B, C, .* are all complex \(S4D\) or all real",
        ),
        (
            {"initial_state": torch.zeros(BATCH, HEAD, CHANNEL, STATE, dtype=torch.complex64)},
            r"`initial_state` is torch.complex64, `A` torch.float32: .* all complex",
        ),
        (
            {"x": torch.zeros(BATCH, TOKEN, HEAD, CHANNEL, dtype=torch.complex64)},
            r"`x` must be real; got torch.complex64: only A, B, C, initial_state, log_decay may be complex",
        ),
        ({"B": torch.zeros(GROUP, STATE + 1)}, r"`C` must have shape \(.*, group 2, state 7\); got \(2, 5, 2, 6\)"),
        ({"C": torch.zeros(GROUP + 1, STATE)}, r"`C` must have shape \(group 2, state 6\); got \(3, 6\)"),
        ({"C": torch.zeros(STATE)}, r"`C` must have shape \(batch 2, token 5, group 2, state 6\); got \(6,\)"),
        ({"seq_idx": torch.zeros(BATCH, TOKEN)}, r"`seq_idx` must be int32 or int64, .*; got torch.float32"),
        ({"seq_idx": torch.zeros(TOKEN, BATCH).int()}, r"`seq_idx` must have shape \(batch 2, token 5\); got \(5, 2\)"),
        ({"seq_idx": [0, 0]}, r"`seq_idx` must be a torch.Tensor; got list"),
        (
            {"log_decay": torch.zeros(BATCH, TOKEN, HEAD, STATE)},
            r"`log_decay` must have shape \(batch 2, token 5, head 4\); got \(2, 5, 4, 6\)",
        ),
        (
            {"A": torch.zeros(HEAD, STATE), "log_decay": torch.zeros(BATCH, TOKEN, HEAD)},
            r"`log_decay` must have shape \(batch 2, token 5, head 4, state 6\); got \(2, 5, 4\)",
        ),
        (
            {"log_decay": torch.zeros(BATCH, TOKEN, HEAD, dtype=torch.float64)},
            r"float64 is all or none: log_decay are float64, x, .* are not",
        ),
        ({"discretization": "zho"}, r"unknown `discretization` 'zho'; did you mean 'zoh'\? Known: euler, zoh"),
        ({"discretization": "bilinear"}, r"unknown `discretization` 'bilinear'. Known: euler, zoh"),
        ({"delta": None}, r"`delta` must be a torch.Tensor; got NoneType"),
        ({"x": [1.0]}, r"`x` must be a torch.Tensor; got list"),
        ({"D": 1.0}, r"`D` must be a torch.Tensor; got float"),
        (
            {"delta": torch.zeros(BATCH, TOKEN, HEAD, dtype=torch.int32)},
            r"`delta` must be float32, .*; got .*int32",
        ),
        ({"z": torch.zeros(BATCH, TOKEN, HEAD, CHANNEL, device="meta")}, r"`z` is on meta, `x` on cpu: move them"),
        (
            {"A": torch.zeros(HEAD, dtype=torch.float64)},
            r"float64 is all or none: A are float64, x, .* are not",
        ),
        ({"delta_limits": (1.0, 0.5)}, r"`delta_limits` must be \(low, high\) with low <= high; got \(1.0, 0.5\)"),
        ({"delta_limits": (0.0, float("nan"))}, r"`delta_limits` must be \(low, high\)"),
        ({"delta_limits": 0.5}, r"`delta_limits` must be two numbers \(low, high\); got 0.5"),
        ({"backend": "tritn"}, r"unknown `backend` 'tritn'; did you mean 'triton'\? Known: auto, naive, cpu, triton"),
        ({"backend": "fused"}, r"unknown `backend` 'fused'. Known: auto, naive, cpu, triton"),
        ({"emit": ("delta",)}, r"`emit` must be an Emit; got tuple"),
        ({"emit": Emit(("h",), tokens=[1, TOKEN])}, r"`emit.tokens` holds 5, but this call has 5 tokens: 0 .. 4"),
        ({"emit": Emit(("h",), channels=[HEAD])}, r"`emit.channels` holds 4, but this call has 4 heads: 0 .. 3"),
    ],
    ids=str,
)
def test_one_wrong_argument(good, change, message):
    with pytest.raises(ValueError, match=message):
        selective_scan(**good | change)


def test_heads_must_be_a_multiple_of_groups(oracle):
    arguments = oracle.draw("mamba2", 1, 3, 1)
    three = {name: arguments[name].expand(-1, -1, 3, -1) for name in "BC"}
    with pytest.raises(ValueError, match=r"head must be a multiple of group; got 4 heads \(`x`\) and 3 groups \(`B`\)"):
        selective_scan(**arguments | three)


def test_an_empty_sequence(oracle):
    with pytest.raises(ValueError, match=r"`x` has no token: the sequence is empty, shape \(2, 0, 4, 3\)"):
        selective_scan(**oracle.draw("mamba2", 2, 0))


def test_an_empty_axis(oracle):
    with pytest.raises(ValueError, match="axis batch has size 0"):
        selective_scan(**oracle.draw("mamba2", 0, 3))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"variables": ("delta", "hh")}, r"no scan emits 'hh' \(`variables`\); did you mean 'h'\? Known: delta, A_bar"),
        ({"variables": ("out_proj",)}, r"no scan emits 'out_proj' \(`variables`\). Known: delta"),
        ({"variables": "delta"}, r"`variables` must be a tuple of names; got the string 'delta': write \('delta',\)"),
        ({"variables": ("h", "h")}, r"`variables` names one twice: h, h"),
        ({"tokens": [2, 1]}, r"`tokens` must increase strictly; got 2, 1"),
        ({"tokens": [1, 1]}, r"`tokens` must be distinct and not negative; got 1, 1"),
        ({"tokens": [-1, 3]}, r"`tokens` must be distinct and not negative; got -1, 3"),
        ({"tokens": []}, r"`tokens` is empty; None means all"),
        ({"tokens": [0.5]}, r"`tokens` must be a sequence of integers or None; got \[0.5\]"),
        ({"channels": 3}, r"`channels` must be a sequence of integers or None; got 3"),
        ({"channels": [3, 3]}, r"`channels` must be distinct and not negative; got 3, 3"),
    ],
    ids=str,
)
def test_emit(fields, message):
    with pytest.raises(ValueError, match=message):
        Emit(**{"variables": ("delta",)} | fields)


def test_emit_accepts_any_integers():
    emit = Emit(["h"], tokens=torch.arange(3), channels=range(2))
    assert (emit.variables, emit.tokens, emit.channels) == (("h",), (0, 1, 2), (0, 1))
