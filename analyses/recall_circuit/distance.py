"""How far a layer is from the closed-form circuit, signature by signature."""

from collections.abc import Mapping

import numpy as np
import xarray as xr

from mamba_probe.analyses.common import described
from mamba_probe.analyses.common.style import check

__all__ = ["distance"]


def distance(result: xr.Dataset, ideals: Mapping[str, float] | None = None) -> xr.Dataset:
    """The distance of each layer to the construction, as one labelled table (ours).

    distance = (measured - ideal) / (null - ideal): 0 at the construction, 1 at chance, above 1 beyond it.
    As rows: `distance(result).to_dataframe()`.

    Args:
        result: of `measure`.
        ideals: the ideal of each signature, as a `Construction.signatures` states them ("S11" stands for S11_B, S11_C
            and S11_x); None: those of the circuit with one-hot keys. A signature without one has no distance.

    Returns:
        measured, low, high, ideal, null, distance over (layer, signature), with coordinates label and absent.

    Raises:
        ValueError: a result of another analysis, or an ideal of a signature that is not.

    >>> measured = xr.Dataset(
    ...     {name: (("signature", "layer"), [[value]]) for name, value in
    ...      {"value": 0.8, "low": 0.7, "high": 0.9, "null": 0.2}.items()},
    ...     {"signature": ["S1"], "layer": [0], "ideal": ("signature", [1.0]), "label": ("signature", ["pairs"]),
    ...      "absent": ("signature", [""])}, {"analysis": "recall_circuit"})
    >>> round(distance(measured).distance.item(), 6)
    0.25
    """
    check(result, "recall_circuit")
    ideal = result["ideal"].values if ideals is None else _stated(result["signature"].values.tolist(), ideals)
    names = {"value": "measured", "low": "low", "high": "high", "null": "null"}
    arrays = {new: result[old].transpose("layer", "signature").values for old, new in names.items()}
    arrays["ideal"] = np.where(np.isnan(arrays["measured"]), np.nan, ideal)
    room = arrays["ideal"] - arrays["null"]
    safe = np.where(room == 0, np.nan, room)
    arrays["distance"] = (arrays["ideal"] - arrays["measured"]) / safe
    text = {"distance": "(measured - ideal) / (null - ideal): 0 at the construction, 1 at chance"}
    entries = {name: (("layer", "signature"), array, text.get(name, name), "1") for name, array in arrays.items()}
    coords = {name: result[name].variable for name in ("layer", "signature", "label", "absent")}
    return described(entries, coords, {**result.attrs, "analysis": "recall_circuit distance"})


def _stated(names: list[str], ideals: Mapping[str, float]) -> np.ndarray:
    unknown = [name for name in ideals if name not in names and name != "S11"]
    if unknown:
        raise ValueError(f"ideals name {', '.join(unknown)}, which are no signatures; those are {', '.join(names)}")
    known = {name: ideals["S11"] for name in names if name.startswith("S11") and "S11" in ideals} | dict(ideals)
    return np.array([known.get(name, np.nan) for name in names])
