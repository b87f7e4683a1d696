"""Dataset in, Dataset out: what each place gives back of an answer whose key was corrupted, nulls and intervals."""

from typing import Any

import numpy as np
import xarray as xr
from jaxtyping import Float

from mamba_probe.analyses.association.core import gain, share
from mamba_probe.analyses.association.verdict import RULE, say
from mamba_probe.analyses.common import described, interval
from mamba_probe.analyses.common.proportion import wilson
from mamba_probe.analyses.common.result import Entry

__all__ = ["measure"]

NEEDED = (
    "patched",
    "right",
    "null_patched",
    "null_right",
    "clean",
    "corrupt",
    "clean_right",
    "corrupt_right",
    "counts",
)
PLACE = ("site", "layer", "role")
_TEXT = {
    "recovered": "how much of the answer comes back",
    "restored": "share of the rows that are answered right again",
    "null_recovered": "how much comes back with what stood there in another row",
    "null_restored": "share of the rows that are right with what stood there in another row",
    "twin_recovered": "how much of the randomised twin's change comes back, over all rows",
}
_END = {"": "", "_low": ", lower end of the interval", "_high": ", upper end of the interval"}


def measure(found: xr.Dataset, *, n_bootstrap: int = 200, seed: int = 0) -> xr.Dataset:
    r"""Where the pair of an asked key is held: the answer that each site, layer and token gives back.

    $$\mathrm{recovered} = \frac{\sum_i (p_i - c_i)(k_i - c_i)}{\sum_i (k_i - c_i)^2}$$

    over rows that the model answers, and no longer answers once the key is corrupted; p, c, k: the answer's logit less
    the mean of the row's other values, patched, corrupt and clean. Of one row it is (p - c) / (k - c). Source: the
    intervention of Arora et al., arXiv 2505.15105; sites, estimator, gate and nulls: ours.

    Args:
        found: what `probe.associating(task)` returned.
        n_bootstrap: replicates of the intervals, over rows; at least 2.
        seed: of the replicates.

    Returns:
        recovered, restored, null_recovered, null_restored [and twin_recovered] (site, layer, role), each with _low and
        _high; n_rows (role) that have the token; scalars accuracy, accuracy_low, accuracy_high, n_query, n_correct,
        n_counted, corrupt_accuracy, solved. All but the twin's are NaN unless `solved`: the lower 95 % bound of the
        accuracy above .5. The twin answers nothing, so that its numbers are of all rows. attrs["verdict"] says it.

    Raises:
        ValueError: not what `probe.associating` returned, or fewer than two replicates.

    >>> import mamba_probe as mp
    >>> from mamba_probe.associating import associating
    >>> built = mp.constructions.mqar(n_keys=16, n_values=16)
    >>> with mp.attach(built.model) as probe:
    ...     found = associating(probe, mp.tasks.mqar(batch=8, length=16, n_pairs=3, vocab=32))
    >>> measure(found).attrs["mechanism"]
    'convolution'
    """
    _check(found)
    n_rows, right = found.sizes["batch"], int(found["clean_right"].sum())
    low, high = wilson(right, n_rows)
    solved, counts = low > 0.5, found["counts"].values
    chosen = found.isel(batch=np.flatnonzero(counts if solved else np.zeros(n_rows, bool)))
    entries = _of_rows(chosen, n_bootstrap, seed)
    if "twin_patched" in found:
        change, span = _change(found, "twin_patched", "twin_corrupt", "twin_clean")
        entries |= _with_interval("twin_recovered", lambda draws: gain(change, span, draws), n_rows, n_bootstrap, seed)
    entries["n_rows"] = (("role",), chosen["valid"].values.sum(axis=1), "rows that have such a token", "1")
    scalars = {
        "accuracy": (right / n_rows, "share of the rows answered right"),
        "accuracy_low": (low, "lower 95 % Wilson bound of the accuracy"),
        "accuracy_high": (high, "upper 95 % Wilson bound of the accuracy"),
        "corrupt_accuracy": (float(found["corrupt_right"].mean()), "share answered right with the key corrupted"),
        "n_query": (n_rows, "queries, one a row"),
        "n_correct": (right, "queries answered right"),
        "n_counted": (int(counts.sum()), "rows answered right, and wrong once the key is corrupted"),
        "solved": (solved, "lower bound of the accuracy above 0.5"),
    }
    entries |= {name: ((), np.array(value), text, "1") for name, (value, text) in scalars.items()}
    coords = {name: found[name].values for name in PLACE}
    result = described(entries, coords, _attributes(found, len(chosen["batch"]), n_bootstrap, seed))
    mechanism, verdict = say(result)
    return result.assign_attrs(mechanism=mechanism, verdict=verdict, verdict_rule=RULE)


def _check(found: xr.Dataset) -> None:
    if any(name not in found for name in NEEDED):
        came = f"a Dataset of {', '.join(map(str, found)) or 'nothing'}"
        raise ValueError(f"association.measure takes what probe.associating(task) returned; got {came}")


def _change(
    found: xr.Dataset, patched: str, corrupt: str, clean: str
) -> tuple[Float[np.ndarray, "site layer role batch"], Float[np.ndarray, " batch"]]:
    """What each entry changed, and what the corruption did."""
    base = found[corrupt].values
    return found[patched].transpose(*PLACE, "batch").values - base, found[clean].values - base


def _of_rows(chosen: xr.Dataset, n_bootstrap: int, seed: int) -> dict[str, Entry]:
    """The numbers and the row null's, of the rows that count."""
    entries: dict[str, Entry] = {}
    for prefix in ("", "null_"):
        change, span = _change(chosen, f"{prefix}patched", "corrupt", "clean")
        right, there = chosen[f"{prefix}right"].transpose(*PLACE, "batch").values, ~np.isnan(change)
        for name, statistic in {
            "recovered": lambda draws, change=change, span=span: gain(change, span, draws),
            "restored": lambda draws, right=right, there=there: share(right, there, draws),
        }.items():
            entries |= _with_interval(f"{prefix}{name}", statistic, chosen.sizes["batch"], n_bootstrap, seed)
    return entries


def _with_interval(name: str, statistic: Any, n_rows: int, n_bootstrap: int, seed: int) -> dict[str, Entry]:
    value = statistic(np.ones(n_rows, dtype=int))
    low, high = interval(statistic, n_rows, n_bootstrap, seed)
    parts = zip(_END.items(), (value, low, high), strict=True)
    return {f"{name}{end}": (PLACE, part, f"{_TEXT[name]}{words}", "1") for (end, words), part in parts}


def _attributes(found: xr.Dataset, n_counted: int, n_bootstrap: int, seed: int) -> dict[str, str]:
    return {
        "analysis": "association",
        "model": str(found.attrs.get("model", "unnamed model")),
        "estimator": "least squares through the origin of patched - corrupt on clean - corrupt, in the answer's logit"
        " less the mean of the row's other values; interventions exact",
        "corruption": str(found.attrs.get("corruption", "not stated")),
        "null": "null_*: what stood at that role in another row of another key and value; role other: a token that the"
        " key does not reach; twin_*: the same architecture untrained",
        "interval": "95 % percentile bootstrap over rows" if n_counted > 1 else "NaN: fewer than two rows count",
        "reduces_over": "batch: rows answered right, and wrong once the key is corrupted; twin_*: all rows",
        "n_rows": str(n_counted),
        "n_bootstrap": str(n_bootstrap),
        "seed": str(seed),
    }
