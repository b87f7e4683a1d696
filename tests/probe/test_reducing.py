"""Reductions against brute-force numpy on one stored trace, whatever the batch size; memory; refusals; resuming."""

import tracemalloc
from functools import cache

import numpy as np
import pytest
import xarray as xr

import mamba_probe as mp
from mamba_probe.analyses import memory_horizon
from mamba_probe.reducing.classes import classes
from mamba_probe.reducing.driving import Tally, joined, piece
from mamba_probe.reducing.reduction import UNITS, dealt
from mamba_probe.run import randomised_twin

BINS = np.arange(-8.0, 1.5, 0.5)
DRAWS = 20


class Letters:
    """A tokenizer of single letters: a..z are 1..26, anything else 27."""

    eos_token_id = 0

    def __call__(self, text):
        return {"input_ids": [ord(c) - 96 if "a" <= c <= "z" else 27 for c in text]}

    def convert_ids_to_tokens(self, ids):
        return ["<eos>" if i == 0 else chr(96 + i) if i < 27 else "." for i in ids]


def words(n, longest=13):
    """Texts of several lengths, with a full stop here and there."""
    rng = np.random.default_rng(7)
    return ["".join(rng.choice(list("abcde."), size=rng.integers(2, longest))) for _ in range(n)]


def by_vowel(text):
    return {"a": "vowel", "e": "vowel", ".": None}.get(text, "other")


def ours():
    few = {"n_bootstrap": DRAWS}
    return [mp.reduce.mean("delta", **few), mp.reduce.histogram("delta", bins=BINS, **few),
            mp.reduce.horizon(by_channel=True, **few)]  # fmt: skip


def brute_classes(trace):
    """By text, token by token."""
    valid, text = trace["valid"].values, trace["token_text"].values
    named = np.vectorize(by_vowel, otypes=[object])(text)
    return {"all": valid, "other": valid & (named == "other"), "vowel": valid & (named == "vowel")}


def brute_horizons(trace, level, frozen):
    """Token by token: (layer, batch, token, head, state) of horizons, inf where not reached, and the least they are."""
    delta, A = trace["delta"].values.astype(float), trace["A"].values.astype(float)
    A = A.reshape(*A.shape[:2], -1)
    found, least = (np.full((*delta.shape, A.shape[-1]), np.nan) for _ in range(2))
    for layer, row in np.ndindex(delta.shape[:2]):
        steps = delta[layer, row, trace["valid"].values[row]]
        steps = np.broadcast_to(steps.mean(axis=0), steps.shape) if frozen else steps
        at = np.flatnonzero(trace["valid"].values[row])
        need = -np.log(level) / np.abs(A[layer])
        for s in range(len(at)):
            summed = np.cumsum(steps[s + 1 :], axis=0)[..., None]
            reached = summed >= need * (1 - 1e-9)
            found[layer, row, at[s]] = np.where(reached.any(axis=0), reached.argmax(axis=0) + 1, np.inf) if len(
                summed) else np.inf  # fmt: skip
            least[layer, row, at[s]] = np.where(
                np.isinf(found[layer, row, at[s]]), len(at) - s, found[layer, row, at[s]]
            )
    return found, least


def brute_quantiles(values):
    return np.quantile(values, (0.1, 0.5, 0.9), method="inverted_cdf")


@pytest.fixture(scope="module", params=["packed", "padded"])
def reduced(request):
    """Of both families in turn: the trace as stored whole, and what was reduced of it online."""
    from importlib.util import module_from_spec, spec_from_file_location
    from pathlib import Path

    spec = spec_from_file_location("root_conftest", Path(__file__).parents[1] / "conftest.py")
    assert spec is not None and spec.loader is not None  # noqa: PT018
    root = module_from_spec(spec)
    spec.loader.exec_module(root)
    options = {"length": 9} if request.param == "packed" else {}
    rows = mp.corpus(words(11), tokenizer=Letters(), layout=request.param, **options)

    @cache
    def of(family):
        with mp.attach(root.BUILDERS[family]()) as probe:
            return probe.record(rows, batch_size=3), probe.reduce(rows, ours(), by=by_vowel, batch_size=3), rows

    return of


