"""transformers' directories of the eight further families with Mamba mixers, hybrids among them.

| model_type | class | mixer |
|---|---|---|
| falcon_mamba | FalconMambaForCausalLM | backbone.layers.N.mixer |
| jamba | JambaForCausalLM | model.layers.N.mamba |
| zamba | ZambaForCausalLM | model.layers.N.mamba, model.layers.N.mamba_decoder.mamba |
| zamba2 | Zamba2ForCausalLM | model.layers.N.mamba, model.layers.N.mamba_decoder.mamba |
| bamba | BambaForCausalLM | model.layers.N.mamba |
| granitemoehybrid | GraniteMoeHybridForCausalLM | model.layers.N.mamba |
| nemotron_h | NemotronHForCausalLM | model.layers.N.mixer |
| falcon_h1 | FalconH1ForCausalLM | model.layers.N.mamba |

A backbone (JambaModel, ...) has the same names without `model.` or `backbone.`. Keys are those of the class, which
renames and merges older ones itself (experts, Nemotron-H's `backbone.`), so the weights go through its
`from_pretrained`: they are read here, none of its code reads a file, and what it would only warn of is an error.
"""

import re
import warnings
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from functools import reduce
from typing import Any

import torch
from torch import Tensor, nn

from mamba_probe.formats.build import HEAD

__all__ = ["NAME", "STEMS", "Pretrained", "configuration", "convert", "matches"]

NAME = "transformers"

STEMS = {
    "falcon_mamba": "FalconMamba", "jamba": "Jamba", "zamba": "Zamba", "zamba2": "Zamba2", "bamba": "Bamba",
    "granitemoehybrid": "GraniteMoeHybrid", "nemotron_h": "NemotronH", "falcon_h1": "FalconH1",
}  # fmt: skip
"""Value of `model_type` -> what the names of transformers' classes start with."""

MOST_SPARE = 1 << 26
"""Parameters that a config may name beyond twice those of the file, so that small mistakes are named one by one."""


@dataclass(frozen=True)
class Pretrained:
    """A class of transformers, its configuration and its weights; `fill` joins them as `Recipe.fill` does.

    Source: ours.

    Args:
        kind: a PreTrainedModel.
        config: its configuration.
        weights: tensors by names that `kind.from_pretrained` knows.
    """

    kind: Any
    config: Any
    weights: dict[str, Tensor]

    def fill(self, where: str) -> nn.Module:
        """Build the module from the weights, strictly.

        Raises:
            ValueError: names are missing or unexpected, or shapes differ: all are listed.
        """
        self._refuse_sizes(where)
        try:
            module, report = self.kind.from_pretrained(
                None,
                config=self.config,
                state_dict=dict(self.weights),
                dtype=_one_dtype(self.weights, where),
                ignore_mismatched_sizes=True,
                output_loading_info=True,
            )
        except (RuntimeError, ValueError, KeyError) as error:
            raise ValueError(f"{where}: the weights do not fit {self.kind.__name__}: {error}") from error
        _warn_of_unused(self.kind, self.weights, where)
        problems = _problems(report)
        if problems:
            raise ValueError(f"{where}: the weights do not fit {self.kind.__name__}:\n  " + "\n  ".join(problems))
        _refuse_other_head(module, where)
        if module.dtype == torch.float64 and getattr(module, "_can_set_experts_implementation", bool)():
            module.set_experts_implementation("eager")  # torch's grouped product, the default, has no float64
        return module

    def _refuse_sizes(self, where: str) -> None:
        """transformers makes room for every shape of the config first, and compares them with the file's then."""
        try:
            with torch.device("meta"):
                wanted = sum(parameter.numel() for parameter in self.kind(self.config).parameters())
        except (
            RuntimeError,
            ValueError,
            LookupError,
            TypeError,
            AttributeError,
            ArithmeticError,
            AssertionError,
        ) as error:
            raise ValueError(f"{where}: config.json is not one of {self.kind.__name__}: {error}") from error
        held = sum(tensor.numel() for tensor in self.weights.values())
        if wanted > 2 * held + MOST_SPARE:
            raise ValueError(f"{where}: config.json is of {wanted:,} parameters, but the weights have {held:,}.")


