"""One forward, and one backward each query: what the gradients leave at each place, row by row."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mamba_probe.hooks import HookPoint
from mamba_probe.relevance.asked import Asked
from mamba_probe.relevance.rules import Biases, following

__all__ = ["BATCH_AXIS", "POINTS", "passed"]

POINTS = {"residual": "hook_resid_pre", "mixer_in": "hook_mixer_in", "mixer_out": "hook_mixer_out"}
"""Places whose relevance is found, layer by layer."""
BATCH_AXIS = {"logit": 0, "target": 0, "top": 0, "bias": 1} | dict.fromkeys(POINTS, 1)
"""Of each result; that of the query follows it."""


@dataclass
class _Forward:
    """What stood at the places of one forward, and zeros added there, by which gradients are taken."""

    logits: Tensor
    biases: Biases
    names: dict[str, list[str]]
    values: dict[str, Tensor] = field(default_factory=dict)
    zeros: dict[str, Tensor] = field(default_factory=dict)

    def query(self, token: np.ndarray, target: np.ndarray) -> dict[str, np.ndarray]:
        """One backward pass: of each row the logit of `target` (-1: the largest) at `token`."""
        every, (at, wanted) = torch.arange(len(token)), (torch.as_tensor(each) for each in (token, target))
        here = self.logits[every.to(self.logits.device), at.clamp_min(0).to(self.logits.device)]
        top, wanted = here.detach().argmax(-1), wanted.to(here.device)
        wanted = torch.where(wanted < 0, top, wanted)
        chosen = here.gather(1, wanted[:, None])[:, 0]
        leaves = self.zeros | self.biases.zeros
        slopes = torch.autograd.grad(
            chosen.sum(), list(leaves.values()), retain_graph=True, materialize_grads=True
        )  # fmt: skip
        slope = dict(zip(leaves, slopes, strict=True))
        found = {"logit": chosen, "target": wanted, "top": top, "bias": self._of_biases(slope, chosen)}
        for kind, names in self.names.items():
            found[kind] = torch.stack([(self.values[name].double() * slope[name].double()).sum(-1) for name in names])
        return {name: each.detach().cpu().numpy() for name, each in found.items()}

    def _of_biases(self, slope: dict[str, Tensor], chosen: Tensor) -> Tensor:
        each = [self.biases.relevance(site, slope[site]) for site in self.biases.zeros]
        return torch.stack(each) if each else chosen.new_zeros((0, len(chosen)))


def passed(probe: Any, piece: dict[str, Any], asked: Asked, rules: str) -> tuple[dict[str, np.ndarray], Sequence[str]]:
    """Results of the rows of one forward, by the names of `BATCH_AXIS`, and the sites of biases.

    Args:
        probe, rules: as in `relevance`.
        piece: the model's keywords.
        asked: of these rows.
    """
    with torch.inference_mode(False), torch.enable_grad():
        forward = _run(probe, piece, rules)
        each = [forward.query(token, target) for token, target in zip(asked.token.T, asked.target.T, strict=True)]
    found = {name: np.stack([one[name] for one in each], axis=axis + 1) for name, axis in BATCH_AXIS.items()}
    return found, tuple(forward.biases.zeros)


def _run(probe: Any, piece: dict[str, Any], rules: str) -> _Forward:
    values: dict[str, Tensor] = {}
    zeros: dict[str, Tensor] = {}

    def follow(tensor: Tensor, hook: HookPoint) -> Tensor:
        values[hook.name] = tensor.detach()
        zeros[hook.name] = torch.zeros_like(tensor, requires_grad=True)
        return tensor + zeros[hook.name]

    names = {kind: [f"blocks.{layer}.{point}" for layer in probe.layers] for kind, point in POINTS.items()}
    hooked = [name for each in names.values() for name in each]
    keywords = {key: each.clone() if isinstance(each, Tensor) else each for key, each in piece.items()}
    with following(probe, rules) as (biases, logits), probe.hooks([(hooked, follow)]):
        probe.model(**keywords)
    return _Forward(logits[-1], biases, names, values, zeros)
