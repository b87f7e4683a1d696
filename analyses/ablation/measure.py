"""Trace and ablation in, effects out: gate, nulls, intervals, and the entropy of what each unit reads."""

import numpy as np
import xarray as xr
from jaxtyping import Float

from mamba_probe.analyses import hidden_attention
from mamba_probe.analyses.ablation.core import FEWEST, SHUFFLES, correlation, unit_entropy
from mamba_probe.analyses.common import described, refuse
from mamba_probe.analyses.common.paired import FEWEST_ROWS, P_VALUES, by_row, paired
from mamba_probe.analyses.common.proportion import wilson
from mamba_probe.analyses.common.result import Entry
from mamba_probe.analyses.hidden_attention.plan import Queries
from mamba_probe.trace import require

__all__ = ["QUANTITIES", "measure"]

QUANTITIES = {"accuracy": ("correct", -1.0), "loss": ("loss", 1.0)}
"""What is scored: its name in an ablation, and the sign with which a change of it is a harm."""
MOST_QUERIES = 8
"""Queries of a row whose entropies are taken, unless told."""

NEEDED = (
    *("loss", "correct", "unit_loss", "unit_correct", "valid"),
    *("unit", "kind", "layer", "first", "size", "unit_pool"),
)
"""Variables and coordinates of `probe.ablate_units` that are read."""


def measure(
    trace: xr.Dataset, *, ablated: xr.Dataset, query_tokens: Queries = None, n_bootstrap: int = 200, seed: int = 0,
    weights: object = None, interventions: object = None, baseline: object = None,
) -> xr.Dataset:  # fmt: skip
    r"""Measure what each layer, head or group of channels is worth, beside the entropy of what it reads.

    $$\mathrm{effect}_u = \frac{1}{R} \sum_r \left( m_r(\text{without } u) - m_r \right), \qquad
    \mathrm{excess}_u = \mathrm{effect}_u - \overline{\mathrm{effect}}_{\text{as many random channels}}$$

    m_r is the accuracy or the mean loss of a row. Source: zeroing single heads, arXiv 2504.18574; gate, null, tests
    and the correlation are ours. Cost: one forward a unit and random set, and what `hidden_attention` costs.

    Args:
        trace: delta, A, B and C of the rows that were ablated, with `valid` and `position`.
        ablated: of `ablate_units(probe, ...)`, same rows.
        query_tokens: of the entropies, as in `hidden_attention.measure`; None: of a task each row's last
            queries (8, or as many as every row has), else the last valid token.
        n_bootstrap: replicates of the 95 % intervals, over rows, paired; NaN with one row.
        seed: of replicates, signs and shuffles.
        weights, interventions, baseline: not used; refused.

    Returns:
        effect_, random_ and excess_ accuracy and loss (unit), effect and excess with intervals and p-values over all
        units (accuracy is below 0, loss above 0 where the unit is needed); entropy (unit), of |alpha|, in nats;
        correlation of harm and entropy over heads or groups, with interval and null range. Of a task: accuracy, its
        interval, n_correct, n_query, solved; where the lower bound is at most 0.5 every effect is NaN, and
        attrs["verdict"] says so.

    Raises:
        ValueError: an ablation of other rows or another model, and what `hidden_attention.measure` refuses.

    >>> measure(xr.Dataset(), ablated=xr.Dataset())
    Traceback (most recent call last):
    ValueError: ablated is what ablate_units(probe, ...) returned; it has no unit_loss
    """
    refuse("ablation", weights=weights, interventions=interventions, baseline=baseline)
    if "unit_loss" not in ablated:
        raise ValueError("ablated is what ablate_units(probe, ...) returned; it has no unit_loss")
    if n_bootstrap < 2:
        raise ValueError(f"n_bootstrap must be at least 2; got {n_bootstrap}")
    _check_same(trace, ablated)
    gate = _gate(ablated)
    found = _effects(ablated, n_bootstrap, seed)
    entropy = _entropy(trace, ablated, query_tokens)
    found["entropy"] = _over_rows(entropy)
    found |= _correlated(ablated, entropy, n_bootstrap, seed)
    if not gate["solved"]:
        scored = [name for name in found if name.startswith(("effect", "random", "rank", "excess", "correlation"))]
        found |= {name: np.full_like(found[name], np.nan) for name in scored}
    task = "task" in ablated.attrs
    entries = {name: _entry(name, np.asarray(values)) for name, values in (found | (gate if task else {})).items()}
    coords = {name: ablated[name] for name in ("unit", "kind", "layer", "first", "size")}
    return described(entries, coords, _attributes(trace, ablated, gate, found, n_bootstrap, seed))


