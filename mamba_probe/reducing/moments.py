"""Mean and variance over tokens, merged row by row: two passes within a row, Chan's rule between rows."""

import numpy as np
import xarray as xr
from jaxtyping import Float, Int

from mamba_probe.analyses.common import described
from mamba_probe.reducing.reduction import Accumulating, bounded, n_units, parts
from mamba_probe.reducing.values import check, rest_dims, row_values

__all__ = ["Mean"]

Moments = tuple[np.ndarray, np.ndarray, np.ndarray]


class Mean(Accumulating):
    """See `mean`."""

    def __init__(self, variable: str, *, name: str | None = None, n_bootstrap: int = 200, seed: int = 0):
        super().__init__(n_bootstrap, seed)
        self.variables, self.name = (variable,), name or variable

    def __repr__(self) -> str:
        return f"Mean({self.variables[0]!r}, name={self.name!r}, {self.drawn})"

    def update(self, trace: xr.Dataset) -> None:
        """Fold in the next rows."""
        variable = self.variables[0]
        check(trace, variable)
        self.keep(rest_dims(trace, variable) | {"n_units": n_units(trace)})
        for part in parts(trace):
            block = row_values(trace, variable, part)
            for of, member in part.members.items():
                self._merge(of, part.unit, block[:, member])

    def _merge(self, of: str, unit: int, values: Float[np.ndarray, "layer token *rest"]) -> None:
        units, shape = int(self.constant("n_units")), (values.shape[0], *values.shape[2:])
        n = self.held(of, "n", (units,))
        mean, squares = (self.held(of, name, (units, *shape)) for name in ("mean", "squares"))
        more, centre = values.shape[1], values.mean(axis=1)
        away = centre - mean[unit]
        total = n[unit] + more
        squares[unit] += ((values - centre[:, None]) ** 2).sum(axis=1) + away**2 * (n[unit] * more / total)
        mean[unit] += away * (more / total)
        n[unit] = total

    def result(self) -> xr.Dataset:
        """Mean and variance by class, layer and channel or head, and the mean by layer, with intervals."""
        layers, dims = self.constant("layer"), self.constant("dims").tolist()
        found: dict[str, list] = {}
        for of in self.classes:
            by_layer = [self._layer(of, place) for place in range(len(layers))]
            for name in by_layer[0]:
                found.setdefault(name, []).append(np.stack([one[name] for one in by_layer]))
        what = f"of {self.variables[0]} over tokens"
        texts = {f"{self.name}_mean": f"mean {what}", f"{self.name}_variance": f"variance {what} (divided by n)",
                 f"layer_{self.name}_mean": f"mean {what}, and over {', '.join(dims)}"}  # fmt: skip
        entries = {}
        for name, values in found.items():
            base = name.removesuffix("_low").removesuffix("_high")
            over = ("class", "layer") if name.startswith("layer_") else ("class", "layer", *dims)
            entries[name] = (over, np.stack(values), texts[base] + _END[name[len(base) :]], "1")
        coords = {"class": np.array(self.classes, dtype=object), "layer": layers}
        return described(entries, coords | {dim: self.constant(dim) for dim in dims}, {})

    def _layer(self, of: str, place: int) -> dict[str, np.ndarray]:
        held = self.arrays[of, "n"], self.arrays[of, "mean"][:, place], self.arrays[of, "squares"][:, place]

        def statistic(draws: Int[np.ndarray, " unit"]) -> np.ndarray:
            mean, variance = pooled(held, draws)
            return np.concatenate([mean.ravel(), variance.ravel(), [mean.mean()]])

        found, shape = {}, held[1].shape[1:]
        for end, values in bounded(statistic, len(held[0]), self.n_bootstrap, self.seed).items():
            mean, variance = values[:-1].reshape(2, *shape)
            found |= {f"{self.name}_mean{end}": mean, f"{self.name}_variance{end}": variance}
            found[f"layer_{self.name}_mean{end}"] = values[-1]
        return found


_END = {"": "", "_low": ", lower end", "_high": ", upper end"}


def pooled(
    held: Moments, draws: Int[np.ndarray, " unit"]
) -> tuple[Float[np.ndarray, "*rest"], Float[np.ndarray, "*rest"]]:
    """Mean and variance over units drawn so often; NaN where these have no token.

    >>> n, mean, squares = np.array([1.0, 2.0]), np.array([3.0, 6.0]), np.array([0.0, 2.0])
    >>> pooled((n, mean, squares), np.array([1, 1]))
    (np.float64(5.0), np.float64(2.6666666666666665))
    """
    n, mean, squares = held
    weight = draws * n
    if not weight.sum():
        return np.full(mean.shape[1:], np.nan), np.full(mean.shape[1:], np.nan)
    centre = np.tensordot(weight, mean, 1) / weight.sum()
    spread = np.tensordot(draws, squares, 1) + np.tensordot(weight, (mean - centre) ** 2, 1)
    return centre, spread / weight.sum()
