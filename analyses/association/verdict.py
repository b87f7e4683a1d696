"""Where the pair is held, and what brought it there, in one sentence and by one rule."""

import numpy as np
import xarray as xr

from mamba_probe.analyses.association.core import held_at

__all__ = ["LATER", "RULE", "say"]

RULE = (
    "a place holds the pair where it gives back .1 of the answer or more, at the lower bound and above the upper bound"
    " of another row's; the first layer whose scan holds it at the value's token or at one of the two after it is where"
    " key and value are joined: by its convolution, or by an earlier layer where its mixer's input there holds it"
    " already; where no scan does but some do at the key's token, key and value are not joined before the query"
)
LATER = ("value", "value+1", "value+2")


def say(result: xr.Dataset) -> tuple[str, str]:
    """The mechanism in a word, and the sentence, of a result that has all but these."""
    accuracy, low = result["accuracy"].item(), result["accuracy_low"].item()
    asked = f"{int(result['n_correct'])} of {int(result['n_query'])} answered (lower bound {low:.2f})"
    if not bool(result["solved"]):
        return "none", f"no mechanism is reported: {asked}, accuracy {accuracy:.2f} is not shown to be above .5"
    if not int(result["n_counted"]):
        return "none", f"no mechanism is reported: {asked}, and no answer is lost when the key is corrupted"
    if "scan" not in result["site"].values:
        return "none", f"no mechanism is reported: what the scan receives was not measured (site scan); {asked}"
    direct = None
    for layer in result["layer"].values.tolist():
        after, held = _held(result, "scan", layer)
        later = [role for role in after if role in LATER]
        if later:
            early = [role for role in _held(result, "mixer_in", layer)[0] if role == later[0]]
            kind = "earlier layer" if early else "convolution"
            return kind, _joined(layer, held, kind, early, asked)
        direct = (layer, held) if direct is None and "key" in after else direct
    if direct is not None:
        return "at the query", (
            f"the scan of layer {direct[0]} gives the answer back at the key's own token ({direct[1]}), none at the"
            f" value's: key and value are not joined before the query; {asked}"
        )
    return "unseen", f"the model recalls, but no one token's scan gives the answer back; {asked}"


def _held(result: xr.Dataset, site: str, layer: int) -> tuple[list[str], str]:
    """Roles that hold the pair at a site, most first, and how much of the answer each gives back, in words."""
    if site not in result["site"].values:
        return [], ""
    one = result.sel(site=site, layer=layer)
    value = one["recovered"].values
    low = np.where(np.isnan(one["recovered_low"]), value, one["recovered_low"])
    null = np.where(np.isnan(one["null_recovered_high"]), one["null_recovered"], one["null_recovered_high"])
    roles = held_at(value, low, null)
    names = result["role"].values
    return [str(names[i]) for i in roles], ", ".join(f"{names[i]} {value[i]:.2f}" for i in roles)


def _joined(layer: int, held: str, kind: str, early: list[str], asked: str) -> str:
    how = f"the convolution of layer {layer} brings the key there"
    if kind == "earlier layer":
        how = f"an earlier layer has brought it there, for the mixer's input at {', '.join(early)} holds it"
    return f"key and value are joined in layer {layer}, in what its scan receives ({held}): {how}; {asked}"
