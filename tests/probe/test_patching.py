"""Patching moves an answer exactly as the mathematics says; a sweep can be resumed."""

import numpy as np
import pytest
import torch
from patched import AROUND, BASE, RUNS, SCAN, SOURCE, answer, quiet

import mamba_probe as mp
from mamba_probe import patching
from mamba_probe.trace.store import open_dataset

# -- closed forms ----------------------------------------------------------------------------------------------------


def recovered(built, base, source, metric):
    """(quantity, token) of the one layer, with every quantity of the scan."""
    with mp.attach(built.model) as probe:
        found = quiet(probe, built.inputs([base]), built.inputs([source]), metric, quantities=SCAN)
    assert found["base"].item() < 0 < found["source"].item()
    return found["recovered"].isel(layer=0, batch=0)


def only(found, **expected):
    """`found` is `expected`, by quantity and token, and 0 wherever nothing is expected."""
    wanted = np.zeros(found.shape)
    for quantity, at in expected.items():
        for token, value in at.items():
            wanted[found["quantity"].values.tolist().index(quantity), token] = value
    np.testing.assert_allclose(found.values, wanted, atol=2e-6)


@pytest.mark.parametrize("mixer", ["mamba1", "mamba2"])
def test_recall_moves_by_the_write_of_its_pair_and_by_what_is_read(mixer):
    built = mp.constructions.mqar(mixer, n_keys=8, n_values=8)

    def metric(logits):
        return logits[:, -1, 10] - logits[:, -1, 9]

    stored = dict.fromkeys(range(1, 5), 1.0)
    # another value of the key that is asked: x where it was written, and every state from there on
    only(recovered(built, [1, 9, 2, 11, 1], [1, 10, 2, 11, 1], metric), x={1: 1.0}, h=stored, y={4: 1.0})
    # the two keys change places: each write alone leaves no value, or both, and the two logits are equal
    swapped = recovered(built, [1, 9, 2, 10, 1], [2, 9, 1, 10, 1], metric)
    only(swapped, B={1: 0.5, 3: 0.5}, h={1: 0.5, 2: 0.5, 3: 1.0, 4: 1.0}, y={4: 1.0})
    # another key is asked: what is read there, and nothing that is stored
    only(recovered(built, [1, 9, 2, 10, 1], [1, 9, 2, 10, 2], metric), C={4: 1.0}, y={4: 1.0})


def test_induction_forgets_by_delta_and_keeps_both_where_the_decay_alone_is_patched():
    built = mp.constructions.induction("special", n_tokens=6)

    def metric(logits):
        return logits[:, -1, 1] - logits[:, -1, 2]

    # the source has no second special token: the first answer is not erased. Without that step (delta) it stays;
    # without its decay alone (A_bar) the second is written beside it, and their logits are equal
    found = recovered(built, [0, 1, 3, 0, 2, 3, 0], [0, 1, 3, 4, 2, 3, 0], metric)
    only(found, delta={4: 1.0}, A_bar={4: 0.5}, h={4: 1.0, 5: 1.0, 6: 1.0}, y={6: 1.0})


# -- one cell at a time ----------------------------------------------------------------------------------------------


def test_every_cell_is_the_run_in_which_the_entry_is_swapped(model):
    """Whatever the sizes of the forwards; NaN at padding."""
    with mp.attach(model) as probe:
        found = quiet(probe, quantities=(*SCAN, *AROUND), tokens=[2, 3, 6, 8], batch_size=6)
        one_row = quiet(probe, quantities=["B", "h"], layers=[1], tokens=[8, 3], batch_size=1)
        _, cache = probe.run_with_cache(RUNS[1])
        for quantity in SCAN:
            for layer, token in ((0, 3), (1, 6), (1, 8)):
                with torch.no_grad(), probe.edit(mp.swap(quantity, cache, layer=layer, token=token)):
                    expected = answer(model(**RUNS[0]).logits)
                cell = found["patched"].sel(quantity=quantity, layer=layer, token=token)
                np.testing.assert_allclose(cell, expected, atol=2e-5, err_msg=f"{quantity} {layer} {token}")
        for quantity in AROUND:
            name = f"blocks.1.hook_{quantity}"

            def put(tensor, hook, values=cache[name]):
                return torch.cat([tensor[:, :6], values[:, 6:7], tensor[:, 7:]], 1)

            with torch.no_grad():
                expected = answer(probe.run_with_hooks(RUNS[0], fwd_hooks=[(name, put)]))
            np.testing.assert_allclose(found["patched"].sel(quantity=quantity, layer=1, token=6), expected, atol=2e-5)
        with torch.no_grad():
            whole = [answer(model(**run).logits) for run in RUNS]
    for name, value in zip(("base", "source"), whole, strict=True):
        np.testing.assert_allclose(found[name], value, atol=2e-5)
    assert (np.isnan(found["patched"]) == ~found["valid"].transpose("token", "batch")).all()
    assert not found["valid"].values[0, 0]
    np.testing.assert_allclose(one_row["patched"], found["patched"].sel(one_row.coords["token"].coords).sel(
        quantity=["B", "h"], layer=[1]), atol=2e-5)  # fmt: skip
    share = (found["patched"] - found["base"]) / (found["source"] - found["base"])
    np.testing.assert_allclose(found["recovered"], share.transpose(*found["recovered"].dims))
    moved = np.ptp(found["patched"].sel(token=[6, 8]).max("token").values, axis=(1, 2))
    assert (moved > 1e-3).all(), "a quantity that moves nothing would agree with anything"


