"""Keys corrupted and the clean run put back: a recurrence by hand, closed forms, what is refused, and what it costs."""

from dataclasses import replace

import numpy as np
import pytest
import torch
import xarray as xr

import mamba_probe as mp
from mamba_probe.associating import ROLES, SITES, associating
from mamba_probe.run import randomised_twin

TASK = {"batch": 5, "length": 20, "n_pairs": 4, "vocab": 32, "seed": 3}


def built(taps=4, layers=1, seed=0):
    """A tiny MambaForCausalLM, every weight moved, in float64."""
    from transformers import MambaConfig, MambaForCausalLM

    torch.manual_seed(seed)
    sizes = {"vocab_size": 32, "hidden_size": 12, "state_size": 4, "num_hidden_layers": layers, "time_step_rank": 3}
    model = MambaForCausalLM(MambaConfig(**sizes, conv_kernel=taps))
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in sorted(model.named_parameters()):
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.add_(noise * (0.1 if name.endswith("A_log") else 0.4))
    return model.eval().double()


def associated(model, task, **options):
    with mp.attach(model) as probe:
        return associating(probe, task, **options)


# -- one layer by hand ----------------------------------------------------------------------------------------------


def silu(a):
    return a / (1 + np.exp(-a))


def rms(a, norm):
    return a / np.sqrt((a**2).mean(-1, keepdims=True) + norm.variance_epsilon) * norm.weight.detach().numpy()


class ByHand:
    """One row of a one-layer model, token by token in numpy: what enters, what is scanned, what comes out."""

    def __init__(self, model, ids):
        self.model, block = model, model.backbone.layers[0]
        self.w = {name: tensor.double().numpy() for name, tensor in block.mixer.state_dict().items()}
        self.resid = model.backbone.embeddings.weight.detach().numpy()[ids]
        self.parts = {"mixer_in": rms(self.resid, block.norm)}

    def run(self, put=()):
        """Logits at every token; `put` holds (part, token, value)."""
        w, given = self.w, {name: [(t, v) for part, t, v in put if part == name] for name in (*self.parts_of, "out")}
        u = self.parts["mixer_in"].copy()
        self._put(u, given["mixer_in"])
        x, z = np.split(u @ w["in_proj.weight"].T, 2, axis=-1)
        taps = w["conv1d.weight"][:, 0]
        late = [np.zeros_like(x[:1]).repeat(lag, 0) for lag in range(taps.shape[1])]
        x = silu(
            sum(np.concatenate([late[lag], x[: len(x) - lag]]) * taps[:, -1 - lag] for lag in range(taps.shape[1]))
            + w["conv1d.bias"]
        )
        n = w["A_log"].shape[1]
        low = x @ w["x_proj.weight"].T
        delta = np.logaddexp(0, low[:, : -2 * n] @ w["dt_proj.weight"].T + w["dt_proj.bias"])
        made = {"x": x, "delta": delta, "B": low[:, -2 * n : -n], "C": low[:, -n:]}
        for name, values in made.items():
            self._put(values, given[name])
        h, y = np.zeros_like(w["A_log"]), np.zeros_like(x)
        for t in range(len(x)):
            h = np.exp(delta[t][:, None] * -np.exp(w["A_log"])) * h + delta[t][:, None] * made["B"][t] * x[t][:, None]
            y[t] = h @ made["C"][t] + w["D"] * x[t]
        out = (y * silu(z)) @ w["out_proj.weight"].T
        self._put(out, given["out"])
        self.held = {"mixer_in": u, "out": out} | made
        hidden = rms(self.resid + out, self.model.backbone.norm_f)
        return hidden @ self.model.lm_head.weight.detach().numpy().T

    parts_of = ("mixer_in", "x", "delta", "B", "C")

    @staticmethod
    def _put(values, entries):
        for token, value in entries:
            values[token] = value


PARTS = {"mixer_in": ["mixer_in"], "scan": ["x", "delta", "B", "C"], "x": ["x"], "B": ["B"], "delta": ["delta"]}
PARTS |= {"mixer_out": ["out"]}


