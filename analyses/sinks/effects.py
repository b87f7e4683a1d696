"""What the class-conditional ablation says: whether a ratio matters to the model's predictions."""

from collections.abc import Mapping

import numpy as np
import xarray as xr
from jaxtyping import Bool

from mamba_probe.analyses.common import Canonical
from mamba_probe.analyses.common.paired import FEWEST_ROWS, P_VALUES, by_row, paired

__all__ = ["LEVEL", "NO_ABLATION", "P_VALUES", "check", "effects", "verdicts"]

LEVEL = 0.05
"""Family-wise error of every finding."""
NO_ABLATION = "a ratio, not a function: no ablation was given"


def check(
    ablated: xr.Dataset, view: Canonical, member: Bool[np.ndarray, "class batch token"], names: list[str]
) -> None:
    """Check that an ablation is of this model, these rows and these classes.

    Raises:
        ValueError: what differs.
    """
    if not isinstance(ablated, xr.Dataset) or "class_loss" not in ablated:
        raise ValueError(f"ablated is what ablate_class(probe, ...) returned; got {type(ablated).__name__}")
    hashes = [data.attrs.get("model_hash") for data in (view.trace, ablated)]
    if None not in hashes and hashes[0] != hashes[1]:
        raise ValueError(f"ablated is of another model: model_hash {hashes[1]}, the trace's is {hashes[0]}")
    given = ablated["class"].values.tolist()
    if given != names:
        raise ValueError(f"ablated has the classes {given}, the trace {names}: pass classes=sinks.classes(trace) to it")
    whole = member.sum(axis=2) == view.valid.sum(axis=1)
    member = member & ~whole[..., None]  # such rows have no rest to level to
    if ablated["member"].shape != member.shape or np.any(ablated["member"].values != member):
        raise ValueError(
            "ablated was made on other tokens: a class holds others there. Give it the rows of this trace, and its mask"
        )


def effects(ablated: xr.Dataset, n_bootstrap: int, seed: int) -> Mapping[str, np.ndarray]:
    """effect_, random_ and excess_ of loss and accuracy by class, the last paired by row, with p-values."""
    found: dict[str, np.ndarray] = {}
    for name, stored in (("loss", "loss"), ("accuracy", "correct")):
        intact = by_row(ablated[stored].values)
        change = by_row(ablated[f"class_{stored}"].values) - intact
        random = (by_row(ablated[f"random_{stored}"].values) - intact).mean(axis=1)
        for kind, values in (("effect", change), ("random", random), ("excess", change - random)):
            parts = paired(values.T, n_bootstrap, seed)
            found |= {f"{kind}_{name}{end}": part for end, part in parts.items() if end != "_p" or kind == "excess"}
        known = ~np.isnan(intact)
        found[f"intact_{name}"] = np.asarray(intact[known].mean())
    return found


def verdicts(found: Mapping[str, np.ndarray] | None, n_classes: int, n_rows: int) -> list[str]:
    """Of each class, in words, by the excess of its loss over that of random tokens."""
    if found is None:
        return [NO_ABLATION] * n_classes
    if n_rows < FEWEST_ROWS:
        return [f"{n_rows} row(s) cannot tell whether it matters: {FEWEST_ROWS} are needed"] * n_classes
    said = []
    for excess, p in zip(found["excess_loss"], found["excess_loss_p"], strict=True):
        if np.isnan(p) or np.isnan(excess):
            said.append("cannot be told: its effect has no p-value")
        elif p > LEVEL:
            said.append("matters no more and no less than random tokens, as far as these rows tell")
        else:
            said.append("matters more than random tokens" if excess > 0 else "matters less than random tokens")
    return said
