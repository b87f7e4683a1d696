"""A model whose weights are known in closed form, with what it reads and what it answers."""

import json
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from safetensors.torch import save
from torch import Tensor, nn

from mamba_probe import blocks
from mamba_probe.constructions.tables import fresh
from mamba_probe.showing import construction_html

__all__ = ["Construction"]


@dataclass(frozen=True, eq=False, repr=False)
class Construction:
    r"""A transformers module with planted weights, and what a probe must find in it.

    Source: ours.

    Arguments:
        name: name of the builder.
        model: `MambaMixer`, `Mamba2Mixer`, `MambaForCausalLM` or `Mamba2ForCausalLM` of transformers, or a block or
            language model of `mamba_probe.blocks` (S4D, and Mamba-2 without its norm), in eval mode.
        inputs: turns the task's input into what `model` takes.
        expected: turns the task's input into the model's output at the last token (batch, model), or None.
        read_out: the matrix (kernel, channel), or (kernel, head) in Mamba-2, that turns the channels' or heads' kernels
            of the last token into kernels of the task's input, or None.
        bound: bound on the error in exact arithmetic, for inputs of at most 1 in absolute value, or None.
        channels: what each channel is for, layer after layer.
        claim: what the weights do, in words.
        answer: turns a bare mixer's output (batch, token, model) into predicted token ids (batch, token), or None.
        states: what each state is for; a block's channels share them.
        signatures: ideal value of each signature, by the name under which an analysis measures it.

    Example:
        >>> import numpy as np
        >>> from mamba_probe.constructions import keep_nth
        >>> construction = keep_nth(n_tokens=4, length=16, n=5)
        >>> construction
        Construction(keep_nth: MambaMixer, model=6, channel=6, state=1, rank=1, float32)
        >>> tokens = np.arange(16)[None] % 4
        >>> hidden = construction.inputs(tokens)
        >>> hidden.shape
        torch.Size([1, 16, 6])
        >>> construction.expected(tokens).tolist()
        [[0.0, 1.0, 0.0, 0.0, 0.0, 0.0]]
    """

    name: str
    model: nn.Module
    inputs: Callable[[Any], Tensor]
    expected: Callable[[Any], Float[np.ndarray, "batch model"]] | None
    read_out: Float[np.ndarray, "kernel channel"] | None
    bound: float | None
    channels: list[str]
    claim: str
    answer: Callable[[Tensor], Int[np.ndarray, "batch token"]] | None = None
    states: list[str] = field(default_factory=list)
    signatures: dict[str, float] = field(default_factory=dict)

    @property
    def dtype(self) -> torch.dtype:
        """Data type of the weights."""
        return next(self.model.parameters()).dtype

    @property
    def _config(self) -> Any:
        return getattr(self.model, "config", None) or blocks.config_of(self.model)

    @property
    def sizes(self) -> dict[str, int]:
        """Sizes of a block: model, channel, state, then rank (Mamba-1) or head (Mamba-2), and layer if several."""
        config = self._config
        if isinstance(config, dict):
            first, layers = config["mixers"][0], len(config["mixers"])
            names = {"model": "d_model", "channel": "d_inner", "state": "d_state", "rank": "dt_rank", "head": "n_heads"}
            sizes = {name: first[own] for name, own in names.items() if own in first}
        else:
            layers = config.num_hidden_layers
            sizes = {"model": config.hidden_size, "channel": config.expand * config.hidden_size}
            sizes |= {"state": config.state_size}
            sizes |= {"head": config.num_heads} if config.model_type == "mamba2" else {"rank": config.time_step_rank}
        return sizes | ({"layer": layers} if layers > 1 else {})

    def __repr__(self) -> str:
        listed = ", ".join(f"{name}={size}" for name, size in self.sizes.items())
        dtype = str(self.dtype).removeprefix("torch.")
        return f"Construction({self.name}: {type(self.model).__name__}, {listed}, {dtype})"

    _repr_html_ = construction_html

    def describe(self) -> str:
        """Return the sizes, the claim, the bound, the channels, the states and the ideal signatures as text."""
        lines = {
            "error bound": "none" if self.bound is None else f"{self.bound:.2g}",
            "channels": ", ".join(_grouped(self.channels)),
            "states": ", ".join(_grouped(self.states)),
            "ideal signatures": ", ".join(f"{name} {value:.4g}" for name, value in self.signatures.items()),
        }
        return "\n".join([repr(self), self.claim, *(f"{name}: {text}" for name, text in lines.items() if text)])

    def randomised(self, seed: int) -> "Construction":
        """Return the twin of equal sizes with the library's initial weights, each perturbed: a null.

        `inputs`, `expected` and `read_out` stay those of the construction; the twin fails them.

        Arguments:
            seed: of the weights; the global seed is left alone.
        """
        model = fresh(self._config, seed).to(self.dtype)
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter += 0.02 * torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype)
        name, claim = f"{self.name}, randomised(seed={seed})", "Nothing: a null."
        parts = {"channels": ["random"] * len(self.channels), "states": ["random"] * len(self.states)}
        return replace(self, name=name, model=model, bound=None, claim=claim, signatures={}, **parts)

    def save(self, directory: str | Path, overwrite: bool = False) -> Path:
        """Write config.json and model.safetensors, as `mamba_probe.load` reads them.

        Arguments:
            directory: made if missing.
            overwrite: replace a model that is there.

        Raises:
            ValueError: if a model is there and `overwrite` is False.
        """
        target = Path(directory)
        files = [target / name for name in ("config.json", "model.safetensors")]
        there = [file.name for file in files if file.exists()]
        if there and not overwrite:
            raise ValueError(f"{target} holds {' and '.join(there)}: name another directory, or pass overwrite=True")
        target.mkdir(parents=True, exist_ok=True)
        config = self._config
        if not isinstance(config, dict):
            config = config.to_diff_dict()
            del config["transformers_version"]
        files[0].write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")
        weights = {name: weight.contiguous() for name, weight in self.model.state_dict().items()}
        files[1].write_bytes(save(weights, metadata={"format": "pt"}))
        return target


def _grouped(labels: list[str]) -> list[str]:
    """Count the labels that differ only in their numbers: `4 x token`."""
    kinds = [label.split(" [")[0].rstrip("0123456789 ") for label in labels]
    return [f"{kinds.count(kind)} x {kind}" for kind in dict.fromkeys(kinds)]
