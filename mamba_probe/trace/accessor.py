"""`trace.probe`: a thin accessor over plain functions."""

from os import PathLike
from typing import Any

import numpy as np
import xarray as xr

from mamba_probe.trace.contract import require, unknown_name, validate
from mamba_probe.trace.schema import VARIABLES

__all__ = ["ProbeAccessor"]


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

    def _step(self, name: str) -> xr.DataArray:
        """A step variable in blocks of one layer and row, so that what is derived from it stays lazy."""
        array = self._trace[name]
        return array.chunk({dim: 1 for dim in ("layer", "batch") if dim in array.dims})

    @property
    def A_bar(self) -> xr.DataArray:
        """Decay of one step, exp(delta A): recorded, else lazy (dask) from delta and A."""
        if "A_bar" in self._trace:
            return self._trace["A_bar"]
        require(self._trace, "delta", "A")
        log_decay = self._step("delta") * self._trace["A"]
        return self._named(log_decay.copy(data=np.exp(log_decay.data)), "A_bar")

    @property
    def B_bar(self) -> xr.DataArray:
        """Write of one step as executed, delta B (Euler) or delta phi1(delta A) B (zoh): recorded, else lazy."""
        if "B_bar" in self._trace:
            return self._trace["B_bar"]
        require(self._trace, "delta", "B")
        write = self._step("delta") * self.by_head("B")
        if self._trace.attrs.get("discretization") == "zoh":
            require(self._trace, "A")
            exponent = self._step("delta") * self._trace["A"]
            write = write * exponent.copy(data=_phi1(exponent.data))
        return self._named(write, "B_bar")

    def by_head(self, name: str) -> xr.DataArray:
        """`B` or `C` spread from its groups over channels or heads: head i reads group i // (heads / groups)."""
        if name not in ("B", "C"):
            raise unknown_name("grouped variable", name, ("B", "C"))
        require(self._trace, name, "delta")
        if self._trace.attrs["family"] == "s4d":
            return self._step(name)
        head = str(self._trace["delta"].dims[-1])
        per_group = self._trace.attrs["n_heads"] // self._trace.attrs["n_groups"]
        index = xr.DataArray(self._trace[head].values // per_group, dims=head, coords={head: self._trace[head]})
        return self._step(name).isel(group=index).drop_vars("group", errors="ignore")

    def _named(self, array: xr.DataArray, name: str) -> xr.DataArray:
        spec = VARIABLES[name]
        array = array.transpose(*spec.dims(self._trace.attrs["family"])).rename(name)
        return array.assign_attrs(long_name=spec.long_name, units=spec.units, symbol=spec.symbol)

    def save(self, path: str | PathLike[str], *, overwrite: bool = False) -> Any:
        """Write the trace: `*.zarr` as a Zarr store, `*.nc` as netCDF. See `mamba_probe.trace.save`."""
        from mamba_probe.trace.store import save

        validate(self._trace)
        return save(self._trace, path, overwrite=overwrite)


def _phi1(exponent: Any) -> Any:
    """(exp(z) - 1) / z, and 1 at 0, of a numpy or dask array."""
    zero = exponent == 0
    safe = np.where(zero, 1, exponent)
    return np.where(zero, 1, np.expm1(safe) / safe)
