"""`python -m mamba_probe.training RECIPE --out DIR --budget SECONDS`: train checkpoints of the zoo, resumably."""

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Column, Table

from mamba_probe.training.recipes import RECIPES
from mamba_probe.training.run import Outcome, run_all

__all__ = ["main"]


def main(
    recipes: Annotated[list[str] | None, typer.Argument(help="Names of recipes, or all; none lists them.")] = None,
    out: Annotated[Path, typer.Option(help="Directory; what it holds is resumed.")] = Path("trained"),
    budget: Annotated[float | None, typer.Option(min=0, help="Seconds of training for all of them; unlimited.")] = None,
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cpu",
    commit: Annotated[str | None, typer.Option(help="For the cards, where the source has no git history.")] = None,
) -> None:
    """Train recipes of the zoo in turn: each rate tried, the best trained on; DIR/zoo/NAME holds what is finished."""
    if not recipes:
        for recipe in RECIPES.values():
            typer.echo(f"{recipe.name}: {recipe.what}")
        return
    try:
        outcomes = run_all(recipes, out, seconds=budget, device=device, commit=commit)
    except (ValueError, OSError) as error:
        typer.echo(f"error: {error}", err=True)
        raise typer.Exit(2) from None
    Console().print(_table(outcomes))
    if any(outcome.state != "trained" for outcome in outcomes):
        raise typer.Exit(3)


def _table(outcomes: list[Outcome]) -> Table:
    table = Table(Column("recipe", no_wrap=True), "state", "accuracy on unseen rows", "as expected", "seconds")
    for one in outcomes:
        shown = "" if one.accuracy is None else f"{one.accuracy:.3f} [{one.low:.3f}, {one.high:.3f}]"
        said = "" if one.as_expected is None else ("yes" if one.as_expected else "NO")
        table.add_row(one.name, one.state, shown, said, f"{one.seconds:.0f}")
    return table


if __name__ == "__main__":
    typer.run(main)
