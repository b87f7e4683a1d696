"""Is relevance faithful? Tokens are taken away, the most relevant first, and the answer's probability is followed."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
import xarray as xr
from torch import Tensor

from mamba_probe import provenance
from mamba_probe.arguments import whole
from mamba_probe.hooks import HookPoint
from mamba_probe.inputs import ModelInput, checked_input
from mamba_probe.relevance.explaining import checked_model

__all__ = ["perturbed"]

DIMS = ("order", "batch", "query", "count")


def perturbed(
    probe: Any, relevance: xr.Dataset, *others: xr.Dataset, replacement: int | str = "zero", own: bool = False,
    n_random: int = 4, seed: int = 0, batch_size: int | None = None,
) -> xr.Dataset:  # fmt: skip
    r"""Follow the probability of the explained id while tokens are taken away, the most relevant first.

    $p_k$ = softmax of the logits at the query, of the target id, after the k tokens before the query with the largest
    relevance (signed) have been replaced; k = 0, 1, 2, 4, .. and all. `area` is the mean of $p_k$ over k >= 1, each k
    weighing alike: the lower, the earlier did the order find what the answer rests on. The order of each Dataset, and
    random orders. Method: perturbation curves, with which the literature compares
    attributions (MambaLRP, arXiv 2406.07592, among them); counts, area and replacement: ours.

    Args:
        probe: attached to the model that was explained.
        relevance, others: what `relevance` gave for the same rows and queries, by different rules.
        replacement: "zero": the token's embedding becomes 0; or a token id, whose embedding takes its place.
        own: take the query's own token as well, without which nothing is asked.
        n_random: random orders, whose probabilities are averaged; 0 for none.
        seed: of these orders.
        batch_size: rows a forward call.

    Returns:
        probability (order, batch, query, count), area (order, batch, query); NaN where a row has no such query. A
        count above the tokens of a row takes all of them.

    Raises:
        ValueError: another model, Datasets of other rows, two by the same rules, a replacement that is no id,
            a query that no token comes before.

    >>> import mamba_probe as mp
    >>> from mamba_probe.relevance import relevance
    >>> task = mp.tasks.mqar(batch=2, length=16, n_pairs=3, vocab=16)
    >>> with mp.attach(mp.constructions.mqar(n_keys=8, n_values=8).model) as probe:
    ...     found = perturbed(probe, relevance(probe, task))
    >>> bool((found["area"].sel(order="mambalrp") < found["area"].sel(order="random")).all())
    True
    """
    checked_model(probe, "perturbed")
    model_hash = provenance.of_model(probe.model)["model_hash"]
    explained = _checked(relevance, others, model_hash)
    n_random, seed = whole("n_random", n_random), whole("seed", seed)
    if not isinstance(own, bool):
        raise ValueError(f"own is True or False; got {own!r}")
    ids, valid = relevance["token_id"].values, relevance["valid"].values
    given = checked_input(probe.model, probe._adapters[0].sizes.width, ids, valid.astype(int), None, None)
    reach = _reach(relevance, own)
    rank = {name: [_rank(each["relevance"].values, reach)] for name, each in explained.items()}
    orders = rank | ({"random": _random(reach, n_random, seed)} if n_random else {})
    counts = _counts(int(reach.sum(-1).max()))
    runs = _Runs(probe, given, relevance, reach, _vector(probe.model, replacement), batch_size)
    found = np.stack([np.mean([runs.curve(each, counts) for each in ranks], axis=0) for ranks in orders.values()])
    return _labelled(relevance, found, list(orders), counts, {
        "model_hash": model_hash, "replacement": str(replacement), "own": int(own), "n_random": n_random, "seed": seed,
    })  # fmt: skip


def _checked(first: xr.Dataset, others: Sequence[xr.Dataset], model_hash: str) -> dict[str, xr.Dataset]:
    """Each by the name of its rules."""
    found: dict[str, xr.Dataset] = {}
    for each in (first, *others):
        if not isinstance(each, xr.Dataset) or each.attrs.get("kind") != "relevance":
            raise ValueError(f"perturbed takes what relevance(probe, ...) returned; got {type(each).__name__}")
        if each.attrs["model_hash"] != model_hash:
            raise ValueError("the relevance is of another model than the probe's, or its weights have changed since")
        if each.attrs["rules"] in found:
            raise ValueError(f"two Datasets have rules {each.attrs['rules']!r}: an order is named by them")
        for name in ("token_id", "valid", "query_token", "target_id"):
            if not np.array_equal(each[name].values, first[name].values):
                raise ValueError(f"the Datasets differ in {name}: explain the same rows, queries and targets")
        found[each.attrs["rules"]] = each
    return found


def _rank(relevance: np.ndarray, reach: np.ndarray) -> np.ndarray:
    """Rank of each token, 0 for the largest of those that may be taken; ties in the order of tokens."""
    order = np.argsort(np.where(reach, -relevance, np.inf), axis=-1, kind="stable")
    return np.argsort(order, axis=-1)


def _random(reach: np.ndarray, n_random: int, seed: int) -> list[np.ndarray]:
    """Ranks of as many random orders."""
    rng = np.random.default_rng(seed)
    return [_rank(rng.random(reach.shape), reach) for _ in range(n_random)]


def _reach(relevance: xr.Dataset, own: bool) -> np.ndarray:
    """(batch, query, token): the valid tokens that may be taken away."""
    token, at = np.arange(relevance.sizes["token"]), relevance["query_token"].values[..., None]
    reach = ((token <= at) if own else (token < at)) & relevance["valid"].values[:, None]
    if not (reach.any(-1) | (at[..., 0] < 0)).all():
        row, query = np.argwhere(~reach.any(-1) & (at[..., 0] >= 0))[0]
        raise ValueError(f"query {query} of row {row} is its first token: there is nothing to take away before it")
    return reach


def _counts(most: int) -> np.ndarray:
    """0, 1, 2, 4, .. below `most`, and `most`."""
    return np.array([0, *(2**power for power in range(most.bit_length()) if 2**power < most), most])


def _vector(model: Any, replacement: int | str) -> Tensor:
    """What stands in the place of an embedding."""
    table = model.get_input_embeddings().weight.detach()
    if isinstance(replacement, str) and replacement == "zero":
        return torch.zeros_like(table[0])
    return table[whole('replacement, "zero" or a token id,', replacement, most=len(table) - 1)]


class _Runs:
    """The model with tokens taken away."""

    def __init__(
        self, probe: Any, given: ModelInput, relevance: xr.Dataset, reach: np.ndarray, vector: Tensor,
        batch_size: int | None,
    ):  # fmt: skip
        self.probe, self.given, self.vector, self.batch_size = probe, given, vector, batch_size
        self.at, self.target, self.reach = relevance["query_token"].values, relevance["target_id"].values, reach

    def curve(self, rank: np.ndarray, counts: np.ndarray) -> np.ndarray:
        """(batch, query, count): probability of the target once the tokens of the lowest ranks are gone."""
        gone = (rank[..., None] < counts) & self.reach[..., None]  # batch query token count
        each = [
            [self._probability(gone[:, query, :, index], query) for index in range(len(counts))]
            for query in range(self.at.shape[1])
        ]
        return np.moveaxis(np.array(each), -1, 0)

    def _probability(self, gone: np.ndarray, query: int) -> np.ndarray:
        found, start = [], 0
        for piece in self.given.pieces(self.batch_size):
            rows = slice(start, start + len(piece["input_ids"]))
            found.append(self._rows(piece, gone[rows], self.at[rows, query], self.target[rows, query]))
            start = rows.stop
        return np.where(self.at[:, query] < 0, np.nan, np.concatenate(found))

    def _rows(self, piece: dict[str, Any], gone: np.ndarray, at: np.ndarray, target: np.ndarray) -> np.ndarray:
        def replaced(tensor: Tensor, hook: HookPoint) -> Tensor:
            there = torch.as_tensor(gone, device=tensor.device)[..., None]
            return torch.where(there, self.vector.to(tensor.dtype), tensor)

        point = f"blocks.{self.probe.layers[0]}.hook_resid_pre"
        with torch.no_grad(), self.probe.hooks([(point, replaced)]):
            logits = self.probe.model(**piece).logits.double().cpu()
        here = logits[torch.arange(len(at)), torch.as_tensor(at).clamp_min(0)].softmax(-1)
        return here.gather(1, torch.as_tensor(target).clamp_min(0)[:, None])[:, 0].numpy()


def _labelled(
    relevance: xr.Dataset, found: np.ndarray, orders: list[str], counts: np.ndarray, attrs: dict[str, Any]
) -> xr.Dataset:
    coords = {name: relevance[name] for name in ("batch", "query_token", "target_id")}
    coords |= {"order": np.array(orders, dtype=object), "count": counts}
    probability = {"long_name": "probability of the target after so many tokens are gone", "units": "1"}
    area = {"long_name": "mean probability over the counts above 0", "units": "1"}
    variables = {"probability": (DIMS, found, probability), "area": (DIMS[:3], found[..., 1:].mean(-1), area)}
    kept = {name: relevance.attrs[name] for name in ("model", "tokens_rule", "target_rule")}
    named = {
        "kind": "perturbation",
        "estimator": "the most relevant tokens are taken first, the query's own as `own` says",
    }
    return xr.Dataset(variables, coords, named | kept | attrs)
