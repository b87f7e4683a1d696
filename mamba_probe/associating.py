"""Where the link between a key and its value is held: the key is corrupted, and what it was is put back place by place.

The asked pair's key is replaced wherever it was written, but not at the query, so that the model no longer finds the
pair; then what stood at one site of one layer, at one token of one row, is put back from the clean run. What brings the
answer back held the pair. Source: the corruption and the restoring of a mixer's input or output at key, value and query
are those of Arora et al., "Mechanistic evaluation of Transformers and state space models", arXiv 2505.15105; what the
scan receives, and the nulls: ours.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import xarray as xr
from jaxtyping import Bool, Float, Int
from torch import Tensor

from mamba_probe import provenance
from mamba_probe.arguments import texts, whole, wholes
from mamba_probe.hooks import HookPoint
from mamba_probe.inputs import checked_input
from mamba_probe.tasks import Task
from mamba_probe.trace.contract import unknown_name

__all__ = ["ROLES", "SITES", "associating"]

_SCAN = ("mixer.hook_delta", "mixer.hook_B", "mixer.hook_C", "mixer.hook_ssm_input")
SITES = {
    "mixer_in": ("hook_mixer_in",), "scan": _SCAN, "x": _SCAN[3:], "B": _SCAN[1:2], "delta": _SCAN[:1],
    "mixer_out": ("hook_mixer_out",),
}  # fmt: skip
"""What is put back, and its hook points. mixer_in: before the convolution; scan: after it, all that the scan receives
at that token (delta, B, C and x, as many as the layer selects); mixer_out: what the layer adds to the residual."""
ROLES = ("key", "value", "value+1", "value+2", "query", "other")
"""Tokens at which it is put back. value+1 and value+2: the next ones, where they come before the query (a convolution
of four taps reaches so far from the key); other: another pair's value before the query, out of that reach."""

Values = dict[str, Tensor]
"""Of the clean run at every role (batch, role, ...), by hook point."""
Points = Mapping[tuple[str, int], tuple[str, ...]]
"""Hook points by site and layer."""
PLACE = ("site", "layer", "role", "batch")


def associating(
    probe: Any, task: Task, *, sites: Sequence[str] | None = None, layers: Sequence[int] | None = None,
    batch_size: int = 64, seed: int = 0, twin_seed: int | None = None,
) -> xr.Dataset:  # fmt: skip
    r"""Corrupt the key of one asked pair a row, and restore the clean run at each site, layer and role.

    $$m = \mathrm{logit}[\text{answer}] - \frac{1}{|R|} \sum_{v \in R} \mathrm{logit}[v], \qquad
    \mathrm{recovered} = \frac{m_{\text{patched}} - m_{\text{corrupt}}}{m_{\text{clean}} - m_{\text{corrupt}}},$$

    at the query, R the other values that the row wrote before it. A row counts where the clean run answers right and
    the corrupt one does not. One query a row is asked, drawn at random; the key is replaced by another of the task's
    keys that the row does not hold. One forward an entry, exact: what follows runs on from what was put back.

    Args:
        probe: an attached probe, of a model that gives logits.
        task: with keys and values before its queries (`mp.tasks.mqar(...)`), two rows at least for the row null.
        sites: of `SITES`; None is those that every layer has.
        layers: the model's own layer numbers; None is all.
        batch_size: rows of a forward.
        seed: of the queries asked, the keys put in, the other pair, and the rows of the null.
        twin_seed: of a randomised twin, the same architecture untrained, measured alike; None: without.

    Returns:
        patched, right and recovered (site, layer, role, batch): m, whether the most likely token is the answer, and the
        above (NaN at rows that do not count); null_patched and null_right: with what stood at that role in another row
        of another key and value; clean, corrupt, clean_right, corrupt_right, counts (batch); twin_patched
        (site, layer, role, batch), twin_clean, twin_corrupt (batch). NaN (right: False) where the row has no such role.
        Coordinates: at and valid (role, batch), the token of each role, -1 for none; target, key_id, corrupt_id.

    Raises:
        ValueError: no task of pairs, a row that cannot be asked or corrupted, an unknown site or layer, a site that
            a layer has not, a model without logits or that scans in both directions; edits or a recording active.

    >>> import mamba_probe as mp
    >>> built = mp.constructions.mqar(n_keys=16, n_values=16)
    >>> task = mp.tasks.mqar(batch=4, length=16, n_pairs=3, vocab=32)
    >>> with mp.attach(built.model) as probe:
    ...     found = associating(probe, task, sites=["mixer_in", "B"])
    >>> found["recovered"].sel(site="B", layer=0).mean("batch").sel(role=["key", "value"]).values.round(2).tolist()
    [0.0, 1.0]
    """
    probe._check_unedited("associating")
    if any(tap.listener is not None for tap in probe._taps.values()):
        raise ValueError("associating runs the model, and a recording is open on this probe: leave it first")
    batch_size, seed = whole("batch_size", batch_size, 1), whole("seed", seed)
    twin_seed = None if twin_seed is None else whole("twin_seed", twin_seed)
    if any(adapter.sizes.directions for adapter in probe._adapters):
        raise ValueError("associating reads what comes after a key: a model that scans in both directions has no after")
    case = _corrupted(task, seed)
    points = _points(probe, sites, layers)
    donors = np.stack([np.arange(len(case.target)), _donors(case, seed)])
    found = _measured(probe, case, points, donors, batch_size)
    if twin_seed is not None:
        found |= _of_twin(probe, case, points, donors, batch_size, twin_seed)
    attrs = {"seed": seed, "twin_seed": -1 if twin_seed is None else twin_seed, "task": task.name}
    return _dataset(probe, case, points, found, attrs)


