"""What `record` and `recording` take, keep and refuse."""

import copy

import numpy as np
import pytest
import torch
import xarray as xr

import mamba_probe as mp
from mamba_probe.trace import validate
from mamba_probe.trace.schema import DIMS, VARIABLES

IDS = torch.randint(1, 61, (3, 21), generator=torch.Generator().manual_seed(5))


@pytest.fixture
def probe(model):
    with mp.attach(model) as probe:
        yield probe


def test_a_single_name_is_shown_as_the_list_that_it_should_be(probe):
    with pytest.raises(ValueError, match=r"variables is a list of names; got 'delta': pass variables=\['delta'\]"):
        probe.record(IDS, variables="delta")


def test_the_trace_keeps_the_schema(probe, model):
    trace = probe.record(IDS, variables=tuple(VARIABLES))
    family = trace.attrs["family"]
    assert set(trace.data_vars) == set(VARIABLES)
    for name, spec in VARIABLES.items():
        assert trace[name].dims == spec.dims(family)
        assert set(trace[name].dims) <= set(DIMS)
        assert trace[name].dtype == spec.dtype
        assert {"long_name", "units", "symbol"} <= set(trace[name].attrs)
    assert set(probe.record(IDS).data_vars) == {"delta", "A", "B", "C"}
    for attribute in (
        "schema_version",
        "discretization",
        "model",
        "model_hash",
        "dtype",
        "backend",
        "versions",
        "created_at",
    ):
        assert trace.attrs[attribute], attribute
    assert model.config.model_type == family


def test_the_hash_follows_the_weights(probe, model):
    before = probe.record(IDS).attrs["model_hash"]
    with torch.no_grad():
        model.backbone.layers[0].mixer.D[0] += 1
    assert probe.record(IDS).attrs["model_hash"] != before


def test_selection_is_a_slice_of_the_whole(probe):
    names = tuple(VARIABLES)
    whole = probe.record(IDS, variables=names)
    head = "channel" if whole.attrs["family"] == "mamba" else "head"
    part = probe.record(IDS, variables=names, layers=[1], tokens=[3, 4, 9], channels=[5, 2])
    expected = whole.sel(layer=[1], token=[3, 4, 9], **{head: [2, 5]})
    assert part[head].values.tolist() == [2, 5]
    for name in (*names, "token_id", "position", "prediction"):
        np.testing.assert_allclose(part[name], expected[name], rtol=1e-6)
    np.testing.assert_allclose(part.probe.B_bar, expected.probe.B_bar, rtol=1e-6)
    gapped = probe.record(IDS, variables=["delta"], tokens=[0, 5])
    assert "delta_cumsum" in gapped
    assert "delta_cumsum" not in probe.record(IDS, variables=["delta"], tokens=[4, 5])


def test_batches_and_rows_of_unequal_length(probe):
    whole, pieces = probe.record(IDS), probe.record(IDS, batch_size=2)
    assert pieces["call"].values.tolist() == [0, 0, 1]
    np.testing.assert_allclose(pieces["delta"], whole["delta"], rtol=1e-5)
    with probe.recording(variables=["delta"]) as recorder, torch.no_grad():
        probe.model(IDS[:2, :5])
        probe.model(IDS[2:])
    trace = recorder.dataset
    assert trace["valid"].sum("token").values.tolist() == [5, 5, 21]
    assert np.isnan(trace["delta"].values[:, :2, 5:]).all()
    assert np.isfinite(trace["delta"].values[:, 2]).all()
    assert trace["token_id"].values[0, 5:].tolist() == [-1] * 16


