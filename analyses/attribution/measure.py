"""Relevance in, profiles of tokens and their nulls out: validation, means and intervals."""

from typing import Any

import numpy as np
import xarray as xr

from mamba_probe.analyses.attribution import core
from mamba_probe.analyses.attribution.classes import PAIR, classes, reach
from mamba_probe.analyses.common import described
from mamba_probe.analyses.common.result import Entry

__all__ = ["measure"]

SERIES = {
    "": "",
    "gradient_": ", by gradient x input",
    "other_": ", null: of another id's logit",
    "baseline_": ", null: of the untrained twin",
}
QUERY = ("query_token", "target_id")
"""Coordinates that say what was explained."""
_END = {"": "", "_low": ", lower end of the interval", "_high": ", upper end of the interval"}
_TEXT = {
    "class_share": ("share of the positive relevance on tokens of a class", "1"),
    "class_signed": ("relevance of a class over the sum of |relevance|", "1"),
    "pair_share": ("share of the positive relevance on the pair that is asked for", "1"),
    "entropy": ("entropy of the positive relevance over tokens", "nat"),
    "mean_distance": ("mean distance of the positive relevance from the query", "token"),
    "own_share": ("share of |relevance| at the query's own token, in the residual stream before the block", "1"),
}


def measure(
    relevance: xr.Dataset, *, gradient: xr.Dataset | None = None, other: xr.Dataset | None = None,
    perturbation: xr.Dataset | None = None, baseline: xr.Dataset | None = None, n_bootstrap: int = 200, seed: int = 0,
) -> xr.Dataset:  # fmt: skip
    r"""Measure which tokens carry an answer, how relevance moves to them layer by layer, and whether it is faithful.

    $$p_s = \max(R_s, 0) / \textstyle\sum_r \max(R_r, 0)$$

    of the tokens up to a query, with $R$ from `probe.relevance` (MambaLRP, Jafari et al. 2024, arXiv 2406.07592, or
    gradient x input); what is measured of it: ours.

    Args:
        relevance: what `probe.relevance` returned.
        gradient: the same rows, queries and targets with rules="gradient".
        other: the same rows and queries, with other ids as targets: a null.
        perturbation: what `probe.perturbed` returned for `relevance` and, beside it, `gradient`.
        baseline: relevance of the untrained twin on the same rows and targets: a null.
        n_bootstrap, seed: replicates of the 95 % intervals over rows, and their seed.

    Returns:
        For `relevance`, and with the prefixes gradient_, other_ and baseline_ for what else was given, over (batch,
        query): class_share and class_signed (token_class, ..), pair_share (of a task), entropy, mean_distance,
        own_share (layer, ..); mean_*: over rows and queries, with _low and _high. chance (token_class): were relevance
        equal on every token up to the query. gain_pair_share: less the gradient's, paired. area (order), and area_gain
        (order): a random or gradient order's less that of `relevance`, paired; probability (order, count).
        bias_share, conservation_error (batch, query); top: whether the target is the model's largest logit.

    Raises:
        ValueError: no relevance, or of other rows, queries or targets; fewer than 2 replicates.

    >>> import mamba_probe as mp
    >>> from mamba_probe.relevance import relevance
    >>> task = mp.tasks.mqar(batch=4, length=32, n_pairs=4, vocab=32)
    >>> with mp.attach(mp.constructions.mqar(n_keys=16, n_values=16).model) as probe:
    ...     result = measure(relevance(probe, task))
    >>> result["mean_class_share"].sel(token_class=["asked value", "own"]).values.round(3).tolist()
    [0.5, 0.5]
    """
    given = {"": relevance, "gradient_": gradient, "other_": other, "baseline_": baseline}
    series = {prefix: each for prefix, each in given.items() if each is not None}
    for prefix, each in series.items():
        _check(each, relevance, prefix)
    if perturbation is not None:
        _check_perturbation(perturbation, relevance)
    member = classes(relevance)
    values = {f"{prefix}{name}": each for prefix, one in series.items() for name, each in _of(one, member).items()}
    if "gradient_pair_share" in values:
        values["gain_pair_share"] = values["pair_share"] - values["gradient_pair_share"]
    entries = {name: _entry(name, each) for name, each in values.items()}
    for name, each in values.items():
        for end, mean in core.summary(each, n_bootstrap, seed).items():
            entries[f"mean_{name}{end}"] = _entry(name, mean, f", mean{_END[end]}")
    entries |= _plain(relevance, gradient, member)
    entries |= {} if perturbation is None else _faithful(perturbation, relevance.attrs["rules"], n_bootstrap, seed)
    return described(entries, _coords(relevance, perturbation, list(member)), _attrs(relevance, series, perturbation))


