"""How far every model of the zoo sees, past the length it was trained on too: a table."""

import numpy as np
import xarray as xr

import mamba_probe as mp
from mamba_probe.analyses import receptive_field

LONGER = 4
"""Times the length trained on; a closed form was trained on none, and its own task's length stands for it."""


def measured(name: str, removed: tuple[float, ...] | None = None) -> xr.Dataset:
    """Measure a model of the zoo; `removed`: shares of the context to take away (default: those of `remembrance`)."""
    task, length = given_of(name)
    asking = task.role == "query"
    at = np.array([part.stop - 1 - asking.sum(0)[part][::-1].argmax() for part in parts(LONGER * length)])
    rows = np.argsort(~asking[:, at[-1]], kind="stable")[:4]
    with mp.attach(mp.load(f"zoo:{name}")) as probe:
        trace = probe.record(task, variables=("delta", "A", "B", "C", "u", "out"))
        signs = np.random.default_rng(0).choice([-1.0, 1.0], (4, trace.sizes["model"]))
        given = {"query_tokens": at[-1:], "read_out": signs}
        jacobian = [probe.jacobian(task.input_ids[rows], layer=layer, **given) for layer in probe.layers]
        asked = [np.flatnonzero(row)[-1] for row in asking]
        starts = None if removed is None else [0, 1, *(int(min(asked) * share) for share in removed)]
        remembrance = probe.remembrance(task, queries=asked, starts=starts)
    return receptive_field.measure(
        trace, train_length=length, jacobian=jacobian, remembrance=remembrance, query_tokens=at
    )


def given_of(name: str, rows: int = 8) -> tuple[mp.tasks.Task, int]:
    """The task of a model on longer rows than it was trained on, and the length trained on."""
    card = mp.zoo.card(name)["task"]
    length, options = card["length"], {k: v for k, v in card.items() if k not in ("name", "batch", "length", "seed")}
    rows = rows if length < 1024 else 2
    return getattr(mp.tasks, card["name"])(batch=rows, length=LONGER * length, seed=1, **options), length


def paced(name: str) -> xr.Dataset:
    """The collapse ratio on rows enough that some are asked near every length."""
    task, length = given_of(name, rows=64 if "mqar" in name else 8)
    with mp.attach(mp.load(f"zoo:{name}")) as probe:
        trace = probe.record(task, variables=("delta", "A", "B", "C"))
    return receptive_field.measure(trace, train_length=length, query_tokens=[LONGER * length - 1])


def parts(length: int) -> list[slice]:
    """Eight equal parts of a row; one query of each is looked at."""
    return [slice(length * i // 8, length * (i + 1) // 8) for i in range(8)]


def table() -> None:
    names = ("collapse_ratio", "null_lti_collapse_ratio", "global_share", "mixer_spread", "block_spread", "mixer_slope")
    names = (*names, "block_slope", "token_distance_u", "token_distance_out")
    print("| model | layer |", " | ".join(names), "| removed: 1, an eighth, a half |")
    for model in mp.zoo.names():
        result = measured(model, (1 / 8, 1 / 2))
        ratio = paced(model)
        print(model, ratio.attrs["prefixes"], ratio["prefix_length"].values.round().tolist(), sep="; ")
        result = result.assign({key: ratio[key] for key in map("layer_{}".format, names[:2])})
        for layer in result["layer"].values:
            one = result.sel(layer=layer)
            values = [one[f"layer_{name}"] for name in names]
            values = [value.sel(fraction=LONGER).item() if value.ndim else value.item() for value in values]
            print(
                "|",
                model,
                "|",
                layer,
                "|",
                " | ".join(f"{value:.3g}" for value in [*values, *result["remembrance"].values[1:]]),
                "|",
                flush=True,
            )


table()