def test_mean_and_variance_are_those_of_the_stored_trace(reduced, family):
    trace, found, _ = reduced(family)
    delta = trace["delta"].values.astype(float)
    for name, mask in brute_classes(trace).items():
        values = delta[:, mask]
        one = found.sel({"class": name})
        np.testing.assert_allclose(one["delta_mean"], values.mean(axis=1), rtol=1e-12)
        np.testing.assert_allclose(one["delta_variance"], values.var(axis=1), rtol=1e-12)
        np.testing.assert_allclose(one["layer_delta_mean"], values.mean(axis=(1, 2)), rtol=1e-12)
        assert one["n_tokens"] == mask.sum()
        assert one["n_rows"] == mask.any(axis=1).sum()


def test_histograms_count_exactly(reduced, family):
    trace, found, _ = reduced(family)
    delta = trace["delta"].values.astype(float)
    for name, mask in brute_classes(trace).items():
        one = found.sel({"class": name})
        for layer, head in np.ndindex(delta.shape[0], delta.shape[3]):
            values = delta[layer, mask, head]
            want = np.histogram(values, bins=np.append(np.exp2(BINS), np.inf))[0]
            got = one.isel(layer=layer, **{found["delta_mean"].dims[-1]: head})
            assert got["delta_count"].values.tolist() == want[:-1].tolist()
            assert int(got["delta_above"]) == want[-1]
            assert int(got["delta_below"]) == (values < np.exp2(BINS[0])).sum()
        total = one["delta_count"].sum("delta_bin") + one["delta_below"] + one["delta_above"]
        assert (total + one["delta_not_positive"] == mask.sum()).all(), "every value is counted somewhere"
        share = one["delta_count"].sum(one["delta_count"].dims[1]) / (mask.sum() * delta.shape[3])
        np.testing.assert_allclose(one["layer_delta_share"], share, rtol=1e-12)


def test_horizons_are_those_of_a_sum_over_tokens(reduced, family):
    trace, found, _ = reduced(family)
    for kind, frozen in (("forward", False), ("null_lti", True)):
        exact, least = brute_horizons(trace, np.exp(-1), frozen)
        for name, mask in brute_classes(trace).items():
            one = found.sel({"class": name})
            for layer in range(len(exact)):
                values, at_least = exact[layer][mask], least[layer][mask]
                got = one.isel(layer=layer)
                assert got[f"layer_{kind}_horizon"].values.tolist() == brute_quantiles(values).tolist()
                assert got[f"layer_{kind}_horizon_at_least"].values.tolist() == brute_quantiles(at_least).tolist()
                np.testing.assert_allclose(got[f"layer_{kind}_censored_share"], np.isinf(values).mean(), rtol=1e-12)
                if kind == "forward":
                    by_head = [brute_quantiles(values[:, head]).tolist() for head in range(values.shape[1])]
                    assert got["forward_horizon"].values.tolist() == by_head


def test_of_all_tokens_horizons_are_memory_horizons(reduced, family):
    trace, found, _ = reduced(family)
    whole = memory_horizon.measure(trace)
    one = found.sel({"class": "all"})
    for name in ("forward_horizon", "null_lti_horizon", "forward_km_horizon", "selectivity_gain", "lti_horizon",
                 "forward_horizon_at_least", "forward_censored_share"):  # fmt: skip
        np.testing.assert_array_equal(one[f"layer_{name}"], whole[f"layer_{name}"])
    np.testing.assert_allclose(found["lti_horizon"], whole["lti_horizon"], rtol=1e-12)


def folded(trace, step, reductions):
    """A stored trace given to reductions some rows at a time, as `reduce` does."""
    classed, n = classes(by_vowel, trace.coords, True), trace.sizes["batch"]
    for start in range(0, n, step):
        rows = slice(start, min(start + step, n))
        for one in reductions:
            one.update(piece(trace.isel(batch=rows).drop_vars("parent_row"), classed, rows, n))
    return joined([one.result() for one in reductions])


