"""Which tokens a logit is made of: gradient x input, plain or by the rules of MambaLRP, of whole models."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
import xarray as xr

from mamba_probe import provenance
from mamba_probe.inputs import ModelInput, checked_input
from mamba_probe.relevance.asked import Asked, asked_of
from mamba_probe.relevance.conserving import asserted, errors
from mamba_probe.relevance.passes import BATCH_AXIS, POINTS, passed
from mamba_probe.trace.contract import unknown_name

__all__ = ["RULES", "SUPPORTED", "checked_model", "relevance"]

RULES = ("mambalrp", "gradient")
SUPPORTED = (
    ("transformers.models.mamba.modeling_mamba", "MambaForCausalLM"),
    ("transformers.models.mamba2.modeling_mamba2", "Mamba2ForCausalLM"),
    ("transformers.models.falcon_mamba.modeling_falcon_mamba", "FalconMambaForCausalLM"),
    ("mamba_probe.blocks", "LanguageModel"),
)
"""Models of nothing but embedding, blocks of norm and mixer, a norm and a head: each part has a rule."""
DIMS: dict[str, tuple[str, ...]] = dict.fromkeys(("logit", "conservation_error"), ("batch", "query"))
DIMS |= dict.fromkeys(("residual_error", "mixer_error"), ("layer", "batch", "query"))
DIMS |= dict.fromkeys(POINTS, ("layer", "batch", "query", "token"))
DIMS |= {"relevance": ("batch", "query", "token"), "bias": ("site", "batch", "query")}
TEXT = {
    "relevance": "relevance of the token's embedding",
    "residual": "relevance of the residual stream before the block",
    "mixer_in": "relevance of the mixer's input, after the norm",
    "mixer_out": "relevance of the mixer's output",
    "bias": "relevance of a bias, of all tokens together",
    "logit": "the logit that is explained",
    "conservation_error": "|inputs and biases - logit| over the sum of |terms|",
    "residual_error": "|residual stream and biases from here on - logit| over the sum of |terms|",
    "mixer_error": "|mixer's input and biases in it - mixer's output| over the sum of |terms|",
}
ESTIMATOR = {
    "mambalrp": "embedding x gradient, summed over features, with the selection of the scan and the norms' scales held,"
    " SiLU as a line through 0 and gates shared half and half (MambaLRP, arXiv 2406.07592)",
    "gradient": "embedding x gradient of the model, summed over features",
}


def relevance(
    probe: Any, inputs: Any, attention_mask: Any = None, *, target: Any = None, tokens: Any = None,
    rules: str = "mambalrp", batch_size: int | None = None,
) -> xr.Dataset:  # fmt: skip
    r"""Find which tokens a logit is made of.

    $R_s = \sum_i e_{s,i}\, \partial\,\mathrm{logit} / \partial e_{s,i}$, embedding times gradient, summed over
    features; alike of the residual stream before each block, of each mixer's input and of its output. With
    rules="gradient" the gradient is the model's own. With "mambalrp" parts of the model are held
    (`mamba_probe.relevance.rules`), and relevance is conserved: $\sum_s R_s + \sum_b R_b = \mathrm{logit}$ over tokens
    and biases (of convolutions, in_proj, out_proj and head; those of delta are held), and the same at every cut. This
    is asserted. Source: MambaLRP, Jafari et al. 2024, arXiv 2406.07592; biases, cuts and the assertion: ours.

    Args:
        probe: attached to a language model of Mamba, Mamba-2, FalconMamba, or of our blocks (S4D among them), in
            float32 or float64.
        inputs, attention_mask: ids, a dict or a `Task`, as in `Probe.record`.
        target: which logit: an id, one a row (batch,), or (batch, query); "answer": the task's, the default for a
            `Task`; "top": the model's largest, the default elsewhere.
        tokens: where: positions among a row's valid tokens, a list for every row or (batch, query); "last_query" or
            "queries", every one, of a `Task`. Default: a Task's last query, else the last valid token.
        rules: "mambalrp" or "gradient".
        batch_size: rows a forward call; None is all at once. A backward pass each query.

    Returns:
        relevance (batch, query, token), residual, mixer_in and mixer_out (layer, batch, query, token): NaN at padding
        and where a row has no such query; logit (batch, query), conservation_error; with "mambalrp" also bias (site,
        batch, query), residual_error and mixer_error (layer, batch, query). Coordinates query_token (the token's
        index, -1 for none), target_id, top_id (of the largest logit there), and those of a recording. attrs name the
        rules that chose tokens and targets.

    Raises:
        ValueError: another model or dtype, rules, tokens or targets that cannot be, edits or a recording that is open,
            a logit that is not finite, or relevance that is not conserved: where, and by how much.

    >>> import mamba_probe as mp
    >>> task = mp.tasks.mqar(batch=2, length=16, n_pairs=3, vocab=16)
    >>> with mp.attach(mp.constructions.mqar(n_keys=8, n_values=8).model) as probe:
    ...     found = relevance(probe, task)
    >>> bool(found["conservation_error"].max() < 1e-5)
    True
    """
    if rules not in RULES:
        raise unknown_name("rules", rules, RULES)
    checked_model(probe, "relevance")
    given = checked_input(probe.model, probe._adapters[0].sizes.width, inputs, attention_mask, None, None)
    if "input_ids" not in given.keywords:
        raise ValueError(f"relevance is that of token ids: pass input_ids; got {sorted(given.keywords)}")
    valid = _valid(given)
    asked = asked_of(inputs, valid, tokens, target, len(probe.model.get_output_embeddings().weight))
    parts, start, sites = [], 0, ()
    for piece in given.pieces(batch_size):
        rows = slice(start, start + len(piece["input_ids"]))
        part, sites = passed(probe, piece, asked.rows(rows), rules)
        parts.append(part)
        start = rows.stop
    found = {name: np.concatenate([part[name] for part in parts], axis=axis) for name, axis in BATCH_AXIS.items()}
    _check_finite(found["logit"], asked)
    result = _labelled(probe, given, asked, _marked(found, asked, valid), sites, rules)
    return asserted(result, probe.model) if rules == "mambalrp" else result


def checked_model(probe: Any, what: str) -> None:
    """Refuse a model that the rules do not cover, or a probe that is not free."""
    probe._check_unedited(what)
    if any(tap.listener is not None for tap in probe._taps.values()):
        raise ValueError(f"{what} runs the model, and a recording is open on this probe: leave it first")
    kind = type(probe.model)
    if (kind.__module__, kind.__qualname__) not in SUPPORTED:
        known = ", ".join(f"{name} ({module.split('.')[0]})" for module, name in SUPPORTED)
        raise ValueError(
            f"{what} has rules for embedding, norms, mixers and head alone, and {kind.__name__} ({kind.__module__}) may"
            f" hold other parts, or has no logits. Supported: {known}"
        )
    dtype = next(probe.model.parameters()).dtype
    if dtype not in (torch.float32, torch.float64):
        need = "float32 or float64, in which relevance is conserved"
        raise ValueError(f"{what} needs {need}; got {dtype}: model.float()")


def _valid(given: ModelInput) -> np.ndarray:
    """(batch, token): where there is a token."""
    mask = given.keywords.get("attention_mask")
    return np.ones((given.batch, given.length), bool) if mask is None else mask.bool().cpu().numpy()


def _check_finite(logit: np.ndarray, asked: Asked) -> None:
    bad = np.argwhere(~np.isfinite(logit) & (asked.token >= 0))
    if len(bad):
        row, query = bad[0]
        raise ValueError(f"the logit at token {asked.token[row, query]} of row {row} is {logit[row, query]}")


def _marked(found: dict[str, np.ndarray], asked: Asked, valid: np.ndarray) -> dict[str, np.ndarray]:
    """NaN at padding and where a row has no such query; relevance itself is that of the first block's stream."""
    none = asked.token < 0
    marked = {name: np.where(none, np.nan, found[name]) for name in ("logit", "bias")}
    for name in POINTS:
        marked[name] = np.where(none[..., None] | ~valid[:, None], np.nan, found[name])
    ids = {name: np.where(none, -1, found[name]) for name in ("target", "top")}
    return marked | {"relevance": marked["residual"][0]} | ids