# -- the rows -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Case:
    """One question a row, as it was asked and with its key corrupted."""

    clean: Int[np.ndarray, "batch token"]
    corrupt: Int[np.ndarray, "batch token"]
    at: Int[np.ndarray, "role batch"]
    target: Int[np.ndarray, " batch"]
    rivals: Bool[np.ndarray, "batch vocab"]
    key_id: Int[np.ndarray, " batch"]
    corrupt_id: Int[np.ndarray, " batch"]

    @property
    def query(self) -> Int[np.ndarray, " batch"]:
        """The token asked at."""
        return self.at[ROLES.index("query")]


def _corrupted(task: Task, seed: int) -> Case:
    if not isinstance(task, Task):
        raise ValueError(f"associating takes a Task with pairs (mp.tasks.mqar(...)); got {type(task).__name__}")
    if not {"key", "value", "query"} <= set(np.unique(task.role)):
        had = ", ".join(map(str, np.unique(task.role)))
        raise ValueError(f"associating needs a task of keys, values and queries (mp.tasks.mqar); {task.name} has {had}")
    keys, rng = np.unique(task.input_ids[task.role == "key"]), np.random.default_rng(seed)
    corrupt, rivals = task.input_ids.copy(), np.zeros((len(task.input_ids), task.vocab), bool)
    at, put = [], []
    for row in range(len(corrupt)):
        places, others, written = _asked(task, row, rng)
        absent = np.setdiff1d(keys, task.input_ids[row])
        if not len(absent):
            raise ValueError(f"row {row} holds every key that the task writes: none is left to put in; draw more rows")
        corrupt[row, written] = rng.choice(absent)
        rivals[row, others] = True
        at.append(places)
        put.append(corrupt[row, written[0]])
    places, every = np.array(at).T, np.arange(len(corrupt))
    query = places[ROLES.index("query")]
    ids = task.input_ids
    return Case(ids, corrupt, places, task.target[every, query], rivals, ids[every, query], np.array(put))


