"""The attribution of a recorded run's answers: how it is measured, said and drawn."""

from collections.abc import Sequence
from functools import partial
from typing import Any

import numpy as np
import xarray as xr

from mamba_probe.analyses.attribution.classes import PAIR
from mamba_probe.analyses.attribution.measure import measure
from mamba_probe.analyses.attribution.plot import plot
from mamba_probe.analyses.common.analysis import Analysis, Panel, Row, number, span

__all__ = ["ANALYSIS"]

TASK_ROWS, TEXT_ROWS = 16, 4
"""Rows that are explained, the first of the recording: each costs a backward pass and some fifty forward ones."""
AT_ONCE = 4
"""Rows a forward call: a backward pass holds every layer."""
MODELS = ("MambaForCausalLM", "Mamba2ForCausalLM", "FalconMambaForCausalLM", "LanguageModel")


def _lacks(run: Any) -> str:
    if run.lacks_model():
        return run.lacks_model()
    if run.trace.attrs["dtype"] not in ("float32", "float64"):
        return f"float32 or float64 weights, in which relevance is conserved; they are {run.trace.attrs['dtype']}"
    kind = run.trace.attrs["model_class"]
    return "" if kind in MODELS else f"rules for the parts of {kind}; there are some for {', '.join(MODELS)}"


def _of_run(run: Any, seed: int) -> xr.Dataset:
    if run.task is None:
        return _explained(run, seed, run.isel(batch=slice(TEXT_ROWS)).inputs(), 1)
    return _explained(run, seed, (run.isel(batch=slice(TASK_ROWS)).task, None), 4)


def _explained(run: Any, seed: int, inputs: tuple[Any, Any], n_random: int) -> xr.Dataset:
    """Relevance by both rules, of another row's answer, and curves of tokens taken away."""
    batch_size = 1 if run.task is None else AT_ONCE
    with run.probe() as probe:
        found = probe.relevance(*inputs, batch_size=batch_size)
        gradient = probe.relevance(*inputs, target=found["target_id"].values, rules="gradient", batch_size=batch_size)
        wrong = _other(found["target_id"].values)
        other = None if wrong is None else probe.relevance(*inputs, target=wrong, batch_size=batch_size)
        taken = probe.perturbed(found, gradient, n_random=n_random, seed=seed, batch_size=batch_size)
    result = measure(found, gradient=gradient, other=other, perturbation=taken, seed=seed)
    rows = f"the first {found.sizes['batch']} of {run.trace.sizes['batch']} recorded"
    return result.assign_attrs(
        rows=rows, other_rule="other_: relevance of the id that the next row with another id explains"
    )


def _other(target: np.ndarray) -> np.ndarray | None:
    """For each row the id of the next row, around the end, that has another one; None where all rows have the same.

    >>> _other(np.array([[5], [5], [7]])).ravel().tolist()
    [7, 7, 5]
    """
    wrong = target.copy()
    for step in range(len(target) - 1, 0, -1):  # the nearest is written last
        later = np.roll(target, -step, axis=0)
        wrong = np.where(later != target, later, wrong)
    return None if (wrong == target).any() else wrong


def _says(result: xr.Dataset) -> tuple[str, list[Row]]:
    area = {str(order): number(result["area"].sel(order=order).item()) for order in result["order"].values}
    said = (
        f"{_of_answer(result) if 'pair_share' in result else _of_text(result)} Taking tokens away in its order leaves"
        f" the id a probability of {area[result.attrs['rules']]} on average over the counts (gradient's order"
        f" {area['gradient']}, random {area['random']})."
    )
    top = float(result["top"].mean())
    said += "" if top == 1 else f" The model's own answer is that id in {number(100 * top)} % of the rows."
    return said, [*_rows_of_classes(result), *_rows_of_areas(result), *_rows_of_depth(result), *_checks(result)]


def _of_answer(result: xr.Dataset) -> str:
    asked = [kind for kind in result["token_class"].values if kind in PAIR]
    chance = result["chance"].sel(token_class=asked).sum().item()
    own, gradient = (_value(result, f"mean_{prefix}class_share", "own") for prefix in ("", "gradient_"))
    return (
        f"MambaLRP puts {number(result['mean_pair_share'].item())} of the positive relevance of the answer on the"
        f" {' and '.join(asked).replace('asked ', '')} that it asks for and {number(own)} on the query itself"
        f" (gradient x input {number(result['mean_gradient_pair_share'].item())} and {number(gradient)};"
        f" chance {number(chance)} and"
        f" {number(_value(result, 'chance', 'own'))})."
    )