def _check(each: Any, relevance: xr.Dataset, prefix: str) -> None:
    name = prefix.rstrip("_") or "relevance"
    if not isinstance(each, xr.Dataset) or each.attrs.get("kind") != "relevance":
        raise ValueError(f"{name} is what probe.relevance(...) returned; got {type(each).__name__}")
    layers, own = each["layer"].values.tolist(), relevance["layer"].values.tolist()
    if layers != own:
        raise ValueError(f"{name} has layers {layers} and relevance {own}: explain the same architecture")
    same = ["token_id", "valid", "query_token"] + ["target_id"] * (prefix != "other_")
    for what in same:
        if what not in each.variables:
            raise ValueError(f"{name} has no {what}: give it as probe.relevance(...) returned it")
        if not np.array_equal(each[what].values, relevance[what].values):
            raise ValueError(f"{name} differs from relevance in {what}: explain the same rows, queries and targets")
    if prefix == "gradient_" and each.attrs["rules"] != "gradient":
        raise ValueError(f"gradient needs rules='gradient'; got {each.attrs['rules']!r}")
    if prefix == "other_" and np.array_equal(each["target_id"].values, relevance["target_id"].values):
        raise ValueError("other explains the same targets: it is a null only of another id's logit")


def _check_perturbation(perturbation: xr.Dataset, relevance: xr.Dataset) -> None:
    if (
        perturbation.attrs.get("kind") != "perturbation"
        or relevance.attrs["rules"] not in perturbation["order"].values
        or not all(np.array_equal(perturbation[name].values, relevance[name].values) for name in QUERY)
    ):
        raise ValueError("perturbation is what probe.perturbed(relevance, ...) returned for this relevance")