def _asked(task: Task, row: int, rng: np.random.Generator) -> tuple[list[int], np.ndarray, np.ndarray]:
    """Token of each role, ids of the other values, and the tokens where the key was written, of a query at random."""
    ids, role, source = task.input_ids[row], task.role[row], task.source_token[row]
    queries = np.flatnonzero((role == "query") & (source >= 0)).tolist()
    asked = [query for query in queries if len(_written(ids, role, query, source[query]))]
    if not asked:
        raise ValueError(f"row {row} of {task.name} has no query whose key was written before its value")
    query = int(rng.choice(asked))
    value, written = int(source[query]), np.flatnonzero((role == "key") & (ids == ids[query]))
    key = int(_written(ids, role, query, value)[-1])
    other = np.flatnonzero((role == "value") & (ids != ids[value]))
    other = other[other < query]
    far = other[(other < key) | (other > value + 2)]
    if not len(other):
        raise ValueError(f"row {row} of {task.name} has one value alone before its query: an answer needs two pairs")
    after = [value + step if value + step < query else -1 for step in (1, 2)]
    places = [key, value, *after, query, int(rng.choice(far)) if len(far) else -1]
    return places, np.unique(ids[other]), written


def _written(ids: np.ndarray, role: np.ndarray, query: int, value: int) -> np.ndarray:
    """Where the query's key stood before its value."""
    return np.flatnonzero((role[:value] == "key") & (ids[:value] == ids[query]))


def _donors(case: Case, seed: int) -> Int[np.ndarray, " batch"]:
    """For each row another one of another key and value, -1 where there is none."""
    rng = np.random.default_rng((seed, 1))
    unlike = (case.key_id[:, None] != case.key_id) & (case.target[:, None] != case.target)
    return np.array([rng.choice(np.flatnonzero(row)) if row.any() else -1 for row in unlike])


# -- the places -----------------------------------------------------------------------------------------------------


def _points(probe: Any, sites: Sequence[str] | None, layers: Sequence[int] | None) -> Points:
    chosen = tuple(probe.layers if layers is None else wholes("layers", layers))
    sites = None if sites is None else texts("sites", sites)
    for layer in chosen:
        if layer not in probe.layers:
            raise unknown_name("layer", layer, [str(known) for known in probe.layers])
    for site in sites or ():
        if site not in SITES:
            raise unknown_name("site", site, list(SITES))
    if not chosen:
        raise ValueError(f"associating needs one layer at least; got layers={layers!r}")
    known = set(probe.hook_names())
    here = {
        (site, layer): tuple(name for hook in hooks if (name := f"blocks.{layer}.{hook}") in known)
        for site, hooks in SITES.items()
        for layer in chosen
    }
    everywhere = [site for site in SITES if all(here[site, layer] for layer in chosen)]
    for site in sites or ():
        if site not in everywhere:
            raise ValueError(f"not every layer has {site} to be put back; all have {', '.join(everywhere) or 'none'}")
    return {(site, layer): here[site, layer] for site in (sites or everywhere) for layer in chosen}


def _axes(points: Points) -> tuple[list[str], list[int]]:
    """Sites and layers."""
    return list(dict.fromkeys(site for site, _ in points)), list(dict.fromkeys(layer for _, layer in points))


# -- the runs -------------------------------------------------------------------------------------------------------


def _of_twin(
    probe: Any, case: Case, points: Points, donors: np.ndarray, batch_size: int,
    seed: int,
) -> dict[str, np.ndarray]:  # fmt: skip
    """The same of the model's randomised twin, without its row null."""
    from mamba_probe.probe import attach
    from mamba_probe.run import randomised_twin

    with attach(randomised_twin(probe.model, seed), backend=probe.backend) as twin:
        found = _measured(twin, case, points, donors[:1], batch_size)
    return {f"twin_{name}": found[name] for name in ("patched", "clean", "corrupt")}


