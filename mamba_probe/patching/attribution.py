"""Attribution patching: what a sweep finds, to first order, from the gradient at the base."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
import xarray as xr
from torch import Tensor

from mamba_probe.hooks import HookPoint
from mamba_probe.patching.agreement import compared
from mamba_probe.patching.pair import DEFAULT, DIMS, Metric, Pair, paired, recovered

__all__ = ["attribute"]

LEAST = 1e-20
"""A decay below it counts as this: the scan takes the logarithm, whose slope at 0 is infinite."""

STATES = 16
"""States that are attributed at most in a row: the scan, and its graph, is cut at each."""

ESTIMATOR = (
    "sum over the entry of (source - base) . d metric / d entry at the base, total derivative (all that follows from"
    " the entry follows): first order in source - base; nothing is averaged"
)


def attribute(
    probe: Any, base: Any, source: Any, metric: Metric, *, quantities: Sequence[str] = DEFAULT,
    layers: Sequence[int] | None = None, tokens: Sequence[int] | None = None, exact: xr.Dataset | None = None,
    n_bootstrap: int = 200, seed: int = 0,
) -> xr.Dataset:  # fmt: skip
    r"""Approximate a sweep by one forward of each run and one backward.

    $\mathrm{attributed}_{q,l,t} = \sum_i (q^{\text{source}}_{l,t,i} - q^{\text{base}}_{l,t,i})\,
    \partial m / \partial q_{l,t,i}$ at the base approximates patched - base. The derivative is total: that of delta
    passes through the decay and the write, and no quantity holds another fixed, so that all of them are found in one
    pass and none changes another's. Method: attribution patching (Nanda 2023; Syed et al., arXiv 2310.10348); through
    the quantities of a scan: ours.

    Args:
        probe, base, source, quantities, layers, tokens: as in `sweep`. h needs `tokens`, at most 16 of them.
        metric: as in `sweep`, differentiable; called once.
        exact: what `sweep` returned for the same model, runs and metric: its error is reported by quantity.
        n_bootstrap, seed: replicates of the intervals of that report, and their seed.

    Returns:
        attributed and recovered (quantity, layer, token, batch), NaN at padding; base and source (batch). With `exact`:
        error_max and error_rms (of the difference, by that of the exact effect), pearson, spearman and sign_agreement
        (quantity), the correlations with a 95 % interval.

    Raises:
        ValueError: what `sweep` refuses; a metric without gradient; h at too many tokens; an `exact` of other runs or
            that lacks what is asked for.

    >>> import mamba_probe as mp
    >>> built = mp.constructions.mqar(n_keys=4, n_values=4)
    >>> base, source = built.inputs([[1, 6, 2, 7, 1]]), built.inputs([[1, 5, 2, 7, 1]])
    >>> with mp.attach(built.model) as probe:
    ...     found = mp.patching.attribute(probe, base, source, lambda logits: logits[:, -1, 5], quantities=["x"])
    >>> int(abs(found.attributed).argmax("token").item())
    1
    """
    pair = paired(probe, base, source, metric, quantities, layers, tokens)
    if "h" in pair.quantities and len(pair.tokens) > STATES:
        raise ValueError(
            f"h is attributed at no more than {STATES} tokens, since the scan and its backward are cut at each; got"
            f" {len(pair.tokens)}: name tokens=[...], or take sweep, which needs no graph"
        )
    aims = pair.kept(pair.layers, pair.quantities, None)
    changes, scores = _changes(pair, aims)
    with torch.no_grad():
        other = pair.score(_logits(pair, pair.source.keywords))
    before, after = (each.detach().double().cpu().numpy() for each in (scores, other))
    result = pair.dataset(before, after).assign(
        attributed=(DIMS, changes), recovered=(DIMS, recovered(changes, before, after))
    )
    result = result.assign_attrs(
        estimator=ESTIMATOR, recovered="attributed / (source - base); NaN where source equals base, and at padding"
    )
    return result if exact is None else compared(result, exact, n_bootstrap, seed)


def _logits(pair: Pair, keywords: dict[str, Any]) -> Tensor:
    found = pair.probe.model(**keywords)
    return getattr(found, "logits", found)


def _changes(pair: Pair, aims: dict[str, Tensor]) -> tuple[np.ndarray, Tensor]:
    """The sum for every entry, and the base's metric.

    A zero is added to each tensor and the gradient is taken by it: what comes before goes on to have its own.
    """
    values: dict[str, Tensor] = {}
    zeros: dict[str, Tensor] = {}

    def follow(tensor: Tensor, hook: HookPoint) -> Tensor:
        values[hook.name] = tensor.detach()
        zeros[hook.name] = torch.zeros_like(tensor, requires_grad=True)
        start = tensor.clamp_min(LEAST) if hook.name.endswith("hook_A_bar") else tensor
        return start + zeros[hook.name]

    names = [name for layer in pair.layers for each in pair.quantities for name in pair.names(each, layer, pair.tokens)]
    with torch.inference_mode(False), torch.enable_grad():
        with pair.probe.hooks([(names, follow)]):
            scores = pair.score(_logits(pair, pair.base.keywords))
        if not scores.requires_grad:
            raise ValueError("the metric has no gradient by the logits (argmax, .item(), no_grad?): sweep needs none")
        slopes = torch.autograd.grad(scores.sum(), list(zeros.values()), materialize_grads=True)
    slope = dict(zip(zeros, slopes, strict=True))
    found = np.empty(pair.shape)
    for i, quantity in enumerate(pair.quantities):
        for j, layer in enumerate(pair.layers):
            aim = aims[pair.name(quantity, layer)]
            some = pair.names(quantity, layer, pair.tokens)
            found[i, j] = _summed(aim, [values[name] for name in some], [slope[name] for name in some], pair.tokens)
    return np.where(pair.valid.T[list(pair.tokens)], found, np.nan), scores


def _summed(aim: Tensor, values: list[Tensor], slopes: list[Tensor], tokens: tuple[int, ...]) -> np.ndarray:
    """(token, batch): the products, summed over an entry; several tensors are those of one token each."""
    aim = aim[:, list(tokens)]
    single = aim.ndim == values[0].ndim + 1
    value, slope = (torch.stack(each, 1) if single else each[0][:, list(tokens)] for each in (values, slopes))
    return ((aim.double() - value.double()) * slope.double()).flatten(2).sum(2).T.cpu().numpy()