def test_task_text_dict_and_hidden_states(probe, model):
    task = mp.tasks.mqar(batch=2, length=16, n_pairs=3, vocab=60, seed=1)
    trace = probe.record(task)
    assert (trace["role"].values == task.role).all()
    assert (trace["target"].values == task.target).all()
    assert trace.attrs["task"] == "mqar"
    with torch.no_grad():
        answers = model(torch.tensor(task.input_ids)).logits.argmax(-1).numpy()
    assert (trace["prediction"].values == answers).all()
    assert probe.record({"input_ids": IDS}).sizes["token"] == 21
    embedded = model.get_input_embeddings()(IDS).detach()
    same = probe.record({"inputs_embeds": embedded})
    np.testing.assert_allclose(same["delta"], probe.record(IDS)["delta"], rtol=1e-6)

    text = probe.record(text=["a bc", "abcde"], tokenizer=Letters())
    assert text["token_text"].values.tolist() == [["a", " ", "b", "c", ""], list("abcde")]
    assert text["valid"].values.tolist() == [[True] * 4 + [False], [True] * 5]


class Letters:
    """A tokenizer of single letters, as transformers' are called."""

    def __call__(self, text):
        return {"input_ids": [ord(c) % 61 for c in text]}

    def convert_ids_to_tokens(self, ids):
        return [next(c for c in "abcde " if ord(c) % 61 == i) for i in ids]


def test_store_and_partial_results(probe, tmp_path, model):
    trace = probe.record(IDS, store=tmp_path / "run.zarr").load()
    xr.testing.assert_identical(mp.open_trace(tmp_path / "run.zarr").load(), trace)
    with pytest.raises(ValueError, match=r"run.zarr exists.*overwrite"):
        probe.record(IDS, store=tmp_path / "run.zarr")
    lazy = mp.open_trace(tmp_path / "run.zarr")
    shorter = probe.record(IDS[:1], store=tmp_path / "run.zarr", overwrite=True)
    with pytest.raises(ValueError, match="was replaced or removed since it was opened"):
        lazy["delta"].load()
    xr.testing.assert_identical(mp.open_trace(tmp_path / "run.zarr").load(), shorter)
    calls = []

    def fail_third(*_args):
        calls.append(1)
        if len(calls) == 3:
            raise RuntimeError("planned")

    handle = model.backbone.layers[1].register_forward_pre_hook(fail_third)
    with pytest.raises(RuntimeError, match="planned"):
        probe.record(IDS, batch_size=1, store=tmp_path / "broken.nc")
    handle.remove()
    kept = mp.open_trace(tmp_path / "broken.nc")
    assert kept.sizes["batch"] == 2
    np.testing.assert_allclose(kept["delta"], trace["delta"].isel(batch=slice(2)), rtol=1e-5)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"inputs": np.zeros((1, 0), int)}, r"empty sequence: got 1 row\(s\) of 0 token"),
        ({"inputs": np.zeros((0, 4), int)}, r"empty sequence: got 0 row"),
        ({"inputs": [[1, 61]]}, r"token id 61 at row 0, token 1 is out of range: this model knows 0..60"),
        ({"inputs": [[-1, 3]]}, r"token id -1"),
        ({"inputs": [1, 2, 3]}, r"needs dims \(batch, token\); got shape \(3,\).*ids\[None\]"),
        ({"inputs": [[1, 2], [3]]}, r"no rectangular array"),
        ({"inputs": [[True]]}, r"boolean"),
        ({"inputs": [[1, 2]], "attention_mask": [[1, 1, 1]]}, r"mask needs the shape.*\(1, 2\); got \(1, 3\)"),
        ({"inputs": [[1, 2]], "attention_mask": [[1, 2]]}, r"1 at tokens and 0 at padding"),
        ({"inputs": [[1, 2]], "attention_mask": [[0, 0]]}, r"masks every token of row 0"),
        ({"inputs": [[1]], "text": ["a"]}, r"not both"),
        ({"inputs": "hello"}, r"pass strings as text="),
        ({"inputs": np.ones((1, 4), np.float32)}, r"Token ids are integers"),
        ({}, r"pass either inputs"),
        ({"text": ["a"]}, r"mp.load_tokenizer"),
        ({"text": "a", "tokenizer": Letters()}, r"list of strings"),
        ({"text": ["a", ""], "tokenizer": Letters()}, r"text 1 has no tokens"),
        ({"inputs": {"labels": [[1]]}}, r"needs input_ids"),
        ({"inputs": np.full((1, 2, 24), np.nan, np.float32)}, r"NaN or infinity at row 0, token 0"),
        ({"inputs": np.zeros((1, 2, 7), np.float32)}, r"model = 24\); got shape \(1, 2, 7\)"),
        ({"inputs": [[1]], "variables": ["delt"]}, r"unknown variable 'delt': did you mean 'delta'"),
        ({"inputs": [[1]], "variables": "delta"}, r"list of names"),
        ({"inputs": [[1]], "layers": [2]}, r"unknown layer 2: nearest are \[1, 0\]"),
        ({"inputs": [[1]], "layers": []}, r"layers is empty"),
        ({"inputs": [[1]], "channels": [99]}, r"unknown channel 99: expected 0..\d+"),
        ({"inputs": [[1]], "tokens": [1]}, r"unknown token 1: expected 0..0"),
        ({"inputs": [[1]], "batch_size": 0}, r"batch_size is at least 1"),
        ({"inputs": [[1]], "store": "run.parquet"}, r"ends in one of"),
    ],
)  # fmt: skip
def test_wrong_input_is_answered(probe, arguments, message):
    with pytest.raises(ValueError, match=message):
        probe.record(**arguments)