def _of(one: xr.Dataset, member: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """What one Dataset of relevance says of each query."""
    share = core.positive_share(one["relevance"].values)
    kinds = np.stack(list(member.values()))
    found = {"class_share": core.by_class(share, kinds)}
    shown = np.abs(np.nan_to_num(one["relevance"].values)).sum(-1, keepdims=True)
    signed = np.nan_to_num(one["relevance"].values) / np.where(shown > 0, shown, np.nan)
    found["class_signed"] = core.by_class(signed, kinds)
    if PAIR[0] in member:
        found["pair_share"] = found["class_share"][[name in PAIR for name in member]].sum(axis=0)
    token = np.arange(one.sizes["token"])
    away = np.maximum(_position(one)[..., None] - one["position"].values[:, None], 0)
    found |= {"entropy": core.entropy(share), "mean_distance": core.mean_distance(share, away)}
    own = token == one["query_token"].values[..., None]
    return found | {"own_share": core.own_share(one["residual"].values, own[None])}


def _position(one: xr.Dataset) -> np.ndarray:
    return np.take_along_axis(one["position"].values, np.maximum(one["query_token"].values, 0), axis=1)


def _entry(name: str, values: np.ndarray, more: str = "") -> Entry:
    prefix = next((each for each in SERIES if each and name.startswith(each)), "")
    base = name.removeprefix(prefix).removeprefix("gain_")
    text, units = _TEXT[base]
    text += SERIES[prefix] + (", less the gradient's" if name.startswith("gain_") else "") + more
    first = ("token_class",) if base.startswith("class_") else ("layer",) if base == "own_share" else ()
    return (*first, "batch", "query")[: np.ndim(values)], np.asarray(values), text, units


def _plain(relevance: xr.Dataset, gradient: xr.Dataset | None, member: dict[str, np.ndarray]) -> dict[str, Entry]:
    """What is carried over, and chance."""
    pair, tokens = ("batch", "query"), reach(relevance).sum(-1)
    count = np.stack([each.sum(-1) for each in member.values()])
    asked = relevance["query_token"].values >= 0
    chance = np.where(asked, count / np.maximum(tokens, 1), np.nan)
    top = np.where(asked, relevance["top_id"].values == relevance["target_id"].values, np.nan)
    found: dict[str, Entry] = {
        "chance": (("token_class",), np.nanmean(chance, axis=(1, 2)), "share of the tokens up to the query", "1"),
        "top": (pair, top, "whether the target is the model's largest logit", "1"),
        "conservation_error": (pair, relevance["conservation_error"].values, "error of conservation", "1"),
    }
    every = {"relevance": relevance} | ({} if gradient is None else {"gradient_relevance": gradient})
    for name, one in every.items():
        text = f"relevance of the token's embedding{SERIES['gradient_'] if one is gradient else ''}"
        found[name] = (("batch", "query", "token"), one["relevance"].values, text, "logit")
    if "bias" in relevance:
        bias = np.abs(relevance["bias"].values).sum(0)
        whole = bias + np.abs(np.nan_to_num(relevance["relevance"].values)).sum(-1)
        found["bias_share"] = (pair, bias / whole, "sum of |relevance of biases| over that of all terms", "1")
    return found


def _faithful(perturbation: xr.Dataset, rules: str, n_bootstrap: int, seed: int) -> dict[str, Entry]:
    """Perturbation curves and areas, and what the order of `relevance` is ahead by, row by row."""
    area, curve = perturbation["area"].values, perturbation["probability"].values
    ahead = area - perturbation["area"].sel(order=rules).values
    found: dict[str, Entry] = {}
    for end, mean in core.summary(area, n_bootstrap, seed).items():
        found[f"area{end}"] = (("order",), mean, f"mean probability while tokens are taken away{_END[end]}", "1")
    for end, mean in core.summary(ahead, n_bootstrap, seed).items():
        found[f"area_gain{end}"] = (("order",), mean, f"area of an order less that of {rules}{_END[end]}", "1")
    for end, mean in core.summary(np.moveaxis(curve, -1, 1), n_bootstrap, seed).items():
        found[f"probability{end}"] = (("order", "count"), mean, f"probability of the target, mean{_END[end]}", "1")
    return found


def _coords(relevance: xr.Dataset, perturbation: xr.Dataset | None, names: list[str]) -> dict[str, Any]:
    kept = (
        "layer",
        "batch",
        "token",
        "token_id",
        "valid",
        "position",
        "query_token",
        "target_id",
        "role",
        "source_token",
    )
    coords: dict[str, Any] = {name: relevance[name] for name in kept if name in relevance.coords}
    coords["token_class"] = np.array(names, dtype=object)
    if perturbation is not None:
        coords |= {name: perturbation[name] for name in ("order", "count")}
    return coords


def _attrs(relevance: xr.Dataset, series: dict[str, Any], perturbation: xr.Dataset | None) -> dict[str, str]:
    n_rows = relevance.sizes["batch"]
    nulls = ["chance: as many of the tokens up to the query"]
    nulls += ["other_: relevance of another id's logit"] * ("other_" in series)
    nulls += ["baseline_: the untrained twin"] * ("baseline_" in series)
    kept = ("rules", "tokens_rule", "target_rule", "model", "conservation")
    taken = {} if perturbation is None else {name: str(perturbation.attrs[name]) for name in ("replacement", "own")}
    return {name: str(relevance.attrs[name]) for name in kept if name in relevance.attrs} | taken | {
        "analysis": "attribution",
        "estimator": str(relevance.attrs["estimator"]),
        "null": "; ".join(nulls),
        "interval": "95 % percentile bootstrap over rows" if n_rows > 1 else "NaN: one row, nothing to resample",
        "reduces_over": "mean_*, area, probability: batch, query; where nothing is positive, left out",
        "n_rows": str(n_rows),
    }  # fmt: skip
