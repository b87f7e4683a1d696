"""A streamed record is the in-memory record bit for bit, lies in the chunks that were said, and is read lazily."""

import math

import numpy as np
import pytest
import recorded
import torch
import xarray as xr
from recorded import IDS, MASK

import mamba_probe as mp
from mamba_probe.trace.schema import VARIABLES

LEFT = torch.ones_like(IDS)
LEFT[0, :5], LEFT[7, :12] = 0, 0
ALL = tuple(VARIABLES)
NO_SUM = tuple(name for name in ALL if name != "delta_cumsum")


def assert_same(streamed, held):
    """All variables, coordinates and attributes, but when it was made and the store's own."""
    own = ("created_at", "recording")
    a, b = (each.load().copy() for each in (streamed, held))
    for each in (a, b):
        each.attrs = {name: value for name, value in each.attrs.items() if name not in own}
    xr.testing.assert_identical(a, b)
    assert list(a.data_vars) == list(b.data_vars)
    for name in b.variables:
        assert a[name].dtype == b[name].dtype, name
        if b[name].dtype.kind in "fc":
            assert np.ascontiguousarray(a[name]).tobytes() == np.ascontiguousarray(b[name]).tobytes(), name


CELLS = {
    "mamba1": ("mamba1", torch.float32, {"variables": ALL, "batch_size": 4}, MASK),
    "mamba2": ("mamba2", torch.float32, {"variables": ALL, "batch_size": 3, "layers": [1]}, LEFT),
    "s4d": ("s4d", torch.float32, {"variables": NO_SUM, "batch_size": 5, "channels": [6, 1, 2]}, MASK),
    "float64": ("mamba1", torch.float64, {"variables": ALL, "batch_size": 1}, LEFT),
    "s4d float64": ("s4d", torch.float64, {"variables": ("A", "h", "y"), "batch_size": 4}, MASK),
    "bf16": ("mamba1", torch.bfloat16, {"variables": ALL, "batch_size": 8, "tokens": [0, 4, 5, 12]}, MASK),
    "one block": ("mamba2", torch.bfloat16, {"variables": ALL, "batch_size": None}, None),
    "constants": ("mamba1", torch.float32, {"variables": ("A",), "batch_size": 4}, None),
}  # fmt: skip


@pytest.mark.parametrize("cell", CELLS)
def test_streamed_is_held_bit_for_bit(tmp_path, cell):
    kind, dtype, options, mask = CELLS[cell]
    with mp.attach(recorded.model(kind, dtype=dtype)) as probe:
        held = probe.record(IDS, mask, **options)
        assert_same(probe.record(IDS, mask, store=tmp_path / "run.zarr", **options), held)
        one = {**options, "batch_size": 1}
        row = probe.record(IDS[:1], None, store=tmp_path / "row.zarr", **one)
        assert_same(row, probe.record(IDS[:1], None, **one))
    assert mp.verify(tmp_path / "run.zarr").whole


def test_a_task_its_labels_and_hidden_states(tmp_path):
    task = mp.tasks.mqar(batch=5, length=16, n_pairs=2, vocab=40, seed=1)
    with mp.attach(recorded.model()) as probe:
        streamed = probe.record(task, batch_size=2, store=tmp_path / "task.zarr")
        assert_same(streamed, probe.record(task, batch_size=2))
        assert {"role", "target", "source_token"} <= set(streamed.coords)
        other = mp.tasks.mqar(batch=5, length=16, n_pairs=2, vocab=40, seed=1)
        other.target[other.target >= 0] = 3
        with pytest.raises(ValueError, match=r"holds another recording.*labels: "):
            probe.record(other, batch_size=2, store=tmp_path / "task.zarr", resume=True)
    hidden = torch.randn(5, 7, 8, generator=torch.Generator().manual_seed(2))
    with mp.attach(mp.blocks.MambaBlock(8, d_state=4)) as probe:
        streamed = probe.record(hidden, batch_size=2, store=tmp_path / "hidden.zarr")
        assert_same(streamed, probe.record(hidden, batch_size=2))
        assert "token_id" not in streamed.coords


class Letters:
    """A tokenizer of single letters, as transformers' are called."""

    def __call__(self, text):
        return {"input_ids": [ord(letter) % 40 for letter in text]}

    def convert_ids_to_tokens(self, ids):
        return [next(letter for letter in "abcdeπ " if ord(letter) % 40 == i) for i in ids]


def test_text_with_a_tokenizer(tmp_path):
    options = {"text": ["a bc", "abcde", "π", "e"], "tokenizer": Letters(), "batch_size": 3}
    with mp.attach(recorded.model()) as probe:
        assert_same(probe.record(store=tmp_path / "text.zarr", **options), probe.record(**options))