def recurrence(trace, row, put):
    """y (token, head, head_channel) of one layer and row in float64, `put` a (quantity, token, value)."""
    one = {name: trace[name].isel(batch=row).values.astype(np.float64) for name in ("delta", "B", "C", "x", "A", "D")
           if "batch" in trace[name].dims} | {name: trace[name].values for name in ("A", "D")}  # fmt: skip
    x = one["x"] if one["x"].ndim == 3 else one["x"][..., None]
    B, C = (one[name].reshape(len(x), -1, one[name].shape[-1]) for name in "BC")
    heads = x.shape[1] // B.shape[1]
    A = one["A"] if one["A"].ndim == 2 else one["A"][:, None]
    D = one["D"].reshape(-1, 1)
    h, y = 0.0, []
    quantity, at, value = put
    for t in range(len(x)):
        now = {"x": x[t], "B": B[t], "C": C[t], "delta": one["delta"][t]}
        if t == at and quantity in now:
            now[quantity] = value.reshape(now[quantity].shape)
        decay = np.exp(now["delta"][:, None] * A)
        if t == at and quantity == "A_bar":
            decay = value.reshape(decay.shape[0], -1)
        write, read = (np.repeat(now[name], heads, 0)[:, None] for name in "BC")
        h = decay[:, None] * h + now["delta"][:, None, None] * write * now["x"][..., None]
        if t == at and quantity == "h":
            h = value.reshape(h.shape)
        y.append((h * read).sum(-1) + D * now["x"])
        if t == at and quantity == "y":
            y[-1] = value.reshape(y[-1].shape)
    return np.stack(y)


@pytest.mark.parametrize("quantity", SCAN)
def test_a_patched_scan_is_the_brute_force_recurrence(build, family, quantity):
    """In float64, of a whole mixer whose output is read linearly."""
    mixer = build().double().backbone.layers[1].mixer
    generator = torch.Generator().manual_seed(1)
    base, source = (torch.randn(2, 7, 24, generator=generator, dtype=torch.float64) for _ in range(2))
    direction = torch.randn(24, generator=generator, dtype=torch.float64)
    with mp.attach(mixer) as probe:
        found = quiet(probe, base, source, lambda out: out[:, -1] @ direction, quantities=[quantity], batch_size=5)
        names = ("delta", "A", "A_bar", "B", "C", "x", "z", "y", "h")
        runs = [probe.record(run, variables=names).isel(layer=0) for run in (base, source)]
        runs[0]["D"] = probe.weights()["D"].isel(layer=0)
    weight = {name: each.detach().numpy() for name, each in mixer.named_parameters()}
    for row in range(2):
        for token in range(7):
            value = runs[1][quantity].isel(batch=row, token=token).values.astype(np.float64)
            y = recurrence(runs[0], row, (quantity, token, value))[-1].ravel()
            z = (runs[1] if quantity == "z" and token == 6 else runs[0])["z"].isel(batch=row, token=-1).values.ravel()
            y = y * z / (1 + np.exp(-z))
            if family == "mamba2":
                grouped = y.reshape(mixer.n_groups if hasattr(mixer.norm, "group_size") else 1, -1)
                grouped = grouped / np.sqrt((grouped**2).mean(-1, keepdims=True) + mixer.layer_norm_epsilon)
                y = grouped.ravel() * weight["norm.weight"]
            expected = direction.numpy() @ weight["out_proj.weight"] @ y
            got = found["patched"].isel(quantity=0, layer=0, token=token, batch=row).item()
            # Mamba-2's norm of transformers computes in float32
            np.testing.assert_allclose(got, expected, rtol=1e-9 if family == "mamba" else 2e-5, atol=1e-9)


