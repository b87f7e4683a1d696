"""A span in a temporary file: the same bits as in memory, closed whatever happens, and no number without its disk."""

import errno
import os
import resource
import tempfile

import numpy as np
import pytest
import xarray as xr

from mamba_probe.analyses import wavelet_alignment
from mamba_probe.analyses.wavelet_alignment import basis, passes, span
from mamba_probe.analyses.wavelet_alignment.span import Span


@pytest.fixture
def files(monkeypatch):
    """Every temporary file that is made."""
    made, honest = [], tempfile.TemporaryFile
    monkeypatch.setattr(tempfile, "TemporaryFile", lambda **how: made.append(honest(**how)) or made[-1])
    return made


def filled(coefficient, most=None):
    found = Span(len(coefficient) if most is None else most, coefficient.shape[1])
    for start in range(0, len(coefficient), 3):
        found.add(coefficient[start : start + 3])
    return found


def trace(n_tokens=300, n_channels=9):
    generator = np.random.default_rng(0)
    delta = generator.uniform(0.001, 0.01, (2, 1, n_tokens, n_channels)).astype("float32")
    delta[:, :, :, 4] = 0.0
    B, C = generator.standard_normal((2, 2, 1, n_tokens, 1, 3)).astype("float32")
    place = ("layer", "batch", "token")
    return xr.Dataset(
        {"delta": ((*place, "channel"), delta),
         "A": (("layer", "channel", "state"), -generator.uniform(0.1, 3.0, (2, n_channels, 3)).astype("float32")),
         "B": ((*place, "group", "state"), B), "C": ((*place, "group", "state"), C)},
        {"layer": [0, 1], "valid": (("batch", "token"), np.ones((1, n_tokens), bool)),
         "position": (("batch", "token"), np.arange(n_tokens)[None])},
        {"schema_version": 1, "family": "mamba", "discretization": "euler"},
    )  # fmt: skip


@pytest.mark.parametrize("in_memory", [0, 8 * 16 - 1, 8 * 16])
def test_functions_are_those_that_were_added(in_memory, monkeypatch, files):
    monkeypatch.setattr(span, "IN_MEMORY", in_memory)
    coefficient = np.random.default_rng(0).standard_normal((7, 16))
    found = filled(coefficient, most=8)
    assert len(files) == (in_memory < 8 * 16)
    assert len(found) == 7
    for first, end in [(0, 16), (0, 1), (15, 16), (3, 11), (5, 5)]:
        assert found.functions(first, end).tobytes() == coefficient[:, first:end].tobytes()
    found.close()
    assert all(file.closed for file in files)


def test_kernels_that_do_not_lie_side_by_side(monkeypatch):
    monkeypatch.setattr(span, "IN_MEMORY", 0)
    coefficient = np.asfortranarray(np.random.default_rng(0).standard_normal((6, 8)))[::2]
    found = filled(coefficient)
    np.testing.assert_array_equal(found.functions(0, 8), coefficient)
    found.close()


@pytest.mark.parametrize("options", [{}, {"query_tokens": [40, 299]}, {"mode": "zero", "wavelet": "db2", "n_span": 4}])
def test_answers_are_the_same_to_the_bit(options, monkeypatch, files):
    whole = wavelet_alignment.measure(trace(), **options)
    assert not files
    monkeypatch.setattr(span, "IN_MEMORY", 0)
    xr.testing.assert_identical(wavelet_alignment.measure(trace(), **options), whole)
    assert len(files) == 2 * 2 * len(options.get("query_tokens", [0])), "layers, executed and null, queries"
    assert all(file.closed for file in files)


@pytest.mark.parametrize(("on_disk", "most"), [(1, 1), (32, 4)])
def test_spans_on_disk_share_a_pass(on_disk, most, monkeypatch, files):
    """Two queries, each as executed and as its null, of 9 kernels of 256 tokens: HELD is one of them in memory."""
    monkeypatch.setattr(span, "IN_MEMORY", 0)
    monkeypatch.setattr(passes, "HELD", 9 * 256)
    monkeypatch.setattr(passes, "ON_DISK", on_disk)
    open_at_once, add = [], passes.Query.add
    monkeypatch.setattr(
        passes.Query, "add",
        lambda self, kernel: (add(self, kernel), open_at_once.append(sum(not file.closed for file in files)))[0],
    )  # fmt: skip
    wavelet_alignment.measure(trace(), query_tokens=[260, 299])
    assert max(open_at_once) == most


@pytest.mark.parametrize("where", ["transform", "result"])
def test_files_are_closed_when_something_fails(where, monkeypatch, files):
    monkeypatch.setattr(span, "IN_MEMORY", 0)
    calls = []

    def failing(*_, **__):
        calls.append(None)
        if len(calls) > (5 if where == "transform" else 1):
            raise RuntimeError("stop here")
        return honest(*_, **__)

    owner, name = (basis.Basis, "transform") if where == "transform" else (passes.Query, "result")
    honest = getattr(owner, name)
    monkeypatch.setattr(owner, name, failing)
    with pytest.raises(RuntimeError, match="stop here") as caught:
        wavelet_alignment.measure(trace(), query_tokens=[260, 299])
    assert caught.tb, "whose frames still hold what was measured"
    assert files
    assert all(file.closed for file in files)


def test_a_full_disk_is_an_error(monkeypatch, files):
    """The operating system refuses to let a file grow beyond 4 KiB: it takes what still fits, then none."""
    monkeypatch.setattr(span, "IN_MEMORY", 0)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, before[1]))
    try:
        with pytest.raises(OSError, match=r"do not fit into a temporary file in .*smaller n_span.*TMPDIR") as caught:
            wavelet_alignment.measure(trace())
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert caught.value.errno == errno.EFBIG
    assert all(file.closed for file in files)


def test_a_file_that_lost_its_end_is_an_error(monkeypatch, files):
    monkeypatch.setattr(span, "IN_MEMORY", 0)
    found = filled(np.ones((4, 8)))
    files[0].truncate(8 * 8 * 3)
    with pytest.raises(OSError, match="kernel 3 of a span cannot be read back"):
        found.functions(0, 8)
    found.close()


def test_files_are_where_tmpdir_says(tmp_path, monkeypatch, files):
    monkeypatch.setattr(span, "IN_MEMORY", 0)
    monkeypatch.setattr(tempfile, "tempdir", None)  # what the process found before
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    found = filled(np.ones((4, 8)))
    assert os.readlink(f"/proc/self/fd/{files[0].fileno()}").startswith(f"{tmp_path}/")
    assert not list(tmp_path.iterdir()), "without a name"
    found.close()
