"""The signatures of a recall circuit: names, ideals, estimators and nulls, as data."""

from dataclasses import dataclass

import numpy as np

__all__ = ["ACTIVATION", "IDS", "SIGNATURES", "Signature", "absent", "ideals"]

MAMBA, S4D = ("mamba", "mamba2"), ("s4d",)
CONSTANT = "S4D's B, C and delta are the same at every token"
DIFFERENCE = "an S4D layer takes a difference of two lags; Mamba's B and x look at one each (S10_rel, S11)"
INPUTS = 'the mixer\'s input was not recorded: record it with variables=(..., "u")'


@dataclass(frozen=True)
class Signature:
    """One signature; `ideal` is its value in the closed-form circuit with one-hot keys (NaN: not diagnostic).

    Attributes:
        families: those it is defined in.
        reason: why not in the others.
        inputs: whether it needs the mixer's input `u`.
    """

    id: str
    label: str
    ideal: float
    estimator: str
    null: str
    families: tuple[str, ...] = (*MAMBA, *S4D)
    reason: str = ""
    inputs: bool = False


SWAP = "share of the squared change of {} under another token's mixer input at {} instead of another of its lags"
SIGNATURES = (
    Signature("S1", "pair accuracy", 1.0, "mean 1[argmax_w L_{t,w}[v*] = s*]", "1 / candidate writes"),
    Signature("S2", "attention share", 1.0, "mean |L_{t,s*}[v*]| / sum_s |L_{t,s}[v*]|", "1 / tokens up to the query"),
    Signature(
        "S2_sum", "attention share over offsets", 1.0,
        "S2 summed over s* and the tokens after it, up to the largest offset and before the next value",
        "as many / tokens up to the query",
    ),
    Signature("S3", "OV accuracy", 1.0, "mean 1[argmax_v L_{t,s*}[v] = v*]", "1 / values"),
    Signature(
        "S4", "effective retention", 1.0, "sum |L_{t,s*}| / sum |L_{t,s*} without decay|, norms over the values",
        "0: all is forgotten",
    ),
    Signature(
        "S5", "match margin", 1.0, "mean (C_t.B_s* - max_{w!=s*} C_t.B_w) / (|C_t| max_w |B_w|)",
        "mean over permutations of the candidate writes", MAMBA, CONSTANT,
    ),
    Signature(
        "S6", "match accuracy", 1.0, "mean 1[argmax_w C_t.B_w = s*]", "1 / candidate writes", MAMBA, CONSTANT,
    ),
    Signature(
        "S7", "write selectivity", 1.0,
        "sum_W E_s / sum_s E_s, E_s = sum_c |W_out_c|^2 (delta_s x_s)^2 |B_s|^2 (S4D: x_s alone)",
        "share of tokens that are candidate writes",
    ),
    Signature(
        "S8", "log-delta contrast (not diagnostic)", float("nan"), "mean_W log delta - mean_{not W} log delta", "0",
        MAMBA, CONSTANT,
    ),
    Signature(
        "S9", "gate energy on keys", 1.0,
        "sum_{keys, queries} |g_t|^2 / sum_t |g_t|^2, |g_t|^2 = sum_c |W_out_c|^2 SiLU(z_t)^2",
        "share of tokens that are keys or queries",
    ),
    Signature(
        "S10_rel", "tap shift B against x", 1.0,
        "P_rel = sum_{b-a=1} m_B(b) m_x(a), m = share of squared conv weight by lag",
        "(k-1)/k^2, uniform taps of width k", MAMBA, CONSTANT,
    ),
    Signature(
        "S10_C0", "tap of C at lag 0", 1.0, "P_C0 = m_C(0)", "1/k, uniform taps of width k", MAMBA, CONSTANT,
    ),
    Signature("S10_x0", "tap of x on the value", 0.5, "m_x(offset)", "1/k, uniform taps of width k", S4D, DIFFERENCE),
    Signature("S10_x1", "tap of x on the key", 0.5, "m_x(offset + 1)", "1/k, uniform taps of width k", S4D, DIFFERENCE),
    Signature(
        "S11_B", "lag swap: B at writes", 1.0, SWAP.format("B at writes", "lag offset + 1"), "1/k", MAMBA, CONSTANT,
        True,
    ),
    Signature(
        "S11_C", "lag swap: C at queries", 1.0, SWAP.format("C at queries", "lag 0"), "1/k", MAMBA, CONSTANT, True
    ),
    Signature(
        "S11_x", "lag swap: x at writes", 1.0,
        SWAP.format("x, weighted by |W_out|^2, at writes", "lag offset (S4D: offset and offset + 1)"),
        "1/k (S4D: 2/k)", inputs=True,
    ),
    Signature(
        "S12", "AND index of a channel", 1.0,
        "(x11 - x10 - x01 + x00) / (|x11 - x00| + |x10 - x00| + |x01 - x00|), x at a channel's best key and then value,"
        " each there (1) or no input (0); channels weighted by |W_out|^2 x11^2",
        "0: the two add up", S4D, DIFFERENCE, True,
    ),
    Signature(
        "S13", "write key against gate key", 1.0,
        "correlation over keys of x at the channel's best value with SiLU(z) at queries; channels weighted as in S12",
        "0: no correlation", S4D, DIFFERENCE, True,
    ),
)  # fmt: skip

IDS = tuple(signature.id for signature in SIGNATURES)
ACTIVATION = IDS[: IDS.index("S9") + 1]
"""Those tallied on a prompt's activations, in the order of `tally.tally`; S11 has a tally of its own."""


def absent(family: str, inputs: bool) -> list[str]:
    """Why each signature cannot be measured on traces of `family`, with the mixer's input or without; "" where it can.

    >>> absent("mamba", inputs=False)[IDS.index("S11_B")][:34]
    "the mixer's input was not recorded"
    """
    return [s.reason if family not in s.families else INPUTS if s.inputs and not inputs else "" for s in SIGNATURES]


def ideals(family: str) -> list[float]:
    """The ideal of each signature in `family`, NaN where it is not defined there."""
    return [s.ideal if family in s.families else float(np.nan) for s in SIGNATURES]
