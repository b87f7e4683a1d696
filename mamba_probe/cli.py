"""The command line: `mamba-probe report MODEL --task mqar -o DIR`, and the steps it is made of."""

from typing import Annotated, Any

import typer
from rich.table import Column, Table

from mamba_probe import cli_completing as completing
from mamba_probe.cli_compare import asked, compare_command
from mamba_probe.cli_options import (
    ANALYSES,
    BACKEND,
    BATCH_SIZE,
    BESIDE,
    COMPRESS,
    FORCE,
    LENGTH,
    LOAD_MODELS,
    MAX_MEMORY,
    MODEL,
    OUT,
    OVERWRITE,
    PAIRS,
    RESUME,
    ROWS,
    RUN,
    SEED,
    TASK,
    TEXT,
    TOKENIZER,
    TRAINED_ON,
    Backend,
    What,
)
from mamba_probe.cli_recording import (
    NO_MODEL,
    check_alone,
    check_free,
    or_else_no_model,
    place,
    quiet_transformers,
    recorded,
)
from mamba_probe.cli_reduce import reduce_command
from mamba_probe.cli_steps import Commands, answered, command, headed, lines, or_else, out, progress
from mamba_probe.cli_verify import verify_command

__all__ = ["app", "main"]

app = typer.Typer(
    cls=Commands, no_args_is_help=True, rich_markup_mode="rich", pretty_exceptions_enable=False,
    help="Look inside trained Mamba models: record delta, A_bar, B and C, and measure what input selectivity does.\n\n"
    "Start with: [bold]mamba-probe report zoo:trained-mqar-mamba1 --task mqar -o report[/bold]",
)  # fmt: skip


@app.command()
@answered
def report(
    model: MODEL, out_dir: OUT, task: TASK = None, text: TEXT = None, tokenizer: TOKENIZER = None, rows: ROWS = None,
    length: LENGTH = None, n_pairs: PAIRS = 8, seed: SEED = 0, beside: BESIDE = None, overwrite: OVERWRITE = False,
    backend: BACKEND = Backend.auto, train_length: TRAINED_ON = None, analyses: ANALYSES = "main",
) -> None:  # fmt: skip
    """The main job: record, the three analyses, pictures, one self-contained [bold]report.html[/bold].

    Writes DIR/trace.zarr, weights.nc, parity.nc, results/*.nc, figures/*.png and *.svg, report.html.

    A checkpoint whose card names a reference, as the zoo's trained do, has it beside: in tables, figures, DIR/beside.

    Examples:

      mamba-probe report zoo:trained-mqar-mamba1 --task mqar -o report

      mamba-probe report state-spaces/mamba-130m --text notes.txt --tokenizer EleutherAI/gpt-neox-20b -o report
    """
    from mamba_probe.report import analyse, analyse_beside, finding, write_report
    from mamba_probe.run import BESIDE

    check_free(out_dir, overwrite)
    check_alone()
    names = asked(analyses)
    with progress() as say:
        run = recorded(
            model, task, text, tokenizer, rows, length, n_pairs, seed, beside, backend, train_length, None, say
        )  # fmt: skip
        run.save(out_dir, overwrite=overwrite)
        options = {"names": names, "seed": seed, "say": say, "overwrite": overwrite}
        results = analyse(run, out_dir / "results", **options)
        others = analyse_beside(run, out_dir / BESIDE / "results", **options)
        say("drawing")
        page = write_report(run, results, out_dir, beside=others)
    for name, result in results.items():
        _print(name, finding(name, result, others.get(name)), run)
    out.print(headed("report", page), highlight=False, soft_wrap=True)
    said = f"open it in a browser; its numbers are in {out_dir / 'results'}, its pictures in {out_dir / 'figures'}"
    out.print(headed("next", said), highlight=False, soft_wrap=True)