def _of_text(result: xr.Dataset) -> str:
    own, gradient = (_value(result, f"mean_{prefix}class_share", "own") for prefix in ("", "gradient_"))
    return (
        f"MambaLRP puts {number(own)} of the positive relevance of the last token's top logit on that token itself"
        f" (gradient x input {number(gradient)}; chance {number(_value(result, 'chance', 'own'))}); on average it lies"
        f" {number(result['mean_mean_distance'].item())} tokens back."
    )


def _value(result: xr.Dataset, name: str, token_class: str) -> float:
    return result[name].sel(token_class=token_class).item()


def _rows_of_classes(result: xr.Dataset) -> list[Row]:
    rows = []
    for kind in result["token_class"].values:
        one = result.sel(token_class=kind)
        nulls = [f"chance {number(one['chance'].item())}"]
        for name, what in (("gradient", "gradient"), ("other", "another id")):
            if f"mean_{name}_class_share" in one:
                nulls.append(f"{what} {number(one[f'mean_{name}_class_share'].item())}")
        ends = (one[f"mean_class_share_{end}"].item() for end in ("low", "high"))
        value = number(one["mean_class_share"].item())
        rows.append(Row(f"positive relevance on {kind}", value, "; ".join(nulls), span(*ends)))
    return rows


def _rows_of_areas(result: xr.Dataset) -> list[Row]:
    rows = []
    for order in result["order"].values:
        if order != result.attrs["rules"]:
            one = result.sel(order=order)
            ends = (one[f"area_gain_{end}"].item() for end in ("low", "high"))
            what = f"mean probability, {order} order less MambaLRP's"
            rows.append(Row(what, number(one["area_gain"].item()), "0", span(*ends)))
    return rows


def _rows_of_depth(result: xr.Dataset) -> list[Row]:
    layers = result["layer"].values
    if len(layers) == 1:
        return []
    rows = []
    for layer in dict.fromkeys([int(layers[0]), int(layers[len(layers) // 2]), int(layers[-1])]):
        one = result.sel(layer=layer)
        ends = (one[f"mean_own_share_{end}"].item() for end in ("low", "high"))
        null = f"gradient {number(one['mean_gradient_own_share'].item())}"
        value = number(one["mean_own_share"].item())
        rows.append(Row("|relevance| at the query's own token", value, null, span(*ends), layer))
    return rows


def _checks(result: xr.Dataset) -> list[Row]:
    error = f"{float(result['conservation_error'].max()):.1e}"
    return [
        Row("share of biases in |relevance|", number(float(result["bias_share"].mean()))),
        Row("error of conservation, largest", error, "0"),
    ]


def _panels(results: Sequence[xr.Dataset]) -> tuple[Panel, ...]:
    panels = (Panel(plot, "y"), Panel(partial(plot, kind="curve"), "y"), Panel(partial(plot, kind="tokens")))
    deep = any(result.sizes["layer"] > 1 for result in results)
    return (*panels, Panel(partial(plot, kind="depth"), "y")) if deep else panels


ANALYSIS = Analysis(
    title="Attribution",
    question="Which tokens is an answer's logit made of, and does the answer go when they go?",
    reading=(
        "Relevance of a token: its embedding times the gradient of the logit. MambaLRP takes that gradient with the"
        " scan's selection and the norms' scales held, SiLU as a line through 0 and half of a gate's product to each"
        " side, so that tokens and biases add up to the logit (asserted). Own: the query's token itself. A key that"
        " acts through B or delta alone has no relevance, since these are held. Chance: as many of the tokens up to the"
        " query. The curve replaces the embeddings of the most relevant tokens before the query by 0, and follows"
        " the id's probability: the lower, the more the answer rests on them."
    ),
    picture=(
        "From above. Bars: the share of positive relevance on each kind of token, by rule, with its interval;"
        " dotted is chance, grey is the relevance of another answer. Curves: the answer's probability as the most"
        " relevant tokens are taken away; an order that falls below the grey random one has found what the answer"
        " rests on. Strip: one row's tokens, brown for and violet against the answer. Of several layers, below: how"
        " much still lies on the query's own token."
    ),
    of_run=_of_run,
    says=_says,
    panels=_panels,
    lacks=_lacks,
    notes=("rows", "tokens_rule", "target_rule", "other_rule", "replacement", "conservation"),
)
