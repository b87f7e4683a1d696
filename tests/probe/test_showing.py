"""What a notebook shows: the facts of the text, parsed as HTML; no name in it becomes markup."""

from html.parser import HTMLParser

import numpy as np
import pytest
import torch
import xarray as xr

import mamba_probe as mp
from mamba_probe.trace.html import card

HOSTILE = '<script>alert("1")</script>&amp;\u202e\x1b[31m'
VOID = {"br", "hr", "img", "input", "link", "meta"}


class Page(HTMLParser):
    """The text of a page, its cells, its tags and attributes; every tag is closed in turn."""

    def __init__(self, text):
        super().__init__()
        self.open, self.tags, self.attributes, self.words, self.cells = [], set(), {}, [], []
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.tags.add(tag)
        self.attributes |= dict(attrs)
        if tag not in VOID:
            self.open.append(tag)
        if tag in ("td", "th"):
            self.cells.append("")

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.words.append(data)
        if self.open and self.open[-1] in ("td", "th"):
            self.cells[-1] += data

    @property
    def text(self):
        return " ".join("".join(self.words).split())


def assert_neutral(html):
    page = Page(html)
    assert page.tags <= {"div", "strong", "table", "thead", "tbody", "tr", "th", "td"}
    assert set(page.attributes) <= {"style"}
    assert "url" not in html
    colours = [part for part in page.attributes.get("style", "").split(";") if "color" in part or "background" in part]
    assert [part.split(":")[1].strip() for part in colours] in ([], ["none", "inherit"])
    return page


def test_a_probe_says_the_same_as_text_and_in_a_notebook(model, family):
    probe = mp.attach(model)
    expected = {"mamba": "mamba: 48 channels, state 8", "mamba2": "mamba2: 6 heads of 8, 2 group(s), state 8"}[family]
    name = {"mamba": "MambaForCausalLM", "mamba2": "Mamba2ForCausalLM"}[family]
    reason = probe.backend_reason
    assert repr(probe) == f"Probe attached to {name}, backend cpu ({reason})\n  2 layers 0..1: {expected}"
    page = assert_neutral(probe._repr_html_())
    assert page.cells == ["layers", "family and sizes", "2 layers 0..1", expected]
    assert f"Probe attached to {name}, backend cpu ({reason})" in page.text
    with probe.edit(mp.freeze("delta", layer=1)):
        assert repr(probe).endswith("\n  edits: freeze(delta, layer=1)")
        assert Page(probe._repr_html_()).text.endswith("edits: freeze(delta, layer=1)")
    probe.detach()
    assert "Probe detached from" in Page(probe._repr_html_()).text


def test_a_recorder_says_how_far_it_is(model):
    probe = mp.attach(model)
    with probe.recording(variables=["delta", "C"], layers=[1]) as recorder, torch.no_grad():
        assert repr(recorder) == "Recorder(delta, C of 1 layer(s); open, 0 call(s) so far)"
        model(torch.arange(8)[None])
        assert "open, 1 call(s) so far" in Page(recorder._repr_html_()).text
    assert repr(recorder) == "Recorder(delta, C of 1 layer(s); whole)"
    page = assert_neutral(recorder._repr_html_())
    assert "Recorder whole" in page.text
    assert page.cells[2:6] == ["variables", "delta, C", "layers", "1"]


def test_a_construction_says_what_it_claims():
    construction = mp.constructions.keep_nth(n_tokens=4, length=16, n=5)
    page = assert_neutral(construction._repr_html_())
    assert page.cells[2:6] == ["model", "6", "channel", "6"]
    assert repr(construction) == "Construction(keep_nth: MambaMixer, model=6, channel=6, state=1, rank=1, float32)"
    for line in construction.describe().split("\n"):
        assert " ".join(line.split()) in page.text


def test_a_trace_says_what_was_recorded(model):
    with mp.attach(model) as probe:
        ids = torch.arange(20)[None] % 61
        before = probe.record(ids)
        probe.parity(ids)
        trace = probe.record(ids, variables=["delta", "A"], layers=[1])
    page = assert_neutral(trace.probe._repr_html_())
    delta = trace["delta"]
    at = page.cells.index("delta")
    dims = ", ".join(f"{dim}: {size}" for dim, size in delta.sizes.items())
    assert page.cells[at : at + 5] == ["delta", dims, "float32", f"{delta.nbytes} B" if delta.nbytes < 1000 else
                                       f"{delta.nbytes / 1000:.3g} kB", delta.long_name]  # fmt: skip
    assert repr(trace.probe) in page.text
    assert "layers: 1" in page.text
    assert "token_id" in page.text
    assert f"parity error: {trace.attrs['parity_error']}" in page.text
    assert trace.attrs["parity_error"] < 1e-4
    assert "parity error: not measured" in Page(before.probe._repr_html_()).text
    assert "backend: cpu" in page.text
    assert trace.attrs["model_hash"] in page.text


def test_a_lazy_trace_is_not_read_to_be_shown(tmp_path, model, monkeypatch):
    with mp.attach(model) as probe:
        probe.record(torch.arange(20)[None], store=tmp_path / "run.zarr")
    trace = mp.open_trace(tmp_path / "run.zarr")
    monkeypatch.setattr("dask.array.Array.compute", lambda *_, **__: pytest.fail("read"))
    monkeypatch.setattr("dask.array.Array.__array__", lambda *_, **__: pytest.fail("read"))
    assert "delta" in Page(trace.probe._repr_html_()).cells


def test_no_name_becomes_markup():
    array = xr.DataArray(np.zeros(2), dims=f"{HOSTILE}3", attrs={"long_name": HOSTILE})
    attrs = {"schema_version": 1, "family": "mamba", "model": HOSTILE, "edits": HOSTILE}
    trace = xr.Dataset({HOSTILE: array}, {f"{HOSTILE}2": (f"{HOSTILE}3", [1, 2]), "layer": [HOSTILE]}, attrs)
    html = trace.probe._repr_html_()
    page = assert_neutral(html)
    shown = '<script>alert("1")</script>&amp;\\u202e\\x1b[31m'
    assert page.cells.count(shown) == 2
    assert f"model: {shown}" in page.text
    assert f"layers: {shown}" in page.text
    assert "\u202e" not in html
    assert "\x1b" not in html


def test_a_hostile_class_is_a_name(model):
    hostile = type(HOSTILE, (type(model),), {})
    model.__class__ = hostile
    with mp.attach(model) as probe:
        page = assert_neutral(probe._repr_html_())
    assert "<script>" in page.text


def test_a_card_without_rows_has_no_table():
    assert Page(card("head of it", ["a"], [])).tags == {"div", "strong"}