def _check_same(trace: xr.Dataset, ablated: xr.Dataset) -> None:
    require(trace, "delta", "A", "B", "C", "valid")
    missing = [name for name in NEEDED if name not in ablated.variables]
    if missing:
        raise ValueError(f"ablated lacks {', '.join(missing)}: pass what probe.ablate_units returned, whole")
    hashes = [data.attrs.get("model_hash") for data in (trace, ablated)]
    if None not in hashes and hashes[0] != hashes[1]:
        raise ValueError(f"ablated is of another model: model_hash {hashes[1]}, the trace's is {hashes[0]}")
    for name in ("valid", "token_id"):
        if name in trace.coords and not np.array_equal(trace[name].values, ablated[name].values):
            raise ValueError(
                f"ablated was made on other rows: its {name} is not the trace's. Give both the same inputs and mask"
            )


def _gate(ablated: xr.Dataset) -> dict[str, np.ndarray]:
    """Whether there is an effect to score: of a task, whether it is solved."""
    correct = ablated["correct"].values
    right, asked = int(np.nansum(correct)), int((~np.isnan(correct)).sum())
    low, high = wilson(right, asked)
    solved = "task" not in ablated.attrs or low > 0.5
    values = {"accuracy": right / asked, "accuracy_low": low, "accuracy_high": high, "n_correct": right}
    return {name: np.asarray(value) for name, value in (values | {"n_query": asked, "solved": solved}).items()}


def _changes(ablated: xr.Dataset, name: str) -> tuple[Float[np.ndarray, "row unit"], Float[np.ndarray, "row unit"]]:
    """Of each row: what a unit changes, and what its null does (NaN where it has none)."""
    stored = QUANTITIES[name][0]
    intact = by_row(ablated[stored].values)
    change = by_row(ablated[f"unit_{stored}"].values) - intact
    random = np.full(change.shape, np.nan)
    pool = ablated["unit_pool"].values
    if (pool >= 0).any():
        drawn = (by_row(ablated[f"random_{stored}"].values) - intact).mean(axis=1)
        random[pool >= 0] = drawn[pool[pool >= 0]]
    return change.T, random.T


def _effects(ablated: xr.Dataset, n_bootstrap: int, seed: int) -> dict[str, np.ndarray]:
    found: dict[str, np.ndarray] = {}
    for name in QUANTITIES:
        change, random = _changes(ablated, name)
        known = ablated["unit_pool"].values >= 0
        found |= {f"effect_{name}{end}": part for end, part in paired(change, n_bootstrap, seed).items()}
        found[f"random_{name}"] = _over_rows(random)
        found |= _ranked(ablated, name, change)
        excess = paired((change - random)[:, known], n_bootstrap, seed) if known.any() else {}
        for end in ("", "_low", "_high", "_p"):
            found[f"excess_{name}{end}"] = whole = np.full(len(known), np.nan)
            whole[known] = excess.get(end, np.nan)
    return found


def _ranked(ablated: xr.Dataset, name: str, change: Float[np.ndarray, "row unit"]) -> dict[str, np.ndarray]:
    """Range of the random sets of each unit's size, and the rank of the unit among them, times units (Bonferroni)."""
    pool = ablated["unit_pool"].values
    low, high, p = np.full((3, len(pool)), np.nan)
    if (pool >= 0).any():
        stored, sign = QUANTITIES[name]
        drawn = by_row(by_row(ablated[f"random_{stored}"].values) - by_row(ablated[stored].values))[pool]
        known, effect = pool >= 0, by_row(change.T)
        reached = (sign * drawn >= sign * effect[:, None]).sum(axis=1)
        p[known] = np.minimum(1.0, known.sum() * (1 + reached[known]) / (1 + drawn.shape[1]))
        low[known], high[known] = drawn.min(axis=1)[known], drawn.max(axis=1)[known]
    return {f"random_{name}_min": low, f"random_{name}_max": high, f"rank_{name}_p": p}


