"""`mamba-probe verify STORE...`: every byte of stores against their checksums."""

from pathlib import Path
from typing import Annotated

import typer

from mamba_probe import cli_completing as completing
from mamba_probe.cli_steps import answered, err, out

__all__ = ["verify_command"]


@answered
def verify_command(
    stores: Annotated[
        list[Path],
        typer.Argument(help="*.zarr or *.nc, or what `record` or `report` wrote.", autocompletion=completing.runs),
    ],
) -> None:
    """Compare every byte of stores with its checksum: a flipped bit is found, and its chunk named.

    Of a recording that was broken off it says how much is whole. The exit code is 0 where all is whole, else 1.

    Examples:

      mamba-probe verify run

      mamba-probe verify run/trace.zarr other.nc
    """
    from mamba_probe.trace.verify import stores_in, verify

    found = [verify(store, progress=err.is_terminal) for given in stores for store in stores_in(given)]
    for each in found:
        out.print(repr(each), markup=False, highlight=False, soft_wrap=True)
    if not all(each.whole for each in found):
        raise typer.Exit(1)
