"""The trace: a recording as one labelled `xarray.Dataset`, its contract, its accessor and its stores."""

from mamba_probe.trace.accessor import ProbeAccessor
from mamba_probe.trace.contract import require, validate
from mamba_probe.trace.store import open_dataset, open_trace, save

__all__ = ["ProbeAccessor", "open_dataset", "open_trace", "require", "save", "validate"]