def _over_rows(values: Float[np.ndarray, "row unit"]) -> Float[np.ndarray, " unit"]:
    return by_row(values.T)


def _entropy(trace: xr.Dataset, ablated: xr.Dataset, query_tokens: Queries) -> Float[np.ndarray, "row unit"]:
    """Entropy of what each unit's heads read, by row; NaN of layers or heads that the trace lacks."""
    queries = _last_queries(trace) if query_tokens is None else query_tokens
    read = hidden_attention.measure(trace, query_tokens=queries, n_bootstrap=2)
    each = by_row(np.moveaxis(read["entropy"].values, 2, -1))  # (layer, batch, head)
    layers = {layer: place for place, layer in enumerate(read["layer"].values.tolist())}
    units = zip(*(ablated[name].values.tolist() for name in ("layer", "first", "size")), strict=True)
    labels = trace[trace["delta"].dims[-1]].values.astype(int)  # the model's own numbers: a trace may hold some of them
    whole = np.full((*each.shape[:-1], int(labels.max()) + 1), np.nan)
    whole[..., labels], held = each, set(labels.tolist())
    places = [
        (layers[layer], first, size) if layer in layers and held.issuperset(range(first, first + size)) else None
        for layer, first, size in units
    ]
    return unit_entropy(whole, places)


def _last_queries(trace: xr.Dataset) -> Queries:
    """Positions of each row's last queries, as many as all rows have; None without a task, or where a row has none."""
    if "role" not in trace.coords:
        return None
    asked = (trace["role"] == "query").values & trace["valid"].values
    n = min(MOST_QUERIES, int(asked.sum(axis=1).min()))
    position = trace["position"].values
    return np.stack([row[one][-n:] for row, one in zip(position, asked, strict=True)]) if n else None


def _scored(ablated: xr.Dataset) -> str:
    return "accuracy" if "task" in ablated.attrs else "loss"


def _correlated(ablated: xr.Dataset, entropy: np.ndarray, n_bootstrap: int, seed: int) -> dict[str, np.ndarray]:
    name = _scored(ablated)
    harm = QUANTITIES[name][1] * _changes(ablated, name)[0]
    part = ablated["kind"].values != "layer"
    found = correlation(harm[:, part], entropy[:, part], n_bootstrap, seed)
    return {f"correlation{end}": np.asarray(value) for end, value in found.items()}


_TEXT = {
    "effect": "change with the unit taken out",
    "random": "change with as many random channels taken out, mean over draws",
    "rank": "rank of the harm among random sets of as many channels, times the units that have such sets",
    "excess": "effect less that of random channels, paired by row",
}
_END = {"_low": ", lower end of the interval", "_high": ", upper end of the interval", "_p": ", family-wise p-value",
        "_min": ", least of the sets", "_max": ", largest of the sets"}  # fmt: skip
_SCALAR = {
    "entropy": ("entropy of |alpha| of the unit's heads, mean over rows and queries", "nat"),
    "correlation": ("Spearman correlation of harm and entropy over heads or groups", "1"),
    "correlation_low": ("lower end of the interval of the correlation", "1"),
    "correlation_high": ("upper end of the interval of the correlation", "1"),
    "correlation_null_low": ("2.5 % quantile of the correlation with units paired at random", "1"),
    "correlation_null_high": ("97.5 % quantile of the correlation with units paired at random", "1"),
    "accuracy": ("share of queries answered, nothing ablated", "1"),
    "accuracy_low": ("lower end of the accuracy's score interval", "1"),
    "accuracy_high": ("upper end of the accuracy's score interval", "1"),
    "n_correct": ("queries answered, nothing ablated", "query"),
    "n_query": ("queries", "query"),
    "solved": ("whether the lower end of the accuracy is above 0.5", "1"),
}