# -- interruption ----------------------------------------------------------------------------------------------------


def test_an_interrupted_sweep_goes_on_where_it_stopped_to_the_same_bits(model, tmp_path):
    whole, store, calls = None, tmp_path / "sweep.zarr", []
    options = {"quantities": ("delta", "C", "h"), "batch_size": 8}
    handle = model.register_forward_pre_hook(lambda *_: calls.append(1))
    with mp.attach(model) as probe:
        whole = quiet(probe, **options)
        total = len(calls)
        assert total == 2 + 2 * (1 + 3 * 3), "both runs; each layer the source once, and 9 tokens, 4 a forward"

        def failing(*_):
            if len(calls) == total + 2 + 1 + 3 + 2:
                raise KeyboardInterrupt

        breaks = model.register_forward_pre_hook(failing)
        with pytest.raises(KeyboardInterrupt):
            quiet(probe, **options, store=store)
        breaks.remove()
        left = open_dataset(store)
        assert left["measured"].values.tolist() == [[True, False], [False, False], [False, False]]
        assert left["patched"].isel(quantity=0, layer=0).equals(whole["patched"].isel(quantity=0, layer=0))
        with pytest.raises(ValueError, match="exact is not finished"):
            patching.attribute(probe, *RUNS, answer, quantities=["delta"], exact=left)
        calls.clear()
        resumed = quiet(probe, **options, store=store)
        assert len(calls) == 2 + (1 + 2 * 3) + (1 + 3 * 3)
        calls.clear()
        again = quiet(probe, **options, store=store)
        assert len(calls) == 2
    handle.remove()
    for found in (resumed, again, open_dataset(store).load()):
        assert found.drop_attrs().identical(whole.drop_attrs())
    assert bool(whole["measured"].all())


def test_a_store_of_another_sweep_is_refused_by_what_differs(model, build, tmp_path):
    store = tmp_path / "sweep.zarr"

    def run(probe, **changed):
        given = {"base": RUNS[0], "source": RUNS[1], "quantities": ["C"], "tokens": [8], "batch_size": 4} | changed
        return quiet(probe, **given, store=store)

    def answer(logits):
        return 2 * globals()["answer"](logits)

    answer.__qualname__ = "answer"
    with mp.attach(model) as probe:
        run(probe)
        for changed, words in (
            ({"quantities": ["B"]}, r"another quantity axis: there \['C'\], here \['B'\]"),
            ({"tokens": [7]}, "another token axis"),
            ({"layers": [1]}, "another layer axis"),
            ({"batch_size": 2}, "another batch_size"),
            ({"base": RUNS[1]}, "another base"),
            ({"source": RUNS[0]}, "another source"),
            ({"metric": lambda logits: logits[:, -1, 0]}, "another metric: there answer, here .*<lambda>"),
            ({"metric": answer}, "another metric: of the base it"),
        ):
            with pytest.raises(ValueError, match=f"sweep.zarr is a sweep with {words}"):
                run(probe, **changed)
    with mp.attach(build(seed=1)) as probe, pytest.raises(ValueError, match=r"another model.*name another store"):
        run(probe)
    with mp.attach(model) as probe:
        probe.record(BASE, store=tmp_path / "trace.zarr")
        for name, words in (("trace.zarr", "something else than a sweep"), ("a.nc", "ends in .zarr")):
            with pytest.raises(ValueError, match=words):
                quiet(probe, store=tmp_path / name)


# -- errors and pictures ---------------------------------------------------------------------------------------------


