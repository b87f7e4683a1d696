"""What a release of transformers is known to compute otherwise than the checkpoint's own code: said at loading."""

import warnings

from torch import nn

__all__ = ["KnownErrorWarning", "warn_of_ungrouped_norms"]


class KnownErrorWarning(UserWarning):
    """The installed release computes something else than the code that the checkpoint was trained with."""


def warn_of_ungrouped_norms(module: nn.Module, where: str) -> None:
    """Warn where Mamba-2's gated norm takes all groups together: mamba_ssm norms each of `n_groups` by itself.

    transformers does so in Mamba2, Bamba and GraniteMoeHybrid up to 5.22; 5.23 norms by group.

    Source: ours; measured against the float64 recurrence of the tests.

    Args:
        module: a loaded model.
        where: the checkpoint's place, for the message.

    Example:
        >>> mixer = nn.Module()
        >>> mixer.n_groups, mixer.norm = 2, nn.Module()
        >>> mixer.norm.group_size = 4
        >>> warn_of_ungrouped_norms(mixer, "here")
    """
    wrong = sorted({type(each).__name__ for each in module.modules() if _norms_groups_as_one(each)})
    if wrong:
        import transformers

        warnings.warn(
            f"{where}: transformers {transformers.__version__} norms all groups of {', '.join(wrong)} as one, which "
            "5.23 corrected: its outputs differ from those of the code that the checkpoint was trained with.",
            KnownErrorWarning,
            stacklevel=3,
        )


def _norms_groups_as_one(module: nn.Module) -> bool:
    norm = getattr(module, "norm", None)
    gated = isinstance(norm, nn.Module) and "Gated" in type(norm).__name__
    return gated and getattr(module, "n_groups", 1) > 1 and not {"group_size", "n_groups"} & vars(norm).keys()