@pytest.mark.parametrize("step", [4, *(pytest.param(n, marks=pytest.mark.long) for n in (1, 100))])
def test_the_same_bits_whatever_the_batch_size(reduced, family, step):
    trace, found, _ = reduced(family)
    again = folded(trace, step, [Tally(), *ours()])
    xr.testing.assert_identical(again.drop_attrs(), found.drop_attrs())


def test_intervals_are_those_of_units_drawn_by_hand(reduced, family):
    trace, found, _ = reduced(family)
    n = trace.sizes["batch"]
    unit, delta = dealt(slice(0, n), n), trace["delta"].values.astype(float)
    draws = np.random.default_rng(0).multinomial(
        unit.max() + 1, np.full(unit.max() + 1, 1 / (unit.max() + 1)), size=DRAWS
    )
    valid = trace["valid"].values
    drawn = []
    for each in draws:
        rows = np.repeat(np.arange(n), each[unit])
        drawn.append(delta[:, rows][:, valid[rows]].mean(axis=1))
    for end, at in (("low", 0.025), ("high", 0.975)):
        want = np.quantile(drawn, at, axis=0, method="inverted_cdf")
        np.testing.assert_allclose(found[f"delta_mean_{end}"].sel({"class": "all"}), want, rtol=1e-12)


def test_units_are_runs_of_neighbouring_rows():
    unit = np.concatenate([dealt(slice(0, 7), 1000), dealt(slice(7, 1000), 1000)])
    assert (np.diff(unit) >= 0).all()
    sizes = np.bincount(unit)
    assert len(sizes) == UNITS
    assert sizes.max() - sizes.min() <= 1
    assert dealt(slice(0, 5), 5).tolist() == [0, 1, 2, 3, 4]


def test_intervals_cover_the_mean_of_autocorrelated_rows():
    rng, hits, n = np.random.default_rng(0), 0, 200
    for _ in range(n):
        noise = np.zeros(512)
        for i in range(1, 512):
            noise[i] = 0.5 * noise[i - 1] + rng.normal()
        unit = dealt(slice(0, 512), 512)
        means = np.bincount(unit, noise) / 16
        draws = rng.multinomial(32, np.full(32, 1 / 32), size=200) @ means / 32
        low, high = np.quantile(draws, [0.025, 0.975])
        hits += low <= 0 <= high
    assert 0.87 < hits / n < 0.98, hits / n


def test_padding_never_enters(model):
    ids = np.random.default_rng(0).integers(1, 60, size=(2, 8))
    mask = np.ones_like(ids)
    mask[0, :3], mask[1, 5:] = 0, 0
    other = np.where(mask, ids, 7)
    with mp.attach(model) as probe:
        plain, poisoned = (
            probe.reduce(given, [mp.reduce.mean("x"), mp.reduce.horizon()], mask) for given in (ids, other)
        )
    xr.testing.assert_identical(plain.drop_attrs(), poisoned.drop_attrs())
    assert plain["n_tokens"].item() == mask.sum()


def test_classes_of_a_task_of_ids_and_of_text(model):
    task = mp.tasks.mqar(batch=3, length=16, n_pairs=2, vocab=32, seed=0)
    corpus = mp.corpus(words(5), tokenizer=Letters(), layout="padded")
    mean = [mp.reduce.mean("delta")]
    table = np.array(["low"] * 16 + [""] * 8 + ["high"] * 8)
    with mp.attach(model) as probe:
        by_role = probe.reduce(task, mean, by="role")
        by_id = probe.reduce(task, mean, by=dict(enumerate(table.tolist())))
        by_array = probe.reduce(task, mean, by=table)
        by_text = probe.reduce(corpus, mean, by="text")
        trace = probe.record(task, variables=["delta"])
    roles = sorted(set(task.role.ravel()))
    assert by_role["class"].values.tolist() == ["all", *roles]
    assert by_role["n_tokens"].values.tolist() == [48, *((task.role == role).sum() for role in roles)]
    xr.testing.assert_identical(by_id.drop_attrs(), by_array.drop_attrs())
    assert by_id["class"].values.tolist() == ["all", "high", "low"]
    low = trace["delta"].values.astype(float)[:, task.input_ids < 16].mean(axis=1)
    np.testing.assert_allclose(by_id["delta_mean"].sel({"class": "low"}), low, rtol=1e-12)
    text = corpus[:].token_text
    assert by_text["class"].values.tolist() == ["all", "first token", "punctuation"]
    assert by_text["n_tokens"].values.tolist() == [(text != "").sum(), 5, (text == ".").sum()]