def _problems(report: Mapping[str, Any]) -> list[str]:
    shapes = [f"shape of {name}: expected {tuple(want)}, got {tuple(got)}" for name, got, want in _sorted(report)]
    wrong = {name for name, *_ in report["mismatched_keys"]}
    missing = [f"missing {name}" for name in sorted(set(report["missing_keys"]) - wrong)]
    unexpected = [f"unexpected {name}" for name in sorted(report["unexpected_keys"])]
    return [*missing, *unexpected, *shapes, *(str(message) for message in report.get("error_msgs", ()))]


def _sorted(report: Mapping[str, Any]) -> list[tuple]:
    return sorted(report["mismatched_keys"], key=lambda item: item[0])


def _one_dtype(weights: Mapping[str, Tensor], where: str) -> torch.dtype:
    """The dtype of all weights; where they differ, the narrowest that holds all of them exactly."""
    found = sorted({tensor.dtype for tensor in weights.values()}, key=str)
    if len(found) > 1:
        names = ", ".join(str(dtype) for dtype in found)
        widest = reduce(torch.promote_types, found)
        warnings.warn(f"{where}: weights of {names} are all loaded as {widest}, which loses nothing.", stacklevel=5)
        return widest
    return found[0] if found else torch.float32


def _warn_of_unused(kind: Any, weights: Mapping[str, Tensor], where: str) -> None:
    """Say which tensors the class has no use for by its own list (Nemotron-H's multi-token prediction)."""
    patterns = kind._keys_to_ignore_on_load_unexpected or ()
    unused = sorted(name for name in weights if any(re.search(pattern, name) for pattern in patterns))
    if unused:
        warnings.warn(f"{where}: {kind.__name__} has no use for {', '.join(unused)}: left out.", stacklevel=5)


def _refuse_other_head(module: Any, where: str) -> None:
    """transformers leaves a tied head untied, with a warning alone, where the file holds another one."""
    head, embedding = module.get_output_embeddings(), module.get_input_embeddings()
    if head is not None and module.config.tie_word_embeddings and head.weight is not embedding.weight:
        raise ValueError(
            f"{where}: the config ties {HEAD} to the embedding, but the file holds different tensors for them; "
            "set `tie_word_embeddings` to false, or drop the head from the file."
        )


def matches(config: Mapping[str, Any], keys: Collection[str]) -> bool:
    """Whether this is a transformers checkpoint of one of the eight families.

    Source: ours.

    Example:
        >>> matches({"model_type": "jamba"}, []), matches({"model_type": "mamba"}, [])
        (True, False)
    """
    return config.get("model_type") in STEMS


def configuration(model_type: str, values: Mapping[str, Any], where: str) -> Any:
    """Make transformers' configuration of one of the eight families.

    Source: ours.

    Raises:
        ValueError: a field has a wrong type or value, or fields contradict each other.

    Example:
        >>> configuration("bamba", {"hidden_size": 8, "mamba_n_heads": 4}, "here").mamba_d_head
        4
    """
    import transformers
    from huggingface_hub.errors import StrictDataclassError

    try:
        return getattr(transformers, f"{STEMS[model_type]}Config")(**values)
    except (StrictDataclassError, ValueError, TypeError, AttributeError, KeyError) as error:
        raise ValueError(f"{where}: config.json is not a valid {model_type} configuration: {error}") from error


def convert(config: Mapping[str, Any], weights: dict[str, Tensor], where: str) -> Pretrained:
    """Pretrained of the language model, or of the backbone if the weights are those of one.

    Source: ours. Code named by `auto_map` is never run: transformers' own class is built, with a warning.

    Raises:
        ValueError: the config is invalid.

    Example:
        >>> convert({"model_type": "falcon_mamba"}, {"embeddings.weight": Tensor(4, 8)}, "here").kind.__name__
        'FalconMambaModel'
    """
    import transformers

    if "auto_map" in config:
        warnings.warn(f"{where}: the code that `auto_map` names is not run; transformers' own is.", stacklevel=4)
    values = {name: value for name, value in config.items() if name not in ("auto_map", "model_type")}
    whole_model = any(name == HEAD or name.startswith(("model.", "backbone.")) for name in weights)
    kind = STEMS[config["model_type"]] + ("ForCausalLM" if whole_model else "Model")
    return Pretrained(getattr(transformers, kind), configuration(config["model_type"], values, where), weights)
