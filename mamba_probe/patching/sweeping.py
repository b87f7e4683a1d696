"""The exact sweep: one forward for each entry that is put into the base's run, many of them in one batch."""

from collections.abc import Callable, Sequence
from os import PathLike
from typing import Any

import numpy as np
import torch
import xarray as xr
from jaxtyping import Float
from torch import Tensor

from mamba_probe.arguments import whole
from mamba_probe.hooks import HookPoint, parsed
from mamba_probe.inputs import ModelInput
from mamba_probe.patching.keeping import Cells, opened
from mamba_probe.patching.pair import DEFAULT, Metric, Pair, paired
from mamba_probe.progress import bar

__all__ = ["sweep"]

Hooks = Callable[[Tensor, Tensor], Sequence[tuple[Any, Any]]]
"""Hooks for forwards of these base rows, each patched at its own token."""

ESTIMATOR = (
    "metric of the base's run in which the entry (quantity, layer, token, row) is the source's, through the recurrence:"
    " one forward for each, exact; nothing is averaged"
)
RECOVERED = "(patched - base) / (source - base); NaN where source equals base, and at padding"


def sweep(
    probe: Any, base: Any, source: Any, metric: Metric, *, quantities: Sequence[str] = DEFAULT,
    layers: Sequence[int] | None = None, tokens: Sequence[int] | None = None, batch_size: int = 64,
    store: str | PathLike[str] | None = None, progress: bool = True,
) -> xr.Dataset:  # fmt: skip
    r"""Patch every entry of `base` with that of `source`, one at a time, and measure the answer.

    $\mathrm{patched}_{q,l,t} = m(\text{base with } q_{l,t} \leftarrow q_{l,t}^{\text{source}})$, run on through the
    recurrence and the layers after it; $\mathrm{recovered} = (\mathrm{patched} - m_{base}) / (m_{source} - m_{base})$.
    Method: activation patching; through the quantities of a scan: ours.

    Args:
        probe: attached, and not within `edit`.
        base: the run that is changed: what `probe.record` takes as inputs.
        source: the run that values come from: rows and tokens aligned with those of `base`, padding too.
        metric: of logits (batch, token, vocab), the rows of `base` in order, to (batch,), such as a difference of two
            logits. It is called once for each token that is patched.
        quantities: names in `QUANTITIES`, which says what each of them moves.
        layers: the model's own layer numbers; None is all.
        tokens: indices in the rows; None is all.
        batch_size: rows of one forward: as many tokens at once as fit, each in a copy of base's rows. h interrupts the
            scan at each of these tokens.
        store: `*.zarr`: each (quantity, layer) is written when it is done. A sweep with the same arguments goes on
            there.
        progress: a bar, on a terminal (stderr) or in a notebook.

    Returns:
        patched and recovered (quantity, layer, token, batch), NaN at padding; base and source (batch); measured
        (quantity, layer).

    Raises:
        ValueError: names, shapes or padding that do not fit; a metric that does not give (batch,) finite numbers; a
            store of another sweep (what differs is named).

    >>> import mamba_probe as mp
    >>> built = mp.constructions.mqar(n_keys=4, n_values=4)
    >>> base, source = built.inputs([[1, 6, 2, 7, 1]]), built.inputs([[1, 5, 2, 7, 1]])
    >>> with mp.attach(built.model) as probe:
    ...     found = mp.patching.sweep(probe, base, source, lambda logits: logits[:, -1, 5], progress=False)
    >>> found.recovered.sel(quantity="x", layer=0).values.ravel().round(3) + 0.0
    array([0., 1., 0., 0., 0.])
    """
    pair = paired(probe, base, source, metric, quantities, layers, tokens)
    batch_size = whole("batch_size", batch_size, 1)
    group = min(len(pair.tokens), max(1, batch_size // pair.base.batch))
    with torch.no_grad():
        before, after = (
            _scores(pair, given, pair.tokens[:group], batch_size, lambda *_: ())[0]
            for given in (pair.base, pair.source)
        )
        cells = opened(_blank(pair, before, after, batch_size), store)
        with bar("patching", len(cells.missing()), progress) as step:
            for layer in pair.layers:
                _layer(pair, cells, layer, group, batch_size, step)
    return cells.result


def _blank(pair: Pair, base: np.ndarray, source: np.ndarray, batch_size: int) -> xr.Dataset:
    found = pair.dataset(base, source)
    return found.assign_attrs(estimator=ESTIMATOR, recovered=RECOVERED, batch_size=batch_size)


def _layer(pair: Pair, cells: Cells, layer: int, group: int, batch_size: int, step: Callable[[str], None]) -> None:
    """Every quantity of a layer that is still to be measured; one forward finds all of the source's values."""
    missing = [quantity for quantity, at in cells.missing() if at == layer]
    values = pair.kept([layer], missing, batch_size) if missing else {}
    for quantity in missing:
        step(f"{quantity}, layer {layer}")
        cells.write(
            quantity, layer, _cell(pair, quantity, layer, values[pair.name(quantity, layer)], group, batch_size)
        )
        step("")


def _cell(
    pair: Pair, quantity: str, layer: int, values: Tensor, group: int, batch_size: int
) -> Float[np.ndarray, "token batch"]:
    """The metric with one quantity of one layer patched at each token; forwards of equal size, the last filled up."""

    def hooks(rows: Tensor, tokens: Tensor) -> list[tuple[Any, Any]]:
        return [(pair.names(quantity, layer, tokens.unique().tolist()), _patch(values, rows, tokens))]

    found = []
    for start in range(0, len(pair.tokens), group):
        some = pair.tokens[start : start + group]
        filled = some + some[-1:] * (group - len(some))
        found.append(_scores(pair, pair.base, filled, batch_size, hooks)[: len(some)])
    return np.where(pair.valid.T[list(pair.tokens)], np.concatenate(found), np.nan)


def _scores(
    pair: Pair, given: ModelInput, tokens: Sequence[int], batch_size: int, hooks: Hooks
) -> Float[np.ndarray, "token batch"]:
    """The metric of all rows of `given`, once for each of `tokens`."""
    rows = torch.arange(given.batch).repeat(len(tokens))
    at = torch.tensor(tokens).repeat_interleave(given.batch)
    logits = []
    for row, token in zip(rows.split(batch_size), at.split(batch_size), strict=True):
        taken = {k: v[row.to(v.device)] if isinstance(v, Tensor) else v for k, v in given.keywords.items()}
        with pair.probe.hooks(hooks(row, token)):
            found = pair.probe.model(**taken)
        logits.append(getattr(found, "logits", found))
    each = torch.cat(logits).unflatten(0, (len(tokens), given.batch))
    return torch.stack([pair.score(one) for one in each]).double().cpu().numpy()


def _patch(values: Tensor, rows: Tensor, tokens: Tensor) -> Callable[[Tensor, HookPoint], Tensor]:
    """What puts `values` (batch, token, ...) of base row rows[i] at tokens[i] into row i of a forward."""
    rows, tokens = rows.to(values.device), tokens.to(values.device)

    def put(tensor: Tensor, hook: HookPoint) -> Tensor:
        token = parsed(hook.name)[2]
        at = torch.arange(len(rows), device=values.device)
        if token is not None:  # a state: the tensor is of this token alone
            at = at[tokens == token]
            return tensor.index_put((at,), values[rows[at], token].to(tensor.dtype))
        return tensor.index_put((at, tokens), values[rows, tokens].to(tensor.dtype))

    return put