@app.command()
@answered
def record(
    model: MODEL, out_dir: OUT, task: TASK = None, text: TEXT = None, tokenizer: TOKENIZER = None, rows: ROWS = None,
    length: LENGTH = None, n_pairs: PAIRS = 8, seed: SEED = 0, beside: BESIDE = None, overwrite: OVERWRITE = False,
    backend: BACKEND = Backend.auto, train_length: TRAINED_ON = None, resume: RESUME = False,
    batch_size: BATCH_SIZE = None, max_memory: MAX_MEMORY = None, compress: COMPRESS = None, force: FORCE = False,
) -> None:  # fmt: skip
    """Record only: DIR/trace.zarr with the weights, the parity and, for a task, answers under edits and a twin.

    Traces stream to disk while the model runs, by layers and by blocks of --batch-size rows: memory does not grow with
    --rows, and what stops the recording leaves the blocks that are whole. --resume goes on with them, and makes what
    else is missing. What it will weigh is said first; what the disk has no room for is refused, unless with --force.

    Under torchrun, which sets RANK and WORLD_SIZE, each process records its share of the blocks (on its own GPU, where
    there are any), and the first does the rest.

    Examples:

      mamba-probe record zoo:mqar-mamba1 --task mqar -o run

      mamba-probe record state-spaces/mamba-130m --text book.txt --rows 2000 --compress zstd -o run --resume

      torchrun --nproc-per-node 8 -m mamba_probe record zoo:mqar-mamba1 --task mqar --rows 4096 -o run --resume
    """
    into = place(
        out_dir, resume=resume, overwrite=overwrite, batch_size=batch_size, max_memory=max_memory,
        compress=compress, force=force,
    )  # fmt: skip
    if not resume:
        check_free(out_dir, overwrite or not into.leads, " --resume to go on with it,")
    with lines(shown=into.leads) as say:
        run = recorded(
            model, task, text, tokenizer, rows, length, n_pairs, seed, beside, backend, train_length, into, say
        )  # fmt: skip
    if into.leads:
        out.print(repr(run.trace.probe), highlight=False)
        out.print(headed("run", out_dir), highlight=False, soft_wrap=True)
        out.print(headed("next", command("analyze", "all", out_dir, "-o", "results")), highlight=False, soft_wrap=True)


@app.command(
    epilog="Those of a report: recall_circuit, memory_horizon, wavelet_alignment. More: ablation (of heads and layers),"
    " association (where key and value are joined), attribution (MambaLRP, gradient x input), hidden_attention,"
    " receptive_field, sinks (steps by class of token, and whether they matter), state_dynamics."
)
@answered
def analyze(
    name: Annotated[
        str,
        typer.Argument(
            help="An analysis (below), several with commas between, or all.", autocompletion=completing.analyses
        ),
    ],
    run_dir: RUN,
    out_dir: OUT, seed: SEED = 0, overwrite: OVERWRITE = False, load_models: LOAD_MODELS = False,
) -> None:  # fmt: skip
    """Analyses of a recorded run: DIR/NAME.nc and its picture each, and one DIR/report.html of several.

    all: every analysis that the run has what it needs for; what is left out is said, with what it lacks. Some load the
    recorded model again, from where it came (see --load-models), and refuse it where its weights have changed.

    Examples:

      mamba-probe analyze memory_horizon run -o results

      mamba-probe analyze all run -o everything
    """
    from mamba_probe.report import analyse, analyse_beside, draw, finding, measurable, write_report
    from mamba_probe.run import BESIDE, Run

    quiet_transformers()
    with progress() as say:
        with or_else(command("record", "MODEL", "--task", "mqar", "-o", run_dir), on=FileNotFoundError):
            run = Run.open(run_dir, load_models=load_models)
        options = {"names": asked(name), "seed": seed, "say": say, "overwrite": overwrite}
        wanted, _ = measurable(run, options["names"])
        results = analyse(run, out_dir, **options)
        others = analyse_beside(run, out_dir / BESIDE, **options)
        say("drawing")
        if len(wanted) > 1:
            paths = [write_report(run, results, out_dir, beside=others, figures="", stored="")]
        else:
            paths = draw(name, results[name], out_dir, beside=others.get(name))
    for each, result in results.items():
        _print(each, finding(each, result, others.get(each)), run)
    out.print(*(str(path) for path in paths), sep="\n", highlight=False, soft_wrap=True)
    if len(results) < len(wanted):
        raise typer.Exit(1)


app.command("compare")(compare_command)
app.command("reduce")(reduce_command)
app.command("verify")(verify_command)


@app.command("reproduce")
@answered
def reproduce_command(
    what: Annotated[What, typer.Argument(help="The claim, or all of them.")],
    out_dir: OUT,
    seed: Annotated[int, typer.Option(min=0, help="Seed of every draw and of the randomised twins.")] = 0,
    overwrite: OVERWRITE = False,
) -> None:
    """The paper's claims in numbers, on a CPU: planted weights and the zoo's trained, beside what the abstract says.

    Writes, for each claim NAME, DIR/NAME.csv (a row a measurement), NAME.md, NAME.png and NAME.svg, and one
    self-contained [bold]index.html[/bold]. Each row has its null, its interval, its bound and a verdict: "holds",
    "fails as it must" (a failure that theory demands), "reported" (a finding, which nothing demands), or "FAILS"; then
    the exit code is 1, after all is written.

    --overwrite removes the files of all claims that an earlier run left in DIR, and index.html.

    haar: wavelet coefficients by one S6 layer. keep: one token, however long ago. mqar: associative recall in each
    mixer. induction: what followed the token before. Of trained models: trained-keep, what a layer forgets before, at
    and after its token; trained-recall, cards counted again, recall without its convolution; trained-analyses, every
    analysis beside the construction. all: some minutes on 2 cores.

    Examples:

      mamba-probe reproduce haar -o haar

      mamba-probe reproduce all -o claims --overwrite
    """
    from mamba_probe.reproduce import CLAIMS, failures, reproduce
    from mamba_probe.reproduce.table import sentence

    names = list(CLAIMS) if what is What.all else [what.value]
    quiet_transformers()
    with progress() as say:
        results = reproduce(names, out_dir, seed=seed, overwrite=overwrite, say=say)
    for name, result in results.items():
        out.print(headed(name, sentence(result.rows)), highlight=False, soft_wrap=True)
    out.print(headed("page", out_dir / "index.html"), highlight=False, soft_wrap=True)
    if failures(results):
        raise typer.Exit(1)