def test_non_finite_recordings_name_layer_token_and_variable(probe, model):
    with torch.no_grad():
        model.backbone.layers[1].norm.weight[0] = float("inf")
    with pytest.raises(ValueError, match=r"of layer 1 is NaN or infinite at token 0 of row 0"):
        probe.record(IDS)
    with pytest.raises(ValueError, match=r"nothing recorded yet"), probe.recording() as recorder:
        recorder.dataset  # noqa: B018


def test_non_finite_logits_and_parity_are_refused(probe, model):
    with torch.no_grad():
        model.backbone.norm_f.weight[3] = float("inf")
    with pytest.raises(ValueError, match=r"logits are NaN or infinite at token 0 of row 0"):
        probe.record(IDS)
    with torch.no_grad():
        model.backbone.layers[1].mixer.out_proj.weight.mul_(1e38)
    with pytest.raises(ValueError, match=r"parity cannot be measured.*out_vs_native of layer 1"):
        probe.parity(IDS)


@pytest.mark.parametrize("kept", [0, 2, torch.tensor([0, 3, 5]), torch.tensor([4])])
def test_predictions_stand_where_their_logits_were_kept(probe, model, kept):
    full = probe.record(IDS)["prediction"].values
    with torch.no_grad(), probe.recording(variables=["delta"]) as recorder:
        model(IDS, logits_to_keep=kept)
    found = recorder.dataset["prediction"].values
    expected = np.full_like(full, -1)
    where = kept.numpy() if isinstance(kept, torch.Tensor) else slice(-kept if kept else None, None)
    expected[:, where] = full[:, where]
    np.testing.assert_array_equal(found, expected)


def test_a_failed_call_leaves_no_ids_behind(probe, model):
    outcomes = iter([RuntimeError("planned"), None])
    handle = model.backbone.layers[1].register_forward_pre_hook(lambda *_: _raise(next(outcomes)))
    with torch.no_grad(), probe.recording(variables=["delta"]) as recorder:
        with pytest.raises(RuntimeError, match="planned"):
            model(IDS)
        model.backbone(IDS.flip(1))
    handle.remove()
    assert "token_id" not in recorder.dataset.coords
    assert recorder.dataset.sizes["batch"] == 3
    assert "whole" in repr(recorder)


def _raise(error):
    if error is not None:
        raise error


