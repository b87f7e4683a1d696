"""Caduceus: a bidirectional Mamba of DNA. Its keys are known, and it is refused by name.

| key in the file, after `caduceus.backbone.` but for the head | what it is |
|---|---|
| embeddings.word_embeddings.weight | embedding |
| layers.N.mixer.mamba_fwd.* | a Mamba-1 mixer of the sequence |
| layers.N.mixer.mamba_rev.* | one of the reversed sequence, in_proj and out_proj tied to the first's |
| layers.N.norm.weight, norm_f.weight | RMS norms |
| lm_head.weight | head |

With `rcps` (reverse complements) there are embeddings.word_embeddings.{embedding.weight, complement_map},
layers.N.mixer.submodule.mamba_{fwd,rev}.* and lm_head.{lm_head.weight, complement_map}, and without `fused_add_norm`
also norm.submodule.weight.

Source of names: kuleshov-group/caduceus, `caduceus/modeling_caduceus.py` (BiMambaWrapper), `modeling_rcps.py` and
`configuration_caduceus.py`. No module here runs a layer in both directions.
"""

from collections.abc import Collection, Mapping
from typing import Any, NoReturn

from torch import Tensor

__all__ = ["MODEL_TYPE", "NAME", "convert", "matches"]

NAME = "caduceus"
MODEL_TYPE = "caduceus"


def matches(config: Mapping[str, Any], keys: Collection[str]) -> bool:
    """Whether this is Caduceus: by model_type, or by its names.

    Source: ours.

    Example:
        >>> matches({"model_type": "caduceus"}, []), matches({}, ["x.mixer.mamba_rev.A_log"]), matches({}, ["A_log"])
        (True, True, False)
    """
    return config.get("model_type") == MODEL_TYPE or any(".mamba_rev." in name for name in keys)


def convert(config: Mapping[str, Any], weights: dict[str, Tensor], where: str) -> NoReturn:
    """Refuse, by name.

    Source: ours.

    Raises:
        ValueError: always.

    Example:
        >>> convert({"model_type": "caduceus"}, {}, "here")
        Traceback (most recent call last):
        ...
        ValueError: here: this is Caduceus, which scans in both directions (mixer.mamba_fwd and mixer.mamba_rev, ...
    """
    raise ValueError(
        f"{where}: this is Caduceus, which scans in both directions (mixer.mamba_fwd and mixer.mamba_rev, their "
        "projections tied): no module here holds it. Build the model with its own code and probe its mixers live."
    )
