"""Vim (Vision Mamba): a bidirectional Mamba of image patches. Its keys are known, and it is refused by name.

| key in the file, after `model` is unwrapped | what it is |
|---|---|
| layers.N.mixer.{in_proj, out_proj}.* | shared by both directions |
| layers.N.mixer.{conv1d, x_proj, dt_proj}.*, A_log, D | the forward direction, as in Mamba-1 |
| layers.N.mixer.{conv1d_b, x_proj_b, dt_proj_b}.*, A_b_log, D_b | the backward direction |
| layers.N.norm.weight, norm_f.weight | RMS norms |
| patch_embed.proj.*, pos_embed, cls_token, head.* | the picture's side |

Source of names: hustvl/Vim, `mamba-1p1p1/mamba_ssm/modules/mamba_simple.py` (`bimamba_type="v2"`) and
`vim/models_mamba.py`. The files are `{"model": state dict}`, without a config. No module here runs a layer in both
directions.
"""

from collections.abc import Collection, Mapping
from typing import Any, NoReturn

from torch import Tensor

__all__ = ["NAME", "convert", "matches"]

NAME = "vim"


def matches(config: Mapping[str, Any], keys: Collection[str]) -> bool:
    """Whether a layer has a second A, that of the backward direction.

    Source: ours.

    Example:
        >>> matches({}, ["layers.0.mixer.A_b_log"]), matches({}, ["layers.0.mixer.A_log"])
        (True, False)
    """
    return any(name.endswith(".A_b_log") or name == "A_b_log" for name in keys)


def convert(config: Mapping[str, Any], weights: dict[str, Tensor], where: str) -> NoReturn:
    """Refuse, by name.

    Source: ours.

    Raises:
        ValueError: always.

    Example:
        >>> convert({}, {}, "here")
        Traceback (most recent call last):
        ...
        ValueError: here: this is Vim (Vision Mamba), whose layers scan in both directions (A_log forward, A_b_log ...
    """
    raise ValueError(
        f"{where}: this is Vim (Vision Mamba), whose layers scan in both directions (A_log forward, A_b_log backward) "
        "over image patches: no module here holds it. Build the model with its own code and probe its mixers live."
    )