def _measured(probe: Any, case: Case, points: Points, donors: np.ndarray, batch_size: int) -> dict[str, np.ndarray]:
    """m and right of the clean and the corrupt run, and of the corrupt one with each entry put back.

    `donors` (kind, batch) are rows that values are taken from: first each row itself, then the null's.
    """
    names = list(dict.fromkeys(name for group in points.values() for name in group))
    held, *clean = _kept(probe, case, case.clean, names, batch_size)
    other, *corrupt = _kept(probe, case, case.corrupt, names, batch_size)
    sites, layers = _axes(points)
    patched = np.full((2, len(donors), len(sites), len(layers), *case.at.shape), np.nan)
    for (site, layer), group in points.items():
        differs = sum((held[name] != other[name]).flatten(2).any(2).cpu().numpy().T for name in group) > 0
        there = _there(case, donors) & differs
        found = patched[:, :, sites.index(site), layers.index(layer)]
        found[:, 0] = np.where(case.at >= 0, np.array(corrupt)[:, None], np.nan)
        _put_back(probe, case, {name: held[name] for name in group}, donors, there, found, batch_size)
    found = {"clean": clean[0], "clean_right": clean[1], "corrupt": corrupt[0], "corrupt_right": corrupt[1]}
    for kind, prefix in enumerate(("", "null_")[: len(donors)]):
        found |= {f"{prefix}patched": patched[0, kind], f"{prefix}right": patched[1, kind] == 1}
    return found


def _kept(
    probe: Any, case: Case, ids: Int[np.ndarray, "batch token"], names: list[str], batch_size: int
) -> tuple[Values, np.ndarray, np.ndarray]:
    """What stands at the hook points at each role in the run of `ids`, and its answers."""
    values: dict[str, list[Tensor]] = {name: [] for name in names}
    answers = []
    for rows in _split(np.arange(len(ids)), batch_size):
        at = torch.from_numpy(case.at.T[rows].clip(min=0))

        def keep(tensor: Tensor, hook: HookPoint, at: Tensor = at) -> None:
            row = torch.arange(len(at), device=tensor.device)[:, None]
            values[hook.name].append(tensor.detach()[row, at.to(tensor.device)].clone())

        with probe.hooks([(names, keep)]):
            answers.append(_answers(probe, case, ids, rows))
    margins, right = zip(*answers, strict=True)
    return {name: torch.cat(pieces) for name, pieces in values.items()}, np.concatenate(margins), np.concatenate(right)


def _there(case: Case, donors: Int[np.ndarray, "kind batch"]) -> Bool[np.ndarray, "kind role batch"]:
    """Where there is such a token, in the row and in that which values are taken from."""
    given = np.take_along_axis(case.at[None], donors[:, None].clip(min=0), axis=2) >= 0
    return (case.at >= 0)[None] & (donors >= 0)[:, None] & given


def _put_back(
    probe: Any, case: Case, held: Values, donors: np.ndarray, there: np.ndarray,
    found: Float[np.ndarray, "answer=2 kind role batch"], batch_size: int,
) -> None:  # fmt: skip
    """Write m and right with `held` put back, at each role and from each kind of donor, to `found`.

    The rows that are asked early share a forward, which ends at its last query: what follows is not read.
    """
    entries = np.argwhere(there)
    entries = entries[np.argsort(case.query[entries[:, 2]], kind="stable")]
    for kind, role, row in (some.T for some in _split(entries, batch_size)):
        put = _put(held, case.at[role, row], donors[kind, row], role)
        with probe.hooks([(list(held), put)]):
            found[:, kind, role, row] = _answers(probe, case, case.corrupt, row)


def _put(held: Values, token: np.ndarray, donor: np.ndarray, role: np.ndarray) -> Callable[[Tensor, HookPoint], Tensor]:
    """What puts the clean run's value, of row donor[i] at role[i], at token[i] of row i of a forward."""

    def put(tensor: Tensor, hook: HookPoint) -> Tensor:
        at, rows, roles = (torch.from_numpy(index).to(tensor.device) for index in (token, donor, role))
        value = held[hook.name][rows, roles].to(tensor.dtype)
        return tensor.index_put((torch.arange(len(at), device=tensor.device), at), value)

    return put


