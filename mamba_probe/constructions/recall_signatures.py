"""What each state of a recall model is for, and the ideal value of its signatures, see `analyses.recall_circuit`.

Ideals hold on `tasks.mqar` with zero filler and keys that come once, wherever a query has two candidate writes. Those
that it measures: S1 pair accuracy, S3 OV accuracy, S5 match margin, S6 match accuracy, S7 write selectivity, S9 gate
energy on keys, S10_rel and S10_C0 the taps of B against x and of C. Further ones:

    S2     share of the sources' absolute logits of the answer that is the right write's
    S4     what the right write gives a query, over what it would give without decay
    S10_x0, S10_x1    S4D: share of squared convolution weight at lags 0 and 1
    S11    share of the change of B, C and x, under a change of one lag's input, at the lags they are made for:
           1, 0 and 0 of B, C and x; 0 and 1 of S4D's x
    S12    S4D: a channel's x at its best key and then value, each there (1) or no input (0):
           (x11 - x10 - x01 + x00) / (|x11 - x00| + |x10 - x00| + |x01 - x00|)
    S13    S4D: a channel's correlation, over the keys, of what it writes at its best value with its gate

S8, the contrast of log delta, is not diagnostic.
"""

__all__ = ["gated_signatures", "recall_signatures", "recall_states"]

ROUTE = {"S7": 1.0, "S9": 1.0}
TAPS = {"S10_rel": 1.0, "S10_C0": 1.0, "S11": 1.0}
DIFFERENCE = {"S10_x0": 0.5, "S10_x1": 0.5, "S11": 1.0, "S12": 1.0}


def recall_signatures(mixer: str, key_code: str, writes: str) -> dict[str, float]:
    """Return the ideal of each signature that has one.

    Left out: S1, S2 and S5 of random keys, and S2 and S5 of constant-weight ones, where they depend on how far the
    row's keys overlap (S5 is at least 1/w there, w ones a key, and S2 at most 1); S4 where writes="last", 0.4 to the
    number of later writes; S5, S6, S10 and S11 of "overwrite", where B and C are constant and delta selects; S13 of
    random keys in S4D, where some channels take any key.
    """
    if writes == "overwrite":
        return {"S1": 1.0, "S2": 1.0, "S3": 1.0, "S4": 1.0, **ROUTE}
    found = {"S3": 1.0, "S4": 1.0, **ROUTE, **(DIFFERENCE if mixer == "s4d" else {"S6": 1.0, **TAPS})}
    if key_code != "random":
        found |= {"S1": 1.0} | ({"S13": 1.0} if mixer == "s4d" else {})
    if key_code == "one-hot":
        found |= {"S2": 1.0} | ({} if mixer == "s4d" else {"S5": 1.0})
    if writes == "last":
        del found["S4"]
    return dict(sorted(found.items(), key=lambda item: (int(item[0][1:].split("_")[0]), item[0])))


def gated_signatures(key_code: str) -> dict[str, float]:
    """Return those of `mqar_gated`, amid random filler: without S9, as keys in the filler open the gate too."""
    found = recall_signatures("mamba1", key_code, "add")
    del found["S9"]
    return found


def recall_states(mixer: str, key_code: str, writes: str, count: int) -> list[str]:
    """Return what each of `count` states is for."""
    if mixer == "s4d":
        return ["sum of all writes"]
    if writes == "overwrite":
        return ["newest value"]
    if key_code == "random" and mixer == "mamba2":
        return [f"key bit {bit}" for bit in range(count - 1)] + ["mean of the bits' overlap"]
    return [f"{'key' if key_code == 'one-hot' else 'key bit'} {state}" for state in range(count)]
