"""Train recipes into a directory, as far as a budget of seconds goes, and go on from there the next time."""

import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from os import PathLike
from pathlib import Path

from mamba_probe import zoo
from mamba_probe.formats.files import read_json
from mamba_probe.trace.contract import unknown_name
from mamba_probe.training.card import describe
from mamba_probe.training.progress import progress
from mamba_probe.training.recipes import RECIPES, Recipe
from mamba_probe.training.sweep import sweep
from mamba_probe.training.trainer import Say

__all__ = ["Outcome", "run", "run_all"]


@dataclass(frozen=True)
class Outcome:
    """Where a recipe stands, its accuracy on unseen rows, and whether that is as expected.

    `state` is "trained", "to be resumed", "diverged" at every rate tried, or "refused: " and why.
    """

    name: str
    state: str
    accuracy: float | None = None
    low: float | None = None
    high: float | None = None
    as_expected: bool | None = None
    seconds: float = 0.0


def run(
    recipe: Recipe, out: str | PathLike[str], *, seconds: float | None = None, device: str = "cpu",
    commit: str | None = None, say: Say = lambda config, point: None,
) -> Outcome:  # fmt: skip
    """Train one recipe: OUT/runs/NAME holds its trainings, OUT/zoo/NAME the checkpoint with its card once finished.

    Arguments:
        recipe: one of `RECIPES`, or of the caller's.
        out: directory; what it holds is resumed.
        seconds: stop, to be resumed, after so long; the card is counted on top.
        device: "cpu" or "cuda".
        commit: for the card, where the source has no history beside it.
        say: told of each evaluation.
    """
    started, target = time.perf_counter(), Path(out) / "zoo" / recipe.name
    if not (target / "card.json").is_file():
        config = replace(recipe.config, device=device)
        place = Path(out) / "runs" / recipe.name
        swept = sweep(config, place, learning_rates=recipe.learning_rates, trial=recipe.trial, seconds=seconds, say=say)
        if swept.result is None or not swept.finished:
            return Outcome(recipe.name, "to be resumed", seconds=time.perf_counter() - started)
        if swept.result.ended == "diverged":
            return Outcome(recipe.name, "diverged", seconds=time.perf_counter() - started)
        command = f"python -m mamba_probe.training {recipe.name} --device {device} --out DIR"
        card = describe(
            swept.result, recipe.name, recipe.what, regenerate=command, beyond=recipe.beyond, trials=swept.trials,
            commit=commit, beside=recipe.beside,
        )  # fmt: skip
        zoo.save(swept.result.model, card, target, overwrite=True)
    counted = read_json(target / "card.json")["accuracy"]
    least, most = recipe.expected
    met = least <= counted["value"] <= most
    took = time.perf_counter() - started
    return Outcome(recipe.name, "trained", counted["value"], counted["low"], counted["high"], met, took)


def run_all(
    names: Sequence[str], out: str | PathLike[str], *, seconds: float | None = None, device: str = "cpu",
    commit: str | None = None, shown: Callable[[str], AbstractContextManager[Say]] = progress,
) -> list[Outcome]:  # fmt: skip
    """Train recipes in turn; each may take an equal share of what is left, and leaves what it does not need.

    One that is refused, such as by a checkpoint of another training, says so in its outcome and stops no other.

    Arguments:
        names: of `RECIPES`, or "all".
        out, seconds, device, commit: as `run`'s, seconds of them all.
        shown: makes of a name the context in which its progress is told.

    Raises:
        ValueError: an unknown name, or none.
    """
    names = list(RECIPES) if "all" in names else list(dict.fromkeys(names))
    for name in names:
        if name not in RECIPES:
            raise unknown_name("recipe", name, (*RECIPES, "all"))
    if not names:
        raise ValueError(f"name recipes, or all: {', '.join(RECIPES)}")
    started, outcomes = time.perf_counter(), []
    for index, name in enumerate(names):
        left = None if seconds is None else max(0.0, seconds - (time.perf_counter() - started))
        share = None if left is None else left / (len(names) - index)
        with shown(name) as say:
            try:
                outcome = run(RECIPES[name], out, seconds=share, device=device, commit=commit, say=say)
            except ValueError as error:
                outcome = Outcome(name, f"refused: {error}")
        outcomes.append(outcome)
    return outcomes