def _entry(name: str, values: np.ndarray) -> Entry:
    dims = ("unit",)[: values.ndim]
    if name in _SCALAR:
        return dims, values, *_SCALAR[name]
    kind, quantity, *_ = name.split("_")
    end = next((text for end, text in _END.items() if name.endswith(end)), "")
    units = "1" if quantity == "accuracy" or name.endswith("_p") else "nat"
    return dims, values, f"{quantity}: {_TEXT[kind]}{end}", units


def _verdict(ablated: xr.Dataset, gate: dict[str, np.ndarray], found: dict[str, np.ndarray]) -> str:
    if not gate["solved"]:
        said = f"accuracy {gate['accuracy']:.2f}, {gate['accuracy_low']:.2f} to {gate['accuracy_high']:.2f}"
        return f"the model does not solve the task ({said}): it has no effect to score"
    name = _scored(ablated)
    needed = (found[f"effect_{name}_p"] <= 0.05) & (QUANTITIES[name][1] * found[f"effect_{name}"] > 0)
    ranked = found[f"rank_{name}_p"]
    more = (found[f"excess_{name}_p"] <= 0.05) & (ranked <= 0.05) & (QUANTITIES[name][1] * found[f"excess_{name}"] > 0)
    n, units, n_rows = len(needed), ablated["unit"].values, _n_scored(ablated, name)
    if n_rows < FEWEST_ROWS:
        most = int(np.argmax(QUANTITIES[name][1] * found[f"effect_{name}"]))
        largest = f"the largest change of {name} is {found[f'effect_{name}'][most]:.3g}, without {units[most]}"
        return f"{n_rows} row(s) tell no unit's effect from chance ({FEWEST_ROWS} are needed); {largest}"
    listed = ", ".join(units[more][:4].tolist()) + (", .." if more.sum() > 4 else "")
    beyond = f"{more.sum()} cost more {name} than as many random channels" + (f" ({listed})" if more.any() else "")
    sets, known = int(ablated.attrs["n_random"]), int(np.isfinite(ranked).sum())
    if known and known / (1 + sets) > 0.05:
        beyond = f"not told from the {sets} random sets drawn for each size, too few for {known} units"
    return f"{needed.sum()} of {n} units cost {name} when taken out; {beyond}"


def _n_scored(ablated: xr.Dataset, name: str) -> int:
    """Rows with any scored token."""
    return int(np.isfinite(by_row(ablated[QUANTITIES[name][0]].values)).sum())


def _attributes(
    trace: xr.Dataset, ablated: xr.Dataset, gate: dict[str, np.ndarray], found: dict[str, np.ndarray],
    n_bootstrap: int, seed: int,
) -> dict[str, str]:  # fmt: skip
    n_rows = trace.sizes["batch"]
    return {
        "analysis": "ablation",
        "model": str(trace.attrs.get("model", "unnamed model")),
        "verdict": _verdict(ablated, gate, found),
        "scored": _scored(ablated),
        "estimator": f"mean over rows of the change of each row's mean over {ablated.attrs['scored']}; "
        f"{ablated.attrs['ablated']} (heads after arXiv 2504.18574; the rest ours)",
        "null": f"{ablated.attrs['null']}; {ablated.attrs['n_random']} draws",
        "interval": "95 % percentile bootstrap over rows, paired"
        if n_rows > 1
        else "NaN: one row, nothing to resample",
        "p_values": P_VALUES,
        "correlation_rule": "Spearman, of harm (accuracy lost, or loss gained) and entropy, both mean over rows, over "
        f"heads or groups of all layers, at least {FEWEST}; null: {SHUFFLES} random pairings",
        "gate": "a task's effects are scored when the lower end of its accuracy's 95 % Wilson interval is above 0.5",
        "reduces_over": "batch, token",
        "n_forward": str(ablated.attrs["n_forward"]),
        "n_rows": str(n_rows),
        "n_bootstrap": str(n_bootstrap),
        "seed": str(seed),
    }