def test_every_entry_is_what_a_recurrence_by_hand_gives():
    model, task = built(), mp.tasks.mqar(**TASK)
    found = associated(model, task)
    rows = range(TASK["batch"])
    corrupt = [corrupted(task, found, row) for row in rows]
    clean = [ByHand(model, task.input_ids[row]) for row in rows]
    for row, (run, ids) in enumerate(zip(clean, corrupt, strict=True)):
        assert found["clean"][row].item() == pytest.approx(margin(run.run(), task, found, row), abs=1e-6)
        assert found["corrupt"][row].item() == pytest.approx(
            margin(ByHand(model, ids).run(), task, found, row), abs=1e-6
        )
    measured = 0
    for site, role, row in ((s, r, i) for s in SITES for r in ROLES for i in rows):
        entry, at = found.sel(site=site, role=role).isel(layer=0, batch=row), int(found["at"].sel(role=role)[row])
        if at < 0:
            assert np.isnan(entry["patched"])
            continue
        put = [(part, at, clean[row].held[part][at]) for part in PARTS[site]]
        expected = margin(ByHand(model, corrupt[row]).run(put), task, found, row)
        assert entry["patched"].item() == pytest.approx(expected, abs=1e-6), (site, role, row)
        nulls = [
            margin(
                ByHand(model, corrupt[row]).run([(p, at, clean[i].held[p][there]) for p in PARTS[site]]),
                task,
                found,
                row,
            )
            for i in rows
            if (there := int(found["at"].sel(role=role)[i])) >= 0 and i != row
        ]
        if not np.isnan(entry["null_patched"]):
            measured += 1
            assert np.abs(np.array(nulls) - entry["null_patched"].item()).min() <= 1e-6, (site, role, row)
    assert measured > 50


def corrupted(task, found, row):
    ids = task.input_ids[row].copy()
    ids[(task.role[row] == "key") & (ids == found["key_id"].values[row])] = found["corrupt_id"].values[row]
    return ids


def margin(logits, task, found, row):
    """The answer's logit less the mean of the other values before the query."""
    query, target = int(found["at"].sel(role="query")[row]), int(found["target"][row])
    others = [v for v in task.input_ids[row, :query][task.role[row, :query] == "value"] if v != target]
    return logits[query, target] - logits[query, np.unique(others)].mean()


# -- closed forms ---------------------------------------------------------------------------------------------------

CLOSED = {
    "mamba1": {"mixer_in": "key", "scan": "value", "B": "value", "x": None, "delta": None, "mixer_out": "query"},
    "mamba2": {"mixer_in": "key", "scan": "value", "B": "value", "x": None, "delta": None, "mixer_out": "query"},
    "s4d": {"mixer_in": "key", "scan": "value", "x": "value", "mixer_out": "query"},
}


@pytest.mark.parametrize("mixer", CLOSED)
def test_the_constructions_hold_the_pair_at_the_value_once_convolved(mixer):
    model = mp.constructions.mqar(mixer=mixer, n_keys=16, n_values=16).model
    found = associated(model, mp.tasks.mqar(**TASK))
    assert found["counts"].all()
    assert found["site"].values.tolist() == [site for site in SITES if site in CLOSED[mixer]]
    for site, place in CLOSED[mixer].items():
        for role in ROLES:
            recovered = found["recovered"].sel(site=site, role=role, layer=0)
            np.testing.assert_allclose(recovered[found["valid"].sel(role=role)], float(role == place), atol=2e-5)
            right = found["right"].sel(site=site, role=role, layer=0)
            assert (right == (role == place))[found["valid"].sel(role=role)].all()


def test_without_a_convolution_the_scan_has_the_key_at_its_own_token_alone():
    found = associated(built(taps=1), mp.tasks.mqar(**TASK), sites=["scan"]).isel(site=0, layer=0)
    np.testing.assert_allclose(found["patched"].sel(role="key"), found["clean"], atol=1e-12)
    rest = found["patched"].sel(role=["value", "value+1", "value+2", "query", "other"])
    assert (np.isnan(rest) | (rest == found["corrupt"])).all()


# -- the rows -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("n_keys", [None, 2])
def test_roles_and_corrupted_keys(n_keys):
    task = mp.tasks.mqar(**TASK | {"batch": 40, "length": 24}, n_keys=n_keys)
    found = associated(built(), task, sites=["mixer_in"], seed=1)
    at = {role: found["at"].sel(role=role).values for role in ROLES}
    for row in range(40):
        ids, roles = task.input_ids[row], task.role[row]
        assert task.source_token[row, at["query"][row]] == at["value"][row]
        assert ids[at["key"][row]] == ids[at["query"][row]] == found["key_id"][row]
        assert at["key"][row] == at["value"][row] - 1
        assert found["corrupt_id"].values[row] not in ids
        assert found["corrupt_id"].values[row] in task.input_ids[task.role == "key"]
        for step in (1, 2):
            there = at["value"][row] + step
            assert at[f"value+{step}"][row] == (there if there < at["query"][row] else -1)
        if at["other"][row] >= 0:
            assert roles[at["other"][row]] == "value"
            assert not at["key"][row] <= at["other"][row] <= at["value"][row] + 2
    assert len(np.unique(at["value"])) > 2, "any of a row's queries is asked"
    if n_keys == 2:  # written twice: the last place alone does not give it back
        assert (found["patched"].sel(role="key") != found["clean"]).any()
    else:
        np.testing.assert_allclose(found["patched"].sel(role="key")[0, 0], found["clean"], atol=1e-12)