def _labelled(
    probe: Any, given: ModelInput, asked: Asked, found: dict[str, np.ndarray], sites: Sequence[str], rules: str
) -> xr.Dataset:
    valid, target, top = _valid(given), found.pop("target"), found.pop("top")
    found |= errors(found, probe.layers, sites)
    if rules == "gradient":
        found = {name: found[name] for name in ("relevance", *POINTS, "logit", "conservation_error")}
    tokens, queries = ("batch", "token"), ("batch", "query")
    coords: dict[str, Any] = {
        "layer": list(probe.layers), "batch": np.arange(given.batch), "token": np.arange(given.length),
        "query_token": (queries, asked.token), "target_id": (queries, target), "top_id": (queries, top),
        "token_id": (tokens, given.keywords["input_ids"].cpu().numpy()), "valid": (tokens, valid),
        "position": (tokens, np.where(valid, valid.cumsum(1) - 1, -1)),
    }  # fmt: skip
    coords |= {"site": np.array(sites, dtype=object)} if "bias" in found else {}
    variables = {name: (DIMS[name], found[name], {"long_name": TEXT[name], "units": _units(name)}) for name in found}
    labels = {name: (tokens, each) for name, each in given.labels.items()}
    attrs = provenance.of_model(probe.model, "relevance") | given.attrs
    attrs |= {
        "family": probe._adapters[0].family, "backend": probe.backend, "rules": rules, "estimator": ESTIMATOR[rules],
        "tokens_rule": asked.tokens_rule, "target_rule": asked.target_rule,
    }  # fmt: skip
    return xr.Dataset(variables, coords | labels, attrs)


def _units(name: str) -> str:
    return "1" if name.endswith("_error") else "logit"
