"""Recipe: a module on the meta device and the weights that belong in it; filling it is strict.

A weight is missing, unexpected or mis-shaped by name, or it is assigned as it is: nothing is initialised.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from difflib import get_close_matches

from torch import Tensor, nn

__all__ = ["Recipe", "refuse_nonfinite", "refuse_wrapped"]

_ANY_DTYPE = (
    "A_log", "D", "dt_bias", "kernel.C", "kernel.log_dt", "kernel.log_A_real", "kernel.A_imag",
)  # fmt: skip
"""What a scan widens itself, so that a checkpoint may keep it wider than the layers around it."""


@dataclass(frozen=True)
class Recipe:
    """A module without data and its weights; `fill` joins them.

    Source: ours.

    Args:
        module: module whose parameters are on the meta device.
        weights: tensors by the module's own names, tied ones left out.
        tied: parameter -> the parameter it shares, e.g. lm_head.weight -> backbone.embeddings.weight.

    Example:
        >>> import torch
        >>> with torch.device("meta"):
        ...     module = nn.Linear(2, 1, bias=False)
        >>> Recipe(module, {"weight": torch.ones(1, 2)}).fill("here")(torch.ones(2)).item()
        2.0
    """

    module: nn.Module
    weights: dict[str, Tensor]
    tied: Mapping[str, str] = field(default_factory=dict)

    def fill(self, where: str) -> nn.Module:
        """Assign every weight and return the module.

        Raises:
            ValueError: names are missing or unexpected, or shapes differ: all are listed; or layers of several dtypes.
        """
        wanted = {name: tensor for name, tensor in self.module.state_dict().items() if name not in self.tied}
        problems = _differences(wanted, self.weights)
        if problems:
            kind = type(self.module).__name__
            raise ValueError(f"{where}: the weights do not fit {kind}:\n  " + "\n  ".join(problems))
        _refuse_mixed(self.weights, where)
        self.module.load_state_dict(self.weights, assign=True, strict=False)  # compared above, tied names apart
        for name, source in self.tied.items():
            owner, _, leaf = name.rpartition(".")
            setattr(self.module.get_submodule(owner), leaf, self.module.get_parameter(source))
        empty = [name for name, tensor in self.module.state_dict().items() if tensor.is_meta]
        if empty:
            raise ValueError(f"{where}: no data for {', '.join(empty)}.")
        return self.module


def _refuse_mixed(weights: Mapping[str, Tensor], where: str) -> None:
    """torch multiplies no matrices of two dtypes."""
    first = {tensor.dtype: name for name, tensor in weights.items() if not name.endswith(_ANY_DTYPE)}
    if len(first) > 1:
        found = ", ".join(f"{name} is {dtype}" for dtype, name in first.items())
        raise ValueError(f"{where}: the layers' weights are of several dtypes: {found}. Pass dtype=torch.float32.")


def _differences(wanted: Mapping[str, Tensor], got: Mapping[str, Tensor]) -> list[str]:
    missing = [f"missing {name}{_nearest(name, got)}" for name in wanted if name not in got]
    unexpected = [f"unexpected {name}{_nearest(name, wanted)}" for name in got if name not in wanted]
    shapes = [
        f"shape of {name}: expected {tuple(wanted[name].shape)}, got {tuple(tensor.shape)}"
        for name, tensor in got.items()
        if name in wanted and tensor.shape != wanted[name].shape
    ]
    return missing + unexpected + shapes


def _nearest(name: str, others: Mapping[str, Tensor]) -> str:
    """The closest name of the same layer, so that a slip in one letter is seen at once."""
    numbers = [part for part in name.split(".") if part.isdigit()]
    same_layer = [other for other in others if [part for part in other.split(".") if part.isdigit()] == numbers]
    near = [other for other in get_close_matches(name, same_layer, n=1, cutoff=0.8) if other != name]
    return f" (nearest: {near[0]})" if near else ""


def refuse_nonfinite(weights: Mapping[str, Tensor], where: str) -> None:
    """Refuse NaN and infinity in weights.

    Source: ours.

    Raises:
        ValueError: naming each such tensor and how many of its values are not finite.

    Example:
        >>> import torch
        >>> refuse_nonfinite({"D": torch.tensor([1.0, float("nan")])}, "here")
        Traceback (most recent call last):
        ...
        ValueError: here: weights must be finite; D has 1 of 2 values NaN or infinite.
    """
    bad = [name for name, tensor in weights.items() if not _is_finite(tensor)]
    found = [f"{name} has {int((~weights[name].isfinite()).sum())} of {weights[name].numel()}" for name in bad]
    if found:
        raise ValueError(f"{where}: weights must be finite; {', '.join(found)} values NaN or infinite.")


def refuse_wrapped(weights: Mapping[str, Tensor], where: str) -> None:
    """Refuse the weights of a model that was saved within another.

    Source: ours; torch.nn.DataParallel and DistributedDataParallel hold their model as `module`.

    Raises:
        ValueError: every name begins with "module.".

    Example:
        >>> refuse_wrapped({"module.D": Tensor([1.0])}, "here")
        Traceback (most recent call last):
        ...
        ValueError: here: the name of every weight begins with 'module.', as DataParallel has it: save ...
    """
    if weights and all(name.startswith("module.") for name in weights):
        raise ValueError(
            f"{where}: the name of every weight begins with 'module.', as DataParallel has it: save"
            " model.module.state_dict(), or rename the weights."
        )


def _is_finite(tensor: Tensor) -> bool:
    """NaN and infinity both reach an extreme, and finding those needs no copy of the tensor."""
    return tensor.numel() == 0 or all(bool(extreme.isfinite()) for extreme in tensor.aminmax())