@pytest.mark.long
def test_memory_does_not_grow_with_the_rows(model):
    def peak(n, probe):
        rows = mp.corpus(([i % 50 + 1 for i in range(j, j + 8)] for j in range(n)), layout="padded")
        few = [mp.reduce.mean("delta", n_bootstrap=2), mp.reduce.horizon(n_bootstrap=2)]
        tracemalloc.start()
        try:
            probe.reduce(rows, few, batch_size=4, layers=[0], channels=[0, 1, 2])
            return tracemalloc.get_traced_memory()[1]
        finally:
            tracemalloc.stop()

    with mp.attach(model) as probe:
        peak(32, probe)  # all units have a row from here on
        small, large = peak(32, probe), peak(160, probe)
    assert large < 1.1 * small, (small, large)


def test_a_twin_stands_beside(model):
    rows = mp.corpus(words(6), tokenizer=Letters(), layout="packed", length=8)
    with mp.attach(randomised_twin(model)) as probe:
        twin = probe.reduce(rows, ours())
        elsewhere = probe.reduce(mp.corpus(words(7), tokenizer=Letters(), layout="packed", length=8), ours())
    with mp.attach(model) as probe:
        found = probe.reduce(rows, ours(), baseline=twin)
        for wrong, said in ((elsewhere, "another inputs_sha256"), (xr.Dataset(), "what probe.reduce returned"),
                            (twin.isel(layer=[0]), "or other labels")):  # fmt: skip
            with pytest.raises(ValueError, match=said):
                probe.reduce(rows, ours(), baseline=wrong)
    np.testing.assert_array_equal(found["baseline_layer_delta_mean"], twin["layer_delta_mean"])
    assert found.attrs["baseline_hash"] == twin.attrs["model_hash"] != found.attrs["model_hash"]


class Stop(Exception):
    pass


def test_a_resumed_reduction_ends_with_the_same_bits(model, tmp_path, monkeypatch):
    rows = mp.corpus(words(20), tokenizer=Letters(), layout="padded")
    path, calls = tmp_path / "sums.npz", []
    with mp.attach(model) as probe:
        whole = probe.reduce(rows, ours(), by=by_vowel, batch_size=3)
        forward = type(model).forward

        def counted(self, *args, **kwargs):
            calls.append(1)
            if len(calls) == 4:
                raise Stop
            return forward(self, *args, **kwargs)

        monkeypatch.setattr(model, "forward", counted.__get__(model))
        with pytest.raises((Stop, TypeError)):
            probe.reduce(rows, ours(), by=by_vowel, batch_size=3, checkpoint=path)
        monkeypatch.undo()
        begun = path.read_bytes()
        with pytest.raises(ValueError, match="is of another call: its by is"):
            probe.reduce(rows, ours(), batch_size=3, checkpoint=path)
        with pytest.raises(ValueError, match="is of another call: its batch_size is 3, not 5"):
            probe.reduce(rows, ours(), by=by_vowel, batch_size=5, checkpoint=path)
        again = probe.reduce(rows, ours(), by=by_vowel, batch_size=3, checkpoint=path)
        path.write_bytes(begun[:-40])
        with pytest.raises(ValueError, match=r"no checkpoint of a reduction, or damaged"):
            probe.reduce(rows, ours(), by=by_vowel, batch_size=3, checkpoint=path)
    xr.testing.assert_identical(again.drop_attrs(), whole.drop_attrs())


class Largest:
    """A reduction of a user's own."""

    variables = ("y",)

    def __init__(self):
        self.value = -np.inf

    def update(self, trace):
        self.value = max(self.value, float(trace["y"].max()))

    def result(self):
        return xr.Dataset({"largest_y": self.value})


