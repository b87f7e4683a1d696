"""What a release of transformers is known to compute otherwise than the checkpoint's own code: said at loading."""

import warnings

import torch
from torch import nn

from mamba_probe.mixers.offload import place

__all__ = ["KnownErrorWarning", "warn_of_known_errors"]


class KnownErrorWarning(UserWarning):
    """The installed release computes something else than the code that the checkpoint was trained with."""


def warn_of_known_errors(module: nn.Module, where: str) -> None:
    """Warn where the installed release is wrong about a mixer of `module`; each is looked for in what it does.

    Up to 5.22 the gated norm of Mamba2, Bamba and GraniteMoeHybrid takes all groups together, where mamba_ssm norms
    each of `n_groups` by itself; and Falcon-H1's drops the token axis of a single token, so that the rows of a batch
    mix while decoding. 5.23 has corrected both.

    Source: ours; measured against the float64 recurrence of the tests.

    Args:
        module: a loaded model.
        where: the checkpoint's place, for the message.

    Example:
        >>> mixer = nn.Module()
        >>> mixer.n_groups, mixer.norm = 2, nn.Module()
        >>> mixer.norm.group_size = 4
        >>> warn_of_known_errors(mixer, "here")
    """
    for is_wrong, what in (
        (_norms_groups_as_one, "norms all groups of {} as one"),
        (_drops_the_token_axis, "mixes the rows of a batch at single tokens, as in generate(), in {}"),
    ):
        names = ", ".join(sorted({type(each).__name__ for each in module.modules() if is_wrong(each)}))
        if names:
            import transformers

            warnings.warn(
                f"{where}: transformers {transformers.__version__} {what.format(names)}, which 5.23 corrected: its "
                "outputs differ from those of the code that the checkpoint was trained with.",
                KnownErrorWarning,
                stacklevel=3,
            )


def _norms_groups_as_one(module: nn.Module) -> bool:
    norm = getattr(module, "norm", None)
    gated = isinstance(norm, nn.Module) and "Gated" in type(norm).__name__
    return gated and getattr(module, "n_groups", 1) > 1 and not {"group_size", "n_groups"} & vars(norm).keys()


def _drops_the_token_axis(module: nn.Module) -> bool:
    norm = getattr(module, "norm", None)
    if type(module).__name__ != "FalconH1Mixer" or not isinstance(norm, nn.Module):
        return False
    (channels,) = next(norm.parameters()).shape
    with torch.no_grad():
        one = torch.ones((1, 1, channels), device=place(norm))
        return norm(one, one).ndim < one.ndim
