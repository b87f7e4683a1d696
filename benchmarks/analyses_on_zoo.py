"""Every analysis on every model of the zoo and every construction: what each finds, in its own sentence.

    python benchmarks/analyses_on_zoo.py -o OUT [--names sinks,ablation] [--models trained-mqar-mamba1]

A model of the zoo runs on fresh rows of its own task; a construction on rows of the task that it solves. What a run
lacks for an analysis is said in place of a finding. OUT/analyses-on-zoo.md is the page in benchmarks/results, OUT/NAME
has the stored results and pictures.
"""

import argparse
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch

import mamba_probe as mp
from mamba_probe import provenance, zoo
from mamba_probe.analyses.common.analysis import analyses
from mamba_probe.constructions import Construction
from mamba_probe.probe import attach
from mamba_probe.report import analyse, draw, finding, measurable
from mamba_probe.reproduce.trained import checkpoints, fresh_task
from mamba_probe.run import Run, record_given
from mamba_probe.trace.schema import DEFAULT_VARIABLES

TOKENS, MOST, LEAST = 2**12, 16, 4
"""Tokens of a run, and rows of it."""


def rows_of(length: int) -> int:
    """As many rows as TOKENS allows, within bounds."""
    return max(LEAST, min(MOST, TOKENS // length))


def trained(name: str) -> Run:
    """A trained checkpoint of the zoo on rows that it has not seen."""
    (found,) = [each for each in checkpoints() if each.name == name]
    length = found.config.draw(1, 0).input_ids.shape[1]
    return record_given(mp.load(f"zoo:{name}"), fresh_task(found, rows_of(length), 0))


def closed(built: Construction, task: mp.tasks.Task) -> Run:
    """A construction: a language model on the task itself, a bare mixer on what it makes of the ids."""
    if built.answer is None and built.expected is None:
        return record_given(built.model, task)
    return bare(built, task.input_ids)


def bare(built: Construction, given: Any) -> Run:
    """A mixer that takes hidden states: its trace and weights."""
    with attach(built.model) as probe:
        inputs = built.inputs(given)
        trace = probe.record(inputs, variables=(*DEFAULT_VARIABLES, "x", "z", "y", "u", "out"))
        return Run(trace, probe.weights(), probe.parity(inputs[:1]))


def subjects() -> Iterator[tuple[str, Callable[[], Run]]]:
    """Names, and how to record each."""
    recall = mp.tasks.mqar(batch=16, length=64, n_pairs=8, vocab=64, seed=0)
    for name in zoo.names():
        if "config" in zoo.card(name):
            yield f"zoo:{name}", lambda name=name: trained(name)
        else:
            task = mp.tasks.mqar(batch=16, length=64, n_pairs=8, vocab=256, seed=0)
            yield f"zoo:{name}", lambda name=name, task=task: record_given(mp.load(f"zoo:{name}"), task)
    for mixer in ("mamba1", "mamba2", "s4d"):
        yield f"mqar({mixer})", lambda mixer=mixer: closed(mp.constructions.mqar(mixer, 32, 32), recall)
    repeated = mp.tasks.induction(batch=16, length=64, vocab=16, seed=0)
    for mixer in ("mamba1", "mamba2", "s4d"):
        yield (
            f"induction({mixer})",
            lambda mixer=mixer: closed(mp.constructions.induction(mixer=mixer, n_tokens=16, kind="special"), repeated),
        )
    kept = mp.tasks.keep_nth(batch=16, length=64, n=5, n_tokens=16, seed=0)
    for mixer in ("mamba1", "mamba2"):
        yield f"keep_nth({mixer})", lambda mixer=mixer: closed(mp.constructions.keep_nth(16, 64, 5, mixer=mixer), kept)
    signal = np.random.default_rng(0).standard_normal((8, 64))
    yield "haar", lambda: bare(mp.constructions.haar(64), signal)


def cell(text: str) -> str:
    """A text that fits into a table of Markdown."""
    return text.replace("|", "\\|").replace("\n", " ")


def main() -> None:
    """Measure and write the page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-o", "--out", type=Path, required=True)
    parser.add_argument("--names", default="all", help="analyses, with commas between")
    parser.add_argument("--models", help="only those whose name has one of these in it, with commas between")
    asked = parser.parse_args()
    names = tuple(asked.names.split(","))
    said: dict[str, list[tuple[str, str]]] = {name: [] for name in (analyses() if names == ("all",) else names)}
    torch.set_num_threads(1)
    for name, record in subjects():
        if asked.models and not any(part in name for part in asked.models.split(",")):
            continue
        print(name, flush=True)
        run, lines = record(), []
        folder = asked.out / name.replace(":", "-").replace("(", "-").rstrip(")")
        wanted = {each for each in said if not analyses()[each].lacks(run)}
        for each in sorted(wanted):
            try:
                result = analyse(run, folder, names=(each,), say=lines.append, overwrite=True)[each]
                draw(each, result, folder)
                said[each].append((name, finding(each, result).sentence))
            except ValueError as error:
                said[each].append((name, f"refused: {error}"))
        for each, lack in measurable(run)[1].items():
            if each in said:
                said[each].append((name, f"left out: it needs {lack}"))
    versions = ", ".join(f"{name} {found}" for name, found in provenance.versions().items())
    page = ["# Every analysis on every model of the zoo and every construction", "", (__doc__ or "").split("\n")[0], ""]
    page += [f"Script: benchmarks/analyses_on_zoo.py; {versions}; CPU, float32 but where a model is float64.", ""]
    for each, rows in said.items():
        page += [f"## {analyses()[each].title} (`{each}`)", "", "| model | finding |", "|---|---|"]
        page += [f"| {cell(name)} | {cell(text)} |" for name, text in rows] + [""]
    (asked.out / "analyses-on-zoo.md").write_text("\n".join(page))


if __name__ == "__main__":
    main()
