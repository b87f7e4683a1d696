"""`mamba-probe compare NAME RUN RUN...`: what differs in a measure between recorded runs."""

from typing import Annotated

import typer
from rich.table import Column, Table

from mamba_probe import cli_completing as completing
from mamba_probe.cli_options import LOAD_MODELS, OUT, OVERWRITE, SEED
from mamba_probe.cli_recording import quiet_transformers
from mamba_probe.cli_steps import answered, command, headed, or_else, out, progress

__all__ = ["asked", "compare_command"]


def asked(text: str) -> tuple[str, ...]:
    """Names of analyses, as typed with commas between; "main" are those of a report.

    Raises:
        ValueError: an unknown one, with the nearest.
    """
    from mamba_probe.analyses._names import names
    from mamba_probe.report import MAIN
    from mamba_probe.trace.contract import unknown_name

    given = MAIN if text == "main" else tuple(part.strip() for part in text.split(","))
    with or_else(f"{command('analyze', '--help')}, for all of them and what each measures"):
        for name in given:
            if name not in (*names(), "all"):
                raise unknown_name("analysis", name, (*names(), "all"))
    return given


@answered
def compare_command(
    name: Annotated[str, typer.Argument(
            help="An analysis; `mamba-probe analyze --help` has them.", autocompletion=completing.analyses
        )],
    runs: Annotated[list[str], typer.Argument(
            help="DIR or LABEL=DIR of each run; the first is the reference.", autocompletion=completing.runs
        )],
    out_dir: OUT,
    variable: Annotated[
        list[str] | None, typer.Option(help="Variables of its result, one each time; default: its summaries by layer.")
    ] = None,
    resample: Annotated[
        str, typer.Option(help="each: every row measured by itself. refit: rows drawn and measured together; dear.")
    ] = "each",
    unpaired: Annotated[bool, typer.Option("--unpaired", help="Of other prompts each: wider intervals.")] = False,
    seed: SEED = 0, overwrite: OVERWRITE = False, load_models: LOAD_MODELS = False,
) -> None:  # fmt: skip
    """What differs in a measure between runs on the same prompts, with paired intervals: models, or revisions of one.

    Writes DIR/NAME.nc, and a picture of each variable. Labels that are numbers, as training steps are, are drawn in
    order. p is adjusted by Holm over all differences: name the variables that you mean.

    Examples:

      mamba-probe compare hidden_attention mamba1 mamba2 --variable layer_entropy -o differences

      mamba-probe compare memory_horizon 0=start 500=half 1000=end --variable layer_selectivity_gain -o training
    """
    from mamba_probe import compare
    from mamba_probe.analyses.comparison import Unlike
    from mamba_probe.report import caution, differences, draw_comparison, labelled
    from mamba_probe.trace.store import check_free as check_store_free
    from mamba_probe.trace.store import save

    quiet_transformers()
    check_store_free(out_dir / f"{name}.nc", overwrite)
    with progress() as say:
        say(f"opening {len(runs)} runs")
        with or_else(command("record", "MODEL", "--task", "mqar", "-o", "RUN"), on=FileNotFoundError):
            given = labelled(runs, load_models)
        asked(name)
        say(f"measuring {name} of each")
        try:
            result = compare(
                name, given, variable=variable or None, reference=next(iter(given)), resample=resample,
                paired=not unpaired, seed=seed,
            )  # fmt: skip
        except Unlike as error:
            raise ValueError(f"{error.found}. Name others, --variable NAME") from None
        save(result, out_dir / f"{name}.nc", overwrite=overwrite)
        say("drawing")
        paths = draw_comparison(result, out_dir, name)
    table = Table(
        Column("what", overflow="fold"),
        Column("run", overflow="fold"),
        "value",
        result.attrs["reference"],
        "difference",
        "95 % interval",
        "p (Holm)",
    )
    for row in differences(result):
        table.add_row(*row)
    out.print(table)
    out.print(caution(result), soft_wrap=True)
    if left_out := result.attrs["left_out"]:
        out.print(headed("left out, unlike in the runs", left_out), highlight=False, soft_wrap=True)
    out.print(str(out_dir / f"{name}.nc"), *(str(path) for path in paths), sep="\n", highlight=False, soft_wrap=True)
