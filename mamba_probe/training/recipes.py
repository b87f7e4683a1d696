"""What the zoo's trained checkpoints are: data, in one place. `python -m mamba_probe.training NAME` trains one."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from mamba_probe.training.config import Config
from mamba_probe.training.sweep import LEARNING_RATES

__all__ = ["RECIPES", "Recipe"]


@dataclass(frozen=True)
class Recipe:
    """A checkpoint to train.

    Arguments:
        name: of the checkpoint, `zoo:NAME` once it ships.
        what: it is, in a sentence.
        config: of its training; the learning rate is swept.
        expected: least and greatest accuracy on unseen rows that the recipe is for.
        learning_rates: to try.
        trial: steps of a trial; None is a quarter of all.
        beyond: changes of the task that the card counts too.
        beside: the closed form that a report shows beside it; None where a report does not record the task.
    """

    name: str
    what: str
    config: Config
    expected: tuple[float, float]
    learning_rates: tuple[float, ...]
    trial: int | None = None
    beyond: tuple[Mapping[str, Any], ...] = ()
    beside: str | None = None


EIGHT = tuple(round(10 ** (-3.5 + power / 4), 6) for power in range(8))
"""From 3.2e-4 to 1.8e-2: so many are tried before a model is said to fail."""
LENGTHS = (8, 12, 16, 24, 32, 48, 64, 96, 128, 192, 256, 384, 512, 768, 1024)
"""That a Mamba learns to keep a token over, from short to long; at the longest alone it does not begin to."""
MQAR = {"name": "mqar", "length": 64, "n_pairs": 8, "vocab": 256}
MANY = {"name": "mqar", "length": 128, "n_pairs": 16, "vocab": 256}
KINDS = {"mamba1": "Mamba-1", "mamba2": "Mamba-2", "s4d": "S4D"}
CLOSED = {"mamba1": "zoo:mqar-mamba1", "mamba2": "construction:mamba2", "s4d": "construction:s4d"}
SOLVES, FAILS, SOME = (0.95, 1.0), (0.0, 0.5), (0.0, 1.0)


def _recall(kind: str, sizes: Mapping[str, Any], steps: int = 4000) -> Recipe:
    config = Config(MQAR, {"kind": kind, **sizes}, layers=1, steps=steps, batch=128, every=100, stop_at=0.995)
    what = f"A 1-layer {KINDS[kind]} language model trained on multi-query associative recall: 8 pairs, 128 values."
    beyond = ({"length": 128}, {"length": 256}, {"length": 128, "n_pairs": 16})
    return Recipe(f"trained-mqar-{kind}", what, config, SOLVES, LEARNING_RATES, beyond=beyond, beside=CLOSED[kind])


def _too_small(kind: str, sizes: Mapping[str, Any]) -> Recipe:
    config = Config(MANY, {"kind": kind, **sizes}, layers=1, steps=2000, batch=128, every=100, stop_at=0.995)
    what = f"A 1-layer {KINDS[kind]} language model too small for the recall it was trained on: 16 pairs, 128 values."
    return Recipe(f"trained-mqar-{kind}-small", what, config, FAILS, EIGHT, beside=CLOSED[kind])


def _no_convolution() -> Recipe:
    """The recipe of `trained-mqar-mamba1` but for the taps."""
    mixer = {"kind": "mamba1", "d_model": 64, "d_state": 16, "d_conv": 1}
    config = Config(MQAR, mixer, layers=1, steps=4000, batch=128, every=100, stop_at=0.995)
    what = "A 1-layer Mamba-1 language model without convolution (one tap), trained on recall."
    return Recipe("trained-mqar-no-conv", what, config, (0.0, 0.2), EIGHT, beside=CLOSED["mamba1"])


def _keep(kind: str, length: int, steps: int, sizes: Mapping[str, Any]) -> Recipe:
    """S4D's kernel knows one lag, and so one length: it is trained at that alone. All train to their last step.

    A Mamba keeps the shorter lengths of its mixture first: a trial must last until it begins at the longest."""
    task = {"name": "keep_nth", "length": length, "n": 5, "n_tokens": 16}
    mixture = [{"length": each} for each in LENGTHS if each <= length] if kind != "s4d" else []
    config = Config(task, {"kind": kind, **sizes}, layers=2, steps=steps, batch=64, every=100, mixture=mixture)
    what = f"A 2-layer {KINDS[kind]} language model trained to return token 5 of {length} at the end."
    return Recipe(f"trained-keep-{kind}-{length}", what, config, SOME, LEARNING_RATES)


def _induction() -> Recipe:
    """The Mamba paper trains such a model at a constant rate; batch and steps are ours."""
    task = {"name": "induction", "length": 256, "vocab": 16}
    mixer = {"kind": "mamba1", "d_model": 64, "d_state": 16}
    config = Config(task, mixer, layers=2, steps=6000, batch=64, every=250, schedule="constant", weight_decay=0.0)
    what = "A 2-layer Mamba-1 language model trained on induction heads at 256 tokens (the task of arXiv 2312.00752)."
    beyond = tuple({"length": 2**power} for power in (6, 9, 10, 12, 14, 17, 20))
    return Recipe("trained-induction-mamba1", what, config, SOLVES, (1e-3, 2e-3, 5e-3), trial=1500, beyond=beyond)


def _all() -> Sequence[Recipe]:
    s4d = {"backend": "convolution"}
    keep = {"d_model": 32, "d_state": 16}
    return (
        _recall("mamba1", {"d_model": 64, "d_state": 16}),
        _recall("mamba2", {"d_model": 64, "d_state": 32, "n_heads": 4}),
        _recall("s4d", {"d_model": 64, "d_inner": 1536, "d_state": 2, **s4d}, steps=6000),
        _no_convolution(),
        _induction(),
        *(_keep("mamba1", *size, keep) for size in ((64, 3000), (256, 4000), (1024, 8000))),
        *(_keep("s4d", length, 3000, keep | s4d) for length in (64, 256, 1024)),
        _too_small("mamba1", {"d_model": 16, "d_state": 2}),
        _too_small("mamba2", {"d_model": 16, "d_state": 2, "n_heads": 4}),
        _too_small("s4d", {"d_model": 16, "d_state": 2, **s4d}),
    )


RECIPES: dict[str, Recipe] = {recipe.name: recipe for recipe in _all()}
"""Every recipe by its name, in the order in which they are trained."""