def test_opening_reads_coordinates_alone_and_chunks_are_one_layer_of_one_block(tmp_path, monkeypatch):
    with mp.attach(recorded.model()) as probe:
        recorded.record(probe, tmp_path / "run.zarr")
    (tmp_path / "run.zarr" / "delta" / "c" / "0" / "0" / "0" / "0").unlink()
    trace = mp.open_trace(tmp_path / "run.zarr")
    assert trace["delta"].data.chunksize == (1, 4, 13, 16)
    trace["delta"][1, :4].load()
    with pytest.raises(ValueError, match="chunk delta/c/0/0/0/0 is missing"):
        trace["delta"][0, :1].load()
    monkeypatch.setattr("mamba_probe.trace.stream.CHUNK", 4 * 16 * 4 * 3)
    with mp.attach(recorded.model()) as probe:
        small = recorded.record(probe, tmp_path / "small.zarr")
        assert small["delta"].data.chunksize == (1, 4, 3, 16)
        assert_same(small, recorded.record(probe, None))


@pytest.mark.parametrize("compress", ["zstd", "lz4"])
def test_compression_loses_nothing(tmp_path, compress):
    with mp.attach(recorded.model("s4d")) as probe:
        options = {"variables": ("A", "h", "delta"), "batch_size": 4, "store": tmp_path / "run.zarr"}
        trace = probe.record(IDS, MASK, compress=compress, **options)
        assert_same(trace, probe.record(IDS, MASK, **{**options, "store": None}))


@pytest.mark.parametrize("compress", [None, pytest.param("zstd", marks=pytest.mark.long)])
def test_calls_as_they_come_grow_a_store(tmp_path, compress):
    with mp.attach(recorded.model("mamba2")) as probe:
        with probe.recording(variables=ALL) as held:
            calls(probe)
        with probe.recording(variables=ALL, store=tmp_path / "run.zarr", compress=compress) as streamed:
            calls(probe)
        assert_same(streamed.dataset, held.dataset)
    assert mp.verify(tmp_path / "run.zarr").whole


def calls(probe):
    with torch.no_grad():
        for rows, length in ((2, 3), (1, 13), (4, 2), (2, 150)):
            probe.model(IDS[:rows].repeat(1, 12)[:, :length])


@pytest.mark.parametrize("how", [{"do_sample": False}, {"num_beams": 3, "num_return_sequences": 2}])
def test_generate_grows_a_store(tmp_path, how, family, model):
    ids, mask = torch.randint(1, 61, (2, 5), generator=torch.Generator().manual_seed(4)), torch.ones(2, 5).long()
    mask[0, :2] = 0

    def drawn():
        for length in (4, 9):
            model.generate(ids, attention_mask=mask, max_new_tokens=length, pad_token_id=0, eos_token_id=[7, 8], **how)

    with mp.attach(model) as probe:
        with probe.recording(variables=("delta", "B", "h")) as held:
            drawn()
        with probe.recording(variables=("delta", "B", "h"), store=tmp_path / "run.zarr") as streamed:
            drawn()
    assert_same(streamed.dataset, held.dataset)


def test_narrowing_says_its_error_over_blocks_and_after_a_resume(tmp_path):
    """Against brute force over the valid entries; a value that float16 does not reach is refused."""
    options = {"variables": ("delta", "B", "x"), "batch_size": 2, "narrow": {"B": "float16", "x": "float16"}}
    with mp.attach(recorded.model()) as probe:
        held = recorded.record(probe, None, **{**options, "narrow": None})
        for path in (tmp_path / "once.zarr", tmp_path / "twice.zarr"):
            if path.stem == "twice":
                with pytest.raises(RuntimeError, match="planned"):
                    fail_at_call(probe, 4, lambda path=path: recorded.record(probe, path, **options))
            trace = recorded.record(probe, path, resume=True, **options).load()
            for name in ("B", "x"):
                true = held[name].values[:, MASK.bool().numpy()].astype(np.float64)
                apart = np.abs(true.astype(np.float16).astype(np.float64) - true)
                root = math.sqrt((apart**2).sum() / (true**2).sum())
                assert trace[name].attrs["narrowing_error"] == apart.max() / np.abs(true).max() > 0
                assert trace[name].attrs["narrowing_error_rms"] == pytest.approx(root, rel=1e-12)
                assert trace[name].dtype == np.float32
                stored = held[name].values.astype(np.float16).astype(np.float32)
                np.testing.assert_array_equal(trace[name].values, stored)
            xr.testing.assert_equal(trace["delta"], held["delta"])
        with torch.no_grad():
            probe.model.backbone.layers[0].mixer.x_proj.weight *= 1e6
        with pytest.raises(ValueError, match=r"`B` reaches .*e\+0[0-9], and float16 ends at 6.55e\+04"):
            recorded.record(probe, tmp_path / "large.zarr", **options)
        for narrow, message in (({"delt": "float16"}, "variable to narrow 'delt'"), ({"B": "int8"}, "dtype 'int8'"),
({"delta_cumsum": "float16"}, "to narrow 'delta_cumsum'"), ("B", "narrow is")):  # fmt: skip
            with pytest.raises(ValueError, match=message):
                recorded.record(probe, tmp_path / "x.zarr", variables=("B", "delta_cumsum"), narrow=narrow)


def fail_at_call(probe, number, action):
    """Run `action`, whose `number`-th model call raises, as a lost device does."""
    count = iter(range(1, 1000))

    def hook(*_given):
        if next(count) == number:
            raise RuntimeError("CUDA error: planned")

    handle = probe.model.backbone.layers[1].register_forward_pre_hook(hook)
    try:
        action()
    finally:
        handle.remove()