def test_mistakes_are_answered_before_anything_is_swept(model):
    with mp.attach(model) as probe:
        for given, words in (
            ({"source": SOURCE[:, :8]}, r"\(2, 9\) and source \(2, 8\).*aligned"),
            ({"source": SOURCE}, "padded differently"),
            ({"quantities": ["detla"]}, "unknown quantity 'detla': did you mean 'delta'"),
            ({"quantities": ["B", "B"]}, "none twice"),
            ({"quantities": []}, "quantities is a non-empty list of names"),
            ({"layers": [7]}, "unknown layer 7"),
            ({"tokens": [9]}, r"no token 9: tokens are 0 \.\. 8"),
            ({"metric": "loss"}, "metric is a function of logits"),
            ({"metric": lambda logits: logits}, r"a tensor \(2,\); got shape \(2, 9, 61\)"),
            ({"metric": lambda logits: 1.0}, "got float"),
            ({"metric": lambda logits: logits[:, -1, 0].log() * torch.tensor([1, torch.nan])}, "got nan at row"),
            ({"batch_size": 0}, "batch_size is at least 1 and a whole number; got 0"),
        ):
            with pytest.raises(ValueError, match=words):
                quiet(probe, **given)
        padded = [{name: each[:1] for name, each in run.items()} for run in RUNS]
        with pytest.raises(ValueError, match="padding in every row"):
            quiet(probe, *padded, tokens=[0, 2])
        with probe.edit(mp.ablate("conv")), pytest.raises(ValueError, match="leave the `edit` block"):
            quiet(probe)
    with pytest.raises(ValueError, match=r"takes the probe that mp\.attach"):
        quiet(model)


def test_what_cannot_be_attributed_is_refused(model):
    long = torch.ones(1, 20, dtype=torch.long)
    with mp.attach(model) as probe:
        with pytest.raises(ValueError, match=r"h is attributed at no more than 16 tokens.*got 20"):
            patching.attribute(probe, long, long + 1, lambda logits: logits[:, -1, 0], quantities=["h"])
        with pytest.raises(ValueError, match="metric has no gradient"):
            patching.attribute(probe, *RUNS, lambda logits: logits[:, -1].argmax(-1).float())
        exact = quiet(probe, quantities=["B"], tokens=[8])
        for given, words in (
            ({"quantities": ["C"]}, "exact lacks quantity C"),
            ({"quantities": ["B"]}, "exact lacks token 0, 1"),
            ({"quantities": ["B"], "tokens": [8], "exact": 3}, "what patching.sweep returned; got int"),
        ):
            with pytest.raises(ValueError, match=words):
                patching.attribute(probe, *RUNS, answer, **({"exact": exact} | given))
        with pytest.raises(ValueError, match="exact has another source_hash"):
            patching.attribute(probe, RUNS[0], RUNS[0], answer, quantities=["B"], tokens=[8], exact=exact)


def test_a_layer_without_the_quantity_is_named():
    block = mp.blocks.S4DBlock(8, d_state=4).eval()
    hidden = torch.randn(1, 5, 8)
    with mp.attach(block) as probe, pytest.raises(ValueError, match="layer 0 has no delta, B that can be patched; it"):
        quiet(probe, hidden, hidden + 1, lambda out: out[:, -1, 0], quantities=["delta", "B"])


def test_pictures_say_what_they_show(model):
    import matplotlib.pyplot as plt

    with mp.attach(model) as probe:
        found = quiet(probe, quantities=["B", "C"])
        same = quiet(probe, RUNS[0], RUNS[0], quantities=["B"])
    assert np.isnan(same["recovered"]).all()
    axes = patching.plot(found)
    assert [ax.get_ylabel() for ax in axes] == ["B\nlayer", "C\nlayer"]
    assert "answer recovered (exact), mean over 2 rows" in axes[0].get_title("left")
    mean = found["recovered"].mean("batch")
    np.testing.assert_allclose(axes[1].images[0].get_array().filled(np.nan), mean.sel(quantity="C"))
    low, high = axes[0].images[0].get_clim()
    np.testing.assert_allclose([low, high], [-abs(mean).max(), abs(mean).max()])
    ax = patching.plot(found.isel(layer=[1]), row=1, token_text=[f"t{token}" for token in range(9)])
    assert [tick.get_text() for tick in ax.get_yticklabels()] == ["B", "C"]
    assert [tick.get_text() for tick in ax.get_xticklabels()][:2] == ["t0", "t1"]
    assert ax.get_title("left").endswith("row 1, layer 1")
    assert "no row in which" in patching.plot(same).get_title("left")
    one = plt.subplots()[1]
    assert patching.plot(found, "B", ax=one) is one
    for options, words in (
        ({"ax": one}, "place for one quantity; the result holds 2"),
        ({"quantity": "b"}, "unknown quantity 'b'"),
        ({"row": 2}, r"index, 0 \.\. 1; got 2"),
        ({"token_text": "abc"}, "each of the 9 tokens"),
    ):
        with pytest.raises(ValueError, match=words):
            patching.plot(found, **options)
    plt.close("all")