def test_rows_count_that_are_right_and_wrong_once_corrupted():
    model = mp.load("zoo:trained-mqar-mamba1")
    found = associated(model, mp.tasks.mqar(batch=24, length=64, n_pairs=8, vocab=256, seed=5), sites=["scan"])
    counts = found["clean_right"].values & ~found["corrupt_right"].values
    assert (found["counts"].values == counts).all()
    assert 0 < counts.sum() < 24
    assert (np.isnan(found["recovered"]).all(("site", "layer", "role")).values == ~counts).all()
    change = (found["patched"] - found["corrupt"]) / (found["clean"] - found["corrupt"])
    xr.testing.assert_allclose(found["recovered"].isel(batch=counts), change.isel(batch=counts))


def test_batches_and_selections_change_nothing():
    model, task = built(layers=2), mp.tasks.mqar(**TASK)
    whole = associated(model, task)
    part = associated(model, task, sites=["scan", "mixer_in"], layers=[1], batch_size=3)
    for name in ("patched", "null_patched"):
        np.testing.assert_allclose(part[name], whole[name].sel(site=["scan", "mixer_in"], layer=[1]), atol=1e-9)
    assert (whole["patched"].sel(layer=0) != whole["patched"].sel(layer=1)).any()


def test_the_twin_is_measured_as_a_model_is():
    model, task = built().float(), mp.tasks.mqar(**TASK)
    found = associated(model, task, twin_seed=4)
    alone = associated(randomised_twin(model, 4), task)
    for name in ("patched", "clean", "corrupt"):
        np.testing.assert_array_equal(found[f"twin_{name}"], alone[name])
    assert (found["twin_clean"] != found["clean"]).any()


# -- cost -----------------------------------------------------------------------------------------------------------


def test_the_cost_grows_with_the_tokens_before_the_query_and_the_rows():
    def counted(task):
        model, seen = built(), []
        model.get_input_embeddings().register_forward_hook(lambda module, args, out: seen.append(args[0].numel()))
        associated(model, task)
        return sum(seen)

    short, long = (counted(stretched(mp.tasks.mqar(**TASK), gap)) for gap in (0, 20))
    assert 1.5 * short < long <= 2.6 * short  # 9 to 20 tokens up to the query become 29 to 40
    assert counted(stretched(mp.tasks.mqar(**TASK), 0, after=100)) == short


def stretched(task, gap, after=0):
    """The task with filler put between the pairs and the questions, and at the end."""

    def longer(values, filler):
        rows = len(values)
        middle, end = (np.full((rows, n), filler, dtype=values.dtype) for n in (gap, after))
        return np.concatenate([values[:, :8], middle, values[:, 8:], end], axis=1)

    given = {"input_ids": 0, "role": "filler", "target": -1, "source_token": -1}
    return replace(task, **{name: longer(getattr(task, name), filler) for name, filler in given.items()})


# -- what is refused ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"sites": ["conv"]}, "unknown site 'conv'"),
        ({"sites": []}, "sites is a non-empty list of names"),
        ({"layers": [3]}, "unknown layer 3"),
        ({"batch_size": 0}, "batch_size is at least 1 and a whole number; got 0"),
    ],
)
def test_wrong_options(options, match):
    with pytest.raises(ValueError, match=match):
        associated(built(), mp.tasks.mqar(**TASK), **options)


def test_wrong_tasks_and_models():
    task = mp.tasks.mqar(**TASK)
    model = built()
    with pytest.raises(ValueError, match=r"takes a Task with pairs .* got ndarray"):
        associated(model, task.input_ids)
    with pytest.raises(ValueError, match="induction_every_token has filler, query"):
        associated(model, mp.tasks.induction_every_token(batch=2, length=16, vocab=16))
    with pytest.raises(ValueError, match="row 0 of mqar has one value alone"):
        associated(model, mp.tasks.mqar(batch=2, length=8, n_pairs=1, vocab=16))
    with pytest.raises(ValueError, match="row 0 holds every key that the task writes"):
        associated(model, mp.tasks.mqar(batch=2, length=16, n_pairs=3, vocab=8))
    with pytest.raises(ValueError, match="row 0 of induction has one value alone"):
        associated(model, mp.tasks.induction(batch=2, length=16, vocab=16))
    unanswered = replace(task, target=np.full_like(task.target, -1), source_token=np.full_like(task.target, -1))
    with pytest.raises(ValueError, match="row 0 of mqar has no query whose key was written"):
        associated(model, unanswered)
    with pytest.raises(ValueError, match="not every layer has B to be put back; all have mixer_in, scan, x, mixer_out"):
        associated(mp.constructions.mqar("s4d", n_keys=16, n_values=16).model, task, sites=["B"])
    with mp.attach(model) as probe, probe.edit(mp.ablate("conv")), pytest.raises(ValueError, match="unedited probe"):
        associating(probe, task)
    with mp.attach(model) as probe, pytest.raises(ValueError, match="a recording is open"), probe.recording():
        associating(probe, task)
    with pytest.raises(ValueError, match="MambaModel gives no logits"):
        associated(model.backbone, task)