def _answers(
    probe: Any, case: Case, ids: Int[np.ndarray, "batch token"], rows: Int[np.ndarray, " row"]
) -> tuple[Float[np.ndarray, " row"], Bool[np.ndarray, " row"]]:
    """m at the query, and whether the most likely token is the answer."""
    width, asked = probe._adapters[0].sizes.width, ids[rows, : case.query[rows].max() + 1]
    (keywords,) = checked_input(probe.model, width, asked, None, None, None).pieces(None)
    with torch.no_grad():
        logits = getattr(probe.model(**keywords), "logits", None)
    if not isinstance(logits, Tensor) or logits.ndim != 3:
        raise ValueError(f"associating needs a language model; {type(probe.model).__name__} gives no logits")
    at = torch.from_numpy(case.query[rows]).to(logits.device)
    said = logits[torch.arange(len(rows), device=logits.device), at].double().cpu().numpy()
    target, rivals = case.target[rows], case.rivals[rows]
    others = np.where(rivals, said[:, : rivals.shape[1]], 0).sum(1) / rivals.sum(1)
    return said[np.arange(len(rows)), target] - others, said.argmax(1) == target


def _split(entries: np.ndarray, size: int) -> list[np.ndarray]:
    return [entries[start : start + size] for start in range(0, len(entries), size)]


# -- the result -----------------------------------------------------------------------------------------------------

_TEXT = {
    "clean": "the answer's logit less the mean of the row's other values, key as written",
    "corrupt": "the same, key corrupted",
    "patched": "the same, key corrupted and the entry put back",
    "right": "whether the most likely token is the answer",
    "counts": "whether the row counts: answered right, and wrong once the key is corrupted",
    "recovered": "(patched - corrupt) / (clean - corrupt)",
}


def _text(name: str) -> tuple[str, str]:
    """Long name and units."""
    prefix = {"twin": ", randomised twin", "null": ", put back from another row"}.get(name.split("_")[0], "")
    bare = name.removeprefix("twin_").removeprefix("null_")
    said = _TEXT[bare.removeprefix("clean_").removeprefix("corrupt_")]
    run = {"clean_right": ", key as written", "corrupt_right": ", key corrupted"}.get(bare, "")
    return f"{said}{run}{prefix}", "logit" if bare in ("clean", "corrupt", "patched") else "1"


def _dataset(
    probe: Any, case: Case, points: Points, found: dict[str, np.ndarray],
    attrs: Mapping[str, Any],
) -> xr.Dataset:  # fmt: skip
    counts = found["clean_right"] & ~found["corrupt_right"]
    span = np.where(counts & (found["clean"] != found["corrupt"]), found["clean"] - found["corrupt"], np.nan)
    found |= {"counts": counts, "recovered": (found["patched"] - found["corrupt"]) / span}
    variables = {}
    for name, values in found.items():
        text, units = _text(name)
        variables[name] = (PLACE[4 - values.ndim :], values, {"long_name": text, "units": units})
    sites, layers = _axes(points)
    coords = {
        "site": np.array(sites, dtype=object), "layer": layers, "role": np.array(ROLES, dtype=object),
        "batch": np.arange(len(case.target)), "at": (("role", "batch"), case.at),
        "valid": (("role", "batch"), case.at >= 0), "target": ("batch", case.target),
        "key_id": ("batch", case.key_id), "corrupt_id": ("batch", case.corrupt_id),
    }  # fmt: skip
    said = provenance.of_model(probe.model, "associating") | {
        "backend": probe.backend,
        "corruption": "the asked pair's key replaced, wherever it was written and not at the query, by another of the"
        " task's keys that the row does not hold; one query a row",
        "estimator": "one forward of the corrupt row for each (site, layer, role), with that entry of the clean run",
        "source": "Arora et al., arXiv 2505.15105; what the scan receives, and nulls: ours",
    }
    return xr.Dataset(variables, coords, said | dict(attrs))