def test_continuing_a_cached_sequence_by_several_tokens(probe, model):
    """transformers keeps Mamba-2's state and drops Mamba-1's: the first is one sequence, the second is none."""
    with torch.no_grad(), probe.recording(variables=["h"]) as recorder:
        cache = model(IDS[:, :8], use_cache=True).cache_params
        if model.config.model_type == "mamba":
            with pytest.raises(ValueError, match=r"continues a cached sequence by 13 tokens.*drops"):
                model(IDS[:, 8:], cache_params=cache)
        else:
            model(IDS[:, 8:], cache_params=cache)
    length = 8 if model.config.model_type == "mamba" else 21
    assert recorder.dataset.sizes["token"] == length
    whole = probe.record(IDS, variables=["h"]).isel(token=slice(length))
    np.testing.assert_allclose(recorder.dataset["h"], whole["h"], rtol=1e-4, atol=1e-5)


def test_a_sequence_whose_beginning_was_not_recorded_is_refused(probe, model):
    with torch.no_grad():
        cache = model(IDS[:, :8], use_cache=True).cache_params
        with probe.recording(), pytest.raises(ValueError, match=r"whose beginning was not recorded"):
            model(IDS[:, 8:9], cache_params=cache)


def test_a_lost_or_copied_probe_can_be_taken_off(model):
    with torch.no_grad():
        native = model(IDS).logits
    mp.attach(model)
    copied = copy.deepcopy(model)
    for one in (model, copied):
        with pytest.raises(ValueError, match=r"mp.detach\(model\)"):
            mp.attach(one)
        mp.detach(one)
        with torch.no_grad():
            assert torch.equal(one(IDS).logits, native)
        assert not [m for m in one.modules() if m._forward_pre_hooks]
    with mp.attach(copied) as probe:
        assert probe.attached
    first = mp.attach(model)
    mp.detach(model)
    with mp.attach(model) as second:
        first.detach()
        assert (first.attached, second.attached) == (False, True), "a probe takes off no other"


def test_a_plain_netcdf_takes_a_trace_too(probe, tmp_path):
    probe.parity(IDS[:1])
    trace = probe.record(IDS)
    assert trace.attrs["parity_error"] <= 2e-6
    trace.to_netcdf(tmp_path / "plain.nc", engine="h5netcdf")


def test_padding_may_hold_anything(probe, model):
    mask = torch.ones_like(IDS)
    mask[1, :6] = 0
    trace = probe.record(IDS, mask)
    other = IDS.clone()
    other[1, :6] = 7
    np.testing.assert_allclose(probe.record(other, mask)["B"], trace["B"], rtol=1e-6)


def test_attach_errors(model):
    with mp.attach(model), pytest.raises(ValueError, match=r"a probe is attached. Detach it"):
        mp.attach(model)
    with pytest.raises(ValueError, match=r"Linear has no state-space layer to probe. Supported: MambaMixer"):
        mp.attach(torch.nn.Linear(2, 2))
    with pytest.raises(ValueError, match=r"live torch module; got str: load it with mp.load"):
        mp.attach("state-spaces/mamba-130m")
    with pytest.raises(ValueError, match=r'backend "triton" needs CUDA tensors'):
        mp.attach(model, backend="triton")
    with pytest.raises(ValueError, match=r"unknown backend 'cuda'"):
        mp.attach(model, backend="cuda")
    with pytest.raises(ValueError, match=r"share a layer number"):
        mp.attach(torch.nn.ModuleList([model, type(model)(model.config)]))
    with torch.no_grad():
        model.backbone.layers[1].mixer.D[0] = float("nan")
    with pytest.raises(ValueError, match=r"layer 1: weight D holds 1 NaN or infinite"):
        mp.attach(model)
    model.backbone.layers[1].mixer.to("meta")
    with pytest.raises(ValueError, match=r"layer 1: .* is on the meta device"):
        mp.attach(model)


