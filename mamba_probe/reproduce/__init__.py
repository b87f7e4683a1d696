"""The paper's claims in tables and figures, on a CPU: the claim, and apart from it what we constructed and measured.

`reproduce` writes, for each claim, NAME.csv, NAME.md, NAME.png and NAME.svg, and one index.html.
"""

from collections.abc import Callable, Mapping, Sequence
from os import PathLike
from pathlib import Path

from mamba_probe.reproduce.claim import Claim, Result, run
from mamba_probe.reproduce.haar import HAAR
from mamba_probe.reproduce.induction import INDUCTION
from mamba_probe.reproduce.keep import KEEP
from mamba_probe.reproduce.mqar import MQAR
from mamba_probe.reproduce.page import write_page
from mamba_probe.reproduce.table import FAILS, Cell, Criterion, Row, count
from mamba_probe.reproduce.trained_analyses import TRAINED_ANALYSES
from mamba_probe.reproduce.trained_keep import TRAINED_KEEP
from mamba_probe.reproduce.trained_recall import TRAINED_RECALL
from mamba_probe.reproduce.write import check_free, clear, write

__all__ = ["CLAIMS", "Cell", "Claim", "Criterion", "Result", "Row", "failures", "reproduce"]

CLAIMS: dict[str, Claim] = {
    claim.name: claim for claim in (HAAR, KEEP, MQAR, INDUCTION, TRAINED_KEEP, TRAINED_RECALL, TRAINED_ANALYSES)
}
"""Every claim by its name: of planted weights, and of the zoo's trained ones."""


def reproduce(
    names: Sequence[str],
    directory: str | PathLike[str],
    *,
    seed: int = 0,
    overwrite: bool = False,
    cells: Mapping[str, Sequence[Cell]] | None = None,
    say: Callable[[str], None] = lambda _: None,
) -> dict[str, Result]:
    """Measure the claims and write their tables, figures and one page.

    Everything is written whatever the verdicts are; `failures` counts those that are not as stated.

    Arguments:
        names: of `CLAIMS`.
        directory: made if missing.
        seed: of every draw, 0 or more.
        overwrite: replace what the directory holds of an earlier run.
        cells: measured in the place of a claim's own, by its name.
        say: told of each table as it begins.

    Raises:
        ValueError: an unknown claim, a negative seed, results that are there and not to be overwritten.
    """
    unknown = [name for name in names if name not in CLAIMS]
    if unknown or not names or seed < 0:
        came = f"names {list(names)}, seed {seed}"
        raise ValueError(f"reproduce takes names of {', '.join(CLAIMS)} and a seed of 0 or more; got {came}")
    directory = Path(directory)
    check_free(directory, list(CLAIMS), overwrite)
    directory.mkdir(parents=True, exist_ok=True)  # before minutes of measuring
    results = {}
    for name in names:
        results[name] = run(CLAIMS[name], (cells or {}).get(name), seed=seed, say=say)
    clear(directory, list(CLAIMS))
    say("drawing and writing")
    for name, result in results.items():
        write(CLAIMS[name], result, directory)
    write_page([(CLAIMS[name], result) for name, result in results.items()], directory)
    return results


def failures(results: Mapping[str, Result]) -> int:
    """Return how many measurements are not as stated."""
    return sum(count(result.rows)[FAILS] for result in results.values())
