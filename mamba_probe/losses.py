"""What a model's answers are worth, token by token: the loss of what comes next, or of a task's answers."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
import xarray as xr
from jaxtyping import Float, Int
from torch import Tensor

from mamba_probe import provenance
from mamba_probe.arguments import listed
from mamba_probe.edits import Edit
from mamba_probe.inputs import ModelInput, checked_input
from mamba_probe.tasks import Task

__all__ = ["losses"]

UNSCORED = -1
"""Target of a token where nothing is to be predicted."""


def losses(
    probe: Any, inputs: Any, attention_mask: Any = None, *, edits: Sequence[Edit] = (), fwd_hooks: Sequence[Any] = (),
    batch_size: int | None = None,
) -> xr.Dataset:  # fmt: skip
    r"""Loss and correctness of every prediction, with edits or hooks if any.

    $$\mathrm{loss}_t = -\ln p(x_{t+1} \mid x_{\le t}), \qquad \text{for a Task: } -\ln p(\mathrm{target}_t)
    \text{ at its queries}$$

    Source: ours; the mean over tokens is the usual loss of a language model.

    Args:
        probe: an attached probe, of a model that gives logits.
        inputs: token ids (batch, token), a dict that has `input_ids`, or a `Task`.
        attention_mask: (batch, token), 1 at tokens and 0 at padding.
        edits: applied together (see `Probe.edit`).
        fwd_hooks: see `Probe.run_with_hooks`; each is called once a layer for each piece of the batch.
        batch_size: rows a forward call; None is all at once.

    Returns:
        loss (nats) and correct (1 where the largest logit is the target, else 0), over (batch, token), in float64 from
        the logits as the model gives them. NaN where nothing is to be predicted: padding, a row's last token, a token
        before padding, and for a task all but its queries. Coordinates: valid, position, token_id, target (-1 where
        none), and a task's role and source_token.

    Raises:
        ValueError: no token ids, a model without logits, nothing to predict, or what `edit` and `hooks` refuse.

    >>> import mamba_probe as mp
    >>> with mp.attach(mp.load("zoo:mqar-mamba1")) as probe:
    ...     found = losses(probe, mp.tasks.mqar(batch=2, length=64, seed=0))
    >>> found["correct"].mean().item(), int(found["correct"].count())
    (1.0, 16)
    """
    probe._check_attached()
    given = checked_input(probe.model, probe._adapters[0].sizes.width, inputs, attention_mask, None, None)
    ids, valid = _tokens(given)
    target = inputs.target * valid + UNSCORED * ~valid if isinstance(inputs, Task) else _following(ids, valid)
    if not (target != UNSCORED).any():
        raise ValueError("nothing to predict: a row needs two tokens, a task a query that is no padding")
    with probe.edit(*listed("edits", edits, "edits")), probe.hooks(fwd_hooks), torch.no_grad():
        found, start = [], 0
        for piece in given.pieces(batch_size):
            logits = _logits(probe.model, piece)
            found.append(_scored(logits, target[start : start + len(logits)]))
            start += len(logits)
    loss, correct = (np.concatenate(parts) for parts in zip(*found, strict=True))
    return _described(probe, given, {"loss": loss, "correct": correct}, target, edits, fwd_hooks)


def _tokens(given: ModelInput) -> tuple[Int[np.ndarray, "batch token"], np.ndarray]:
    if "input_ids" not in given.keywords:
        raise ValueError(
            f"losses needs token ids or a Task, to know what is to be predicted; got {sorted(given.keywords)}"
        )
    ids = given.keywords["input_ids"].cpu().numpy()
    mask = given.keywords.get("attention_mask")
    return ids, np.ones(ids.shape, bool) if mask is None else mask.cpu().numpy().astype(bool)


def _following(ids: Int[np.ndarray, "batch token"], valid: np.ndarray) -> Int[np.ndarray, "batch token"]:
    """The token after each, where both are valid."""
    target = np.full(ids.shape, UNSCORED)
    target[:, :-1] = np.where(valid[:, :-1] & valid[:, 1:], ids[:, 1:], UNSCORED)
    return target


def _logits(model: Any, piece: dict[str, Any]) -> Tensor:
    logits = getattr(model(**piece), "logits", None)
    if not isinstance(logits, Tensor) or logits.ndim != 3:
        raise ValueError(f"losses needs a language model; {type(model).__name__} gives no logits (batch, token, vocab)")
    return logits


def _scored(
    logits: Tensor, target: Int[np.ndarray, "batch token"]
) -> tuple[Float[np.ndarray, "batch token"], Float[np.ndarray, "batch token"]]:
    """A row after another, so that one row's logits are held in float64, at the scored tokens alone."""
    loss, correct = np.full((2, *target.shape), np.nan)
    for row, wanted in enumerate(target):
        at = np.flatnonzero(wanted != UNSCORED)
        answer = torch.from_numpy(wanted[at]).to(logits.device)
        scores = logits[row, torch.from_numpy(at).to(logits.device)].double()
        loss[row, at] = torch.nn.functional.cross_entropy(scores, answer, reduction="none").cpu().numpy()
        correct[row, at] = (scores.argmax(-1) == answer).double().cpu().numpy()
    return loss, correct


def _described(
    probe: Any, given: ModelInput, found: dict[str, np.ndarray], target: np.ndarray, edits: Any, fwd_hooks: Any
) -> xr.Dataset:
    ids, valid = _tokens(given)
    over = ("batch", "token")
    text = {"loss": ("-ln p of the target", "nat"), "correct": ("whether the largest logit is the target", "1")}
    variables = {name: (over, values, dict(zip(("long_name", "units"), text[name], strict=True)))
                 for name, values in found.items()}  # fmt: skip
    coords = {
        "batch": np.arange(given.batch), "token": np.arange(given.length), "valid": (over, valid),
        "position": (over, np.where(valid, np.cumsum(valid, axis=1) - 1, -1)), "token_id": (over, ids),
        **{name: (over, values) for name, values in given.labels.items()}, "target": (over, target),
    }  # fmt: skip
    attrs = provenance.of_model(probe.model, "losses") | given.attrs | {
        "backend": probe.backend,
        "scored": "the task's queries" if "task" in given.attrs else "every token that another follows",
        "edits": " + ".join(map(repr, edits)) or "none",
        "hooks": str(len(fwd_hooks)),
    }  # fmt: skip
    return xr.Dataset(variables, coords, attrs)