def test_a_reduction_of_ones_own_and_the_copy_that_is_fed(model):
    ids, own = np.random.default_rng(0).integers(1, 60, size=(5, 7)), Largest()
    with mp.attach(model) as probe:
        found = probe.record(ids, reduce=[own, mp.reduce.mean("y", name="why")], batch_size=2)
        trace = probe.record(ids, variables=["y"], batch_size=2)
        with pytest.raises(ValueError, match=r"checkpoint= keeps reductions of mp.reduce"):
            probe.reduce(ids, [own], checkpoint="sums.npz")
    assert found["largest_y"].item() == trace["y"].values.max()
    assert own.value == -np.inf, "one list serves many calls"
    assert found["why_mean"].dims[2:] == trace["y"].dims[3:]


@pytest.mark.parametrize(
    ("reductions", "options", "said"),
    [
        ([], {}, "reductions name no variable"),
        (mp.reduce.mean("delta"), {}, "reductions is a list"),
        ([mp.reduce.mean], {}, "is no reduction: mp.reduce has mean"),
        (["delta"], {}, "'delta' is no reduction"),
        ([mp.reduce.mean("delt")], {}, "unknown variable 'delt': did you mean 'delta'"),
        ([mp.reduce.mean("A")], {}, "`A` is constant in mamba2? layers"),
        ([mp.reduce.mean("delta"), mp.reduce.mean("delta")], {}, "two reductions both give delta_mean"),
        ([mp.reduce.mean("delta")], {"by": "rol"}, "unknown by 'rol': did you mean 'role'"),
        ([mp.reduce.mean("delta")], {"by": "role"}, "by='role' needs a task"),
        ([mp.reduce.mean("delta")], {"by": "text"}, "by='text' needs a corpus or text with its tokenizer"),
        ([mp.reduce.mean("delta")], {"by": str.upper}, "takes the text of tokens"),
        ([mp.reduce.mean("delta")], {"by": {}}, "by= names no class"),
        ([mp.reduce.mean("delta")], {"by": {1: "all"}}, "a string other than 'all'"),
        ([mp.reduce.mean("delta")], {"by": {"a": "b"}}, "by= maps token ids"),
        ([mp.reduce.mean("delta")], {"by": {1: 2}}, "the class of token id 1 is a string"),
        ([mp.reduce.mean("delta")], {"batch_size": 0}, "batch_size is at least 1"),
        ([mp.reduce.mean("delta")], {"checkpoint": "sums.zip"}, "a checkpoint's name ends in .npz"),
    ],
)
def test_refusals(model, reductions, options, said):
    with mp.attach(model) as probe, pytest.raises(ValueError, match=said):
        probe.reduce(np.ones((2, 4), int), reductions, **options)


def test_refusals_of_record_and_of_the_functions(model):
    mean = [mp.reduce.mean("delta")]
    with mp.attach(model) as probe:
        with pytest.raises(ValueError, match="leave out store"):
            probe.record(np.ones((2, 4), int), reduce=mean, store="x.zarr")
        with pytest.raises(ValueError, match="leave out variables"):
            probe.record(np.ones((2, 4), int), reduce=mean, variables=["x"])
        with pytest.raises(ValueError, match=r"pass reduce=\[...\] with it"):
            probe.record(np.ones((2, 4), int), by="role")
    for bins in ([], [1.0], [1.0, 1.0], [2.0, 1.0], [0.0, np.inf], 8):
        with pytest.raises(ValueError, match="bins are edges of log2"):
            mp.reduce.histogram("delta", bins=bins)
    for level in (0.0, 1.5, "half", ["1/e", "1/2"]):
        with pytest.raises(ValueError, match="level is"):
            mp.reduce.horizon(level)
    with pytest.raises(ValueError, match="n_bootstrap is at least 2"):
        mp.reduce.mean("delta", n_bootstrap=1)
    with pytest.raises(ValueError, match="was given no rows yet"):
        mp.reduce.mean("delta").result()
