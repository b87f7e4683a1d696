"""`trace.probe`: a thin accessor over plain functions."""

from collections.abc import Sequence
from os import PathLike
from typing import TYPE_CHECKING, Any

import numpy as np
import xarray as xr

from mamba_probe.trace.contract import TOKEN_ORDER, check_held, directions, unknown_name, validate
from mamba_probe.trace.frame import frame_of
from mamba_probe.trace.html import card
from mamba_probe.trace.memory import readable
from mamba_probe.trace.schema import DIRECTIONS, VARIABLES
from mamba_probe.trace.unroll import unrolled

if TYPE_CHECKING:
    import pandas as pd

__all__ = ["ProbeAccessor"]

FACTS = ("model", "model_hash", "backend", "discretization", "parity_error", "edits", "created_at")
"""Attributes that a notebook shows below a trace's variables."""


@xr.register_dataset_accessor("probe")
class ProbeAccessor:
    """What a trace can say of itself: `trace.probe.A_bar`, `trace.probe.save("run.zarr")`.

    >>> import xarray as xr
    >>> xr.Dataset(attrs={"schema_version": 1, "family": "mamba"}).probe
    trace (mamba): 0 variables, 0.0 MB
    """

    def __init__(self, trace: xr.Dataset):
        self._trace = trace

    def __repr__(self) -> str:
        trace = self._trace
        validate(trace)
        sizes = ", ".join(f"{dim}: {size}" for dim, size in trace.sizes.items())
        head = f"trace ({trace.attrs['family']}): {len(trace.data_vars)} variables, {trace.nbytes / 1e6:.1f} MB"
        return head + (f" ({sizes})" if sizes else "")

    def _repr_html_(self) -> str:
        """The same in a notebook, with a row for each variable, and what was recorded of which model."""
        trace = self._trace
        rows = [
            (name, ", ".join(f"{dim}: {size}" for dim, size in array.sizes.items()), array.dtype,
             readable(array.nbytes), array.attrs.get("long_name", ""))
            for name, array in trace.data_vars.items()
        ]  # fmt: skip
        layers = (
            f"layers: {', '.join(map(str, np.atleast_1d(trace['layer'].values)))}" if "layer" in trace.coords else ""
        )
        said = [f"{name.replace('_', ' ')}: {trace.attrs[name]}" for name in FACTS if trace.attrs.get(name, "") != ""]
        along = [name for name in map(str, trace.coords) if name not in trace.dims]
        coords = f"coordinates: {', '.join(along)}" if along else ""
        facts = filter(None, (layers, coords, *said))
        return card(repr(self), ("variable", "dimensions", "dtype", "size", "what it is"), rows, facts)

    def _step(self, name: str) -> xr.DataArray:
        """A step variable in blocks of one layer and row, so that what is derived from it stays lazy."""
        array = self._trace[name]
        return array.chunk({dim: 1 for dim in ("layer", "batch") if dim in array.dims})

    @property
    def A_bar(self) -> xr.DataArray:
        """Decay of one step, exp(delta A): recorded, else lazy (dask) from delta and A."""
        if "A_bar" in self._trace:
            return self._trace["A_bar"]
        check_held(self._trace, "delta", "A")
        log_decay = self._step("delta") * self._trace["A"]
        return self._named(log_decay.copy(data=np.exp(log_decay.data)), "A_bar")

    @property
    def B_bar(self) -> xr.DataArray:
        """Write of one step as executed, delta B (Euler) or delta phi1(delta A) B (zoh): recorded, else lazy."""
        if "B_bar" in self._trace:
            return self._trace["B_bar"]
        check_held(self._trace, "delta", "B")
        write = self._step("delta") * self.by_head("B")
        if self._trace.attrs.get("discretization") == "zoh":
            check_held(self._trace, "A")
            exponent = self._step("delta") * self._trace["A"]
            write = write * exponent.copy(data=_phi1(exponent.data))
        return self._named(write, "B_bar")

    def by_head(self, name: str) -> xr.DataArray:
        """`B` or `C` spread from its groups over channels or heads: head i reads group i // (heads / groups)."""
        if name not in ("B", "C"):
            raise unknown_name("grouped variable", name, ("B", "C"))
        check_held(self._trace, name, "delta")
        if self._trace.attrs["family"] == "s4d":
            return self._step(name)
        head = "head" if self._trace.attrs["family"] == "mamba2" else "channel"
        n_heads, n_groups = self._trace.attrs["n_heads"], self._trace.attrs["n_groups"]
        if not isinstance(n_heads, int) or not isinstance(n_groups, int) or n_groups < 1:
            raise ValueError(f"a trace's n_heads and n_groups are whole numbers; got {n_heads!r} and {n_groups!r}")
        per_group = n_heads // n_groups
        index = xr.DataArray(self._trace[head].values // per_group, dims=head, coords={head: self._trace[head]})
        return self._step(name).isel(group=index).drop_vars("group", errors="ignore")

    def _named(self, array: xr.DataArray, name: str) -> xr.DataArray:
        spec = VARIABLES[name]
        array = array.transpose(*spec.dims(self._trace.attrs["family"], "direction" in self._trace.dims)).rename(name)
        return array.assign_attrs(long_name=spec.long_name, units=spec.units, symbol=spec.symbol)

    def along(self, direction: str) -> xr.Dataset:
        """One direction of a bidirectional layer, with the tokens in the order in which its scan took them.

        A trace has every direction at the tokens' own places. For a scan that goes from the last token to the first,
        tokens are reversed here, so that what a token remembers lies before it, as analyses take it to: `token` and
        `source_token` count from the last recorded token of all, and `position` from that of its row.

        Raises:
            ValueError: no such direction in this trace, or its tokens are reversed already.

        >>> import xarray as xr
        >>> delta = (("layer", "batch", "token", "channel", "direction"), np.arange(6.0).reshape(1, 1, 3, 1, 2))
        >>> attrs = {"schema_version": 1, "family": "mamba"}
        >>> trace = xr.Dataset({"delta": delta}, {"direction": ["forward", "backward"]}, attrs)
        >>> trace.probe.along("backward")["delta"].values.ravel().tolist()
        [5.0, 3.0, 1.0]
        """
        held = directions(self._trace)
        if not held:
            raise ValueError("this trace has no direction: its layers scan from the first token to the last only")
        if direction not in held:
            raise unknown_name("direction", direction, tuple(held))
        if TOKEN_ORDER in self._trace.attrs:
            raise ValueError(f"the tokens of this trace are in the order of its direction, {held[0]}, already")
        one = self._trace.sel(direction=direction) if "direction" in self._trace.dims else self._trace
        return _reversed(one).assign_attrs({TOKEN_ORDER: "reversed"}) if DIRECTIONS[direction] else one

    def unrolled(self, sequences: Any = None) -> xr.Dataset:
        """Each row a sequence with its own history, also after a beam search: see `mamba_probe.trace.unroll`."""
        return unrolled(self._trace, sequences)

    def to_dataframe(
        self, variables: str | Sequence[str], *, layers: Sequence[int] | None = None,
        max_memory: int | str | None = None,
    ) -> "pd.DataFrame":  # fmt: skip
        """Variables of equal dimensions as a table for pandas, without padding: see `mamba_probe.trace.frame`."""
        return frame_of(self._trace, variables, layers, max_memory)

    def save(self, path: str | PathLike[str], *, overwrite: bool = False) -> Any:
        """Write the trace: `*.zarr` as a Zarr store, `*.nc` as netCDF. See `mamba_probe.trace.save`."""
        from mamba_probe.trace.store import save

        validate(self._trace)
        return save(self._trace, path, overwrite=overwrite)


def _reversed(trace: xr.Dataset) -> xr.Dataset:
    """The trace from its last token to its first; what counts tokens counts from there."""
    back = trace.isel(token=slice(None, None, -1))
    last = int(trace["token"].max()) if "token" in trace.coords else trace.sizes["token"] - 1
    counted: dict[str, Any] = {"token": last - back["token"].values} if "token" in back.coords else {}
    if "position" in back.coords:
        position = back["position"]
        counted["position"] = xr.where(position < 0, -1, position.max("token") - position)
    if "source_token" in back.coords:
        source = back["source_token"]
        counted["source_token"] = xr.where(source < 0, -1, last - source)
    return back.assign_coords({name: (back[name].dims, np.asarray(values)) for name, values in counted.items()})


def _phi1(exponent: Any) -> Any:
    """(exp(z) - 1) / z, and 1 at 0, of a numpy or dask array."""
    zero = exponent == 0
    safe = np.where(zero, 1, exponent)
    return np.where(zero, 1, np.expm1(safe) / safe)
