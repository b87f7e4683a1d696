"""The signatures of a recall circuit: names, ideals, estimators and nulls, as data."""

from dataclasses import dataclass

__all__ = ["ACTIVATION", "IDS", "SIGNATURES", "Signature"]


@dataclass(frozen=True)
class Signature:
    """One signature; `ideal` is its value in the closed-form circuit (NaN: not diagnostic)."""

    id: str
    label: str
    ideal: float
    estimator: str
    null: str


SIGNATURES = (
    Signature("S1", "pair accuracy", 1.0, "mean 1[argmax_w L_{t,w}[v*] = s*]", "1 / candidate writes"),
    Signature("S3", "OV accuracy", 1.0, "mean 1[argmax_v L_{t,s*}[v] = v*]", "1 / values"),
    Signature(
        "S5", "match margin", 1.0, "mean (C_t.B_s* - max_{w!=s*} C_t.B_w) / (|C_t| max_w |B_w|)",
        "mean over permutations of the candidate writes",
    ),
    Signature("S6", "match accuracy", 1.0, "mean 1[argmax_w C_t.B_w = s*]", "1 / candidate writes"),
    Signature(
        "S7", "write selectivity", 1.0, "sum_W E_s / sum_s E_s, E_s = sum_c |W_out_c|^2 (delta_s x_s)^2 |B_s|^2",
        "share of tokens that are candidate writes",
    ),
    Signature(
        "S8", "log-delta contrast (not diagnostic)", float("nan"), "mean_W log delta - mean_{not W} log delta", "0",
    ),
    Signature(
        "S9", "gate energy on keys", 1.0,
        "sum_{keys, queries} |g_t|^2 / sum_t |g_t|^2, |g_t|^2 = sum_c |W_out_c|^2 SiLU(z_t)^2",
        "share of tokens that are keys or queries",
    ),
    Signature(
        "S10_rel", "tap shift B against x", 1.0,
        "P_rel = sum_{b-a=1} m_B(b) m_x(a), m = share of squared conv weight by lag",
        "(k-1)/k^2, uniform taps of width k",
    ),
    Signature("S10_C0", "tap of C at lag 0", 1.0, "P_C0 = m_C(0)", "1/k, uniform taps of width k"),
)  # fmt: skip

IDS = tuple(signature.id for signature in SIGNATURES)
ACTIVATION = IDS[:7]
"""Those measured on activations, in the order of `core.tally`; the others are read from the weights."""