@app.command()
@answered
def inspect(
    model: MODEL,
    rows: Annotated[int, typer.Option(min=1, help="Rows of the recording that is weighed.")] = 1,
    length: Annotated[int, typer.Option(min=1, help="Tokens a row of it.")] = 2048,
) -> None:
    """What a model is to the probe: its layers and sizes, hook points, what can be recorded and edited, what it weighs.

    Examples:

      mamba-probe inspect state-spaces/mamba-130m --rows 4 --length 1024
    """
    from mamba_probe.loading import load
    from mamba_probe.probe import attach
    from mamba_probe.report.inspecting import described, points

    quiet_transformers()
    with or_else_no_model(model, NO_MODEL[:1]):
        loaded = load(model)
    with attach(loaded) as probe:
        out.print(repr(probe), highlight=False)
        names = probe.hook_names()
    for table in (*described(loaded, rows, length), points(names)):
        out.print(table)


@app.command("zoo")
@answered
def zoo_command(
    name: Annotated[
        str | None, typer.Argument(help="zoo:NAME, to see all of its card.", autocompletion=completing.models)
    ] = None,
) -> None:
    """The checkpoints that ship with the package; of one, what its card says.

    Examples:

      mamba-probe zoo

      mamba-probe zoo zoo:trained-mqar-mamba1
    """
    from mamba_probe import zoo

    if name is not None:
        _print_card(zoo.card(name.removeprefix("zoo:")))
        return
    table = Table(*(Column(head, no_wrap=True) for head in ("name", "task", "accuracy")))
    for each in zoo.names():
        card = zoo.card(each)
        table.add_row(f"zoo:{each}", card["task"]["name"], _accuracy(card))
    out.print(table)
    out.print(headed("next", f"{command('zoo', 'NAME')}, for all that one is"), highlight=False, soft_wrap=True)


def _accuracy(card: dict[str, Any]) -> str:
    counted = card["accuracy"]
    return f"{counted['value']:.3f} ({counted['correct']}/{counted['total']})"


def _print_card(card: dict[str, Any]) -> None:
    task = ", ".join(f"{key} {value}" for key, value in card["task"].items() if key not in ("name", "seed", "batch"))
    said = {
        "what": card["what"], "task": f"{card['task']['name']}: {task}", "accuracy": _accuracy(card),
        "parameters": f"{card['parameters']:,}", "origin": card["origin"], "made by": card["regenerate"],
    }  # fmt: skip
    for head, text in said.items():
        out.print(headed(head, text), highlight=False, soft_wrap=True)


@app.command()
@answered
def doctor() -> None:
    """Versions, devices and backends: what would be used here, and why.

    Examples:

      mamba-probe doctor
    """
    import platform

    import torch

    from mamba_probe.kernels.scan import choose_backend
    from mamba_probe.provenance import versions

    table = Table("what", "found")
    table.add_row("python", f"{platform.python_version()} on {platform.system()} {platform.machine()}")
    for package, found in versions().items():
        table.add_row(package, found)
    cuda = torch.cuda.is_available()
    devices = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())] if cuda else []
    table.add_row("CUDA devices", ", ".join(devices) or "none")
    table.add_row("CPU threads", str(torch.get_num_threads()))
    for device in ["cpu", *(["cuda"] if cuda else [])]:
        choice = choose_backend(device)
        table.add_row(f"scan of a model on {device}", f"{choice.name}: {choice.reason}")
    if not cuda:
        table.add_row("scan of a model on cuda", "none: torch sees no CUDA device; triton would be used there")
    table.add_row("scan on request", "--backend naive: the sequential specification, slow, never chosen by itself")
    out.print(table)


def _print(head: str, found: Any, run: Any) -> None:
    """What was found, and below it what was found in the reference."""
    out.print(headed(head, found.sentence), highlight=False, soft_wrap=True)
    if run.beside is not None:
        out.print(f"  beside it, {run.beside.trace.attrs['model']}: {found.beside}", highlight=False, soft_wrap=True)


@app.callback(invoke_without_command=True)
def version(show: Annotated[bool, typer.Option("--version", help="Show the version and exit.")] = False) -> None:
    """Look inside trained Mamba models."""
    if show:
        from mamba_probe import __version__

        out.print(f"mamba-probe {__version__}", highlight=False)
        raise typer.Exit


def main() -> None:
    """Entry point of `mamba-probe`."""
    completing.prepare()
    app()