def test_unsupported_families_are_named():
    simple = type("Mamba2Simple", (torch.nn.Module,), {"__module__": "mamba_ssm.modules.mamba2_simple"})
    with pytest.raises(ValueError, match=r"unsupported mixer family: Mamba2Simple \(mamba_ssm.*Supported: MambaMixer"):
        mp.attach(simple())
    mamba3 = type("Mamba3", (torch.nn.Module,), {"__module__": "mamba_ssm.modules.mamba3"})
    with pytest.raises(ValueError, match=r"unsupported mixer family: Mamba3"):
        mp.attach(mamba3())
    mine = type("MyMamba3", (torch.nn.Module,), {})
    with pytest.raises(ValueError, match=r"unsupported mixer family: MyMamba3"):
        mp.attach(torch.nn.Sequential(mine()))
    foreign = torch.nn.Linear(2, 2)
    foreign.A_log = torch.nn.Parameter(torch.zeros(2))
    with pytest.raises(ValueError, match=r"unsupported mixer family: Linear"):
        mp.attach(torch.nn.Sequential(foreign))


def test_layers_of_different_sizes_are_listed(build):
    model, other = build(), build(state_size=4)
    model.backbone.layers[1] = other.backbone.layers[1]
    with mp.attach(model) as probe:
        assert len(probe.groups) == 2
        with pytest.raises(ValueError, match=r"different sizes.*layers \[0\]: .*state 8; layers \[1\]: .*state 4"):
            probe.record(IDS)
        with pytest.raises(ValueError, match=r"different sizes"):
            probe.weights()
        assert probe.record(IDS, layers=[1])["layer"].values.tolist() == [1]


def test_nested_recordings_are_refused(probe):
    with probe.recording(), pytest.raises(ValueError, match=r"already open"):
        probe.record(IDS)


def test_repr_reads_well(probe, model):
    text = repr(probe)
    assert f"attached to {type(model).__name__}, backend cpu" in text
    assert "2 layers 0..1: mamba" in text
    probe.detach()
    probe.detach()
    assert "detached from" in repr(probe)
    with pytest.raises(ValueError, match="detached"):
        probe.record(IDS)


def test_weights_are_the_modules_own(probe, model):
    weights = probe.weights()
    with pytest.raises(ValueError, match="holds weights, not a trace"):
        validate(weights)
    mixer = model.backbone.layers[1].mixer
    one = weights.sel(layer=1)
    key = "conv" if weights.attrs["family"] == "mamba" else "conv_x"
    np.testing.assert_array_equal(
        one[key].isel(lag=0).values.ravel(), mixer.conv1d.weight[: mixer.intermediate_size, 0, -1].detach()
    )
    np.testing.assert_array_equal(one["out_proj"].values.reshape(24, -1), mixer.out_proj.weight.detach())
    np.testing.assert_array_equal(weights["unembedding"], model.lm_head.weight.detach())
    stacked = np.concatenate([one[name].values.reshape(-1, 24) for name in _in_proj(weights)])
    np.testing.assert_array_equal(stacked, mixer.in_proj.weight.detach())


def _in_proj(weights):
    if weights.attrs["family"] == "mamba":
        return ("in_proj_x", "in_proj_z")
    return ("in_proj_z", "in_proj_x", "in_proj_B", "in_proj_C", "in_proj_dt")


def test_a_recorded_layer_that_does_not_run_is_named(model):
    ids = torch.randint(1, 61, (2, 9), generator=torch.Generator().manual_seed(1))
    with mp.attach(model) as probe:
        probe.record(ids)
        model.backbone.layers[1].forward = lambda hidden_states, *args, **kwargs: hidden_states
        with pytest.raises(ValueError, match=r"layer\(s\) 1 did not run in this call of the model"):
            probe.record(ids)
        assert probe.record(ids, layers=[0]).sizes["layer"] == 1


def test_a_model_that_calls_token_ids_otherwise_is_told_how_they_are_called():
    class Model(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.embedding, self.mixer = torch.nn.Embedding(11, 8), mp.blocks.MambaBlock(8, d_state=4)

        def forward(self, ids):
            return self.mixer(self.embedding(ids))

    with (
        mp.attach(Model()) as probe,
        pytest.raises(ValueError, match=r"Model.forward has no argument `input_ids`, .*; it has ids: call that of"),
    ):
        probe.record(torch.zeros(2, 3, dtype=torch.int64))
