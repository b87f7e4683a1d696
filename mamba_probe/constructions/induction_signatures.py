"""What each state of an induction head is for, and the ideal value of its signatures.

The signatures are those of `recall_signatures`. With kind="special", an earlier occurrence of the special token is a
key, what follows it a value and a candidate write, and the last token the query. With kind="every" each token is all
three, which leaves S7 and S9 nothing to tell apart.
"""

__all__ = ["induction_signatures", "induction_states"]

EXACT = {"S1": 1.0, "S2": 1.0, "S3": 1.0, "S4": 1.0}
COUNTED = {"S10_x0": 0.5, "S10_x1": 0.5, "S11": 1.0, "S12": 1.0}
SIGNATURES = {
    # one state, B and C constant, delta selects: no S5, S6, S10, S11
    ("special", "mamba1"): {**EXACT, "S7": 1.0, "S9": 1.0},
    # the query itself shrinks what it reads to a quarter; older writes count less, not nothing: no S2; B is the same at
    # every write: no S5, S6; C is constant: no S10_C0
    ("special", "mamba2"): {"S1": 1.0, "S3": 1.0, "S4": 0.25, "S7": 1.0, "S9": 1.0, "S10_rel": 1.0},
    # two earlier occurrences weigh the same: no S1, S2; a single key: no S13
    ("special", "s4d"): {"S3": 1.0, "S4": 1.0, "S7": 1.0, "S9": 1.0, **COUNTED},
    ("every", "mamba1"): EXACT,
    ("every", "mamba2"): EXACT,  # of the second layer
    ("every", "s4d"): {"S3": 1.0, "S4": 1.0, **COUNTED, "S13": 1.0},
}
STATES = {
    ("every", "mamba2"): ["unused", "newest token"],  # the first layer's, the second's
    ("special", "mamba2"): ["tokens, the older the fainter"],
}


def induction_signatures(kind: str, mixer: str) -> dict[str, float]:
    """Return the ideal of each signature that has one."""
    return dict(SIGNATURES[kind, mixer])


def induction_states(kind: str, mixer: str) -> list[str]:
    """Return what each state is for, layer after layer."""
    return list(STATES.get((kind, mixer), ["sum of all writes" if mixer == "s4d" else "newest token"]))
