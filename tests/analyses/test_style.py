"""One style for every picture, in matplotlib's own style files; what a user sets wins."""

import ast
import io
from pathlib import Path

import matplotlib as mpl
import matplotlib.pyplot as plt
import numpy as np
import pytest
import xarray as xr

from mamba_probe.analyses import lti_limits, memory_horizon
from mamba_probe.analyses.common import style

STYLES = ("house", "column", "page")
SIZES = {"figure.figsize", "font.size", "savefig.dpi", "axes.linewidth"}
PLOTS = sorted((Path(__file__).parents[2] / "analyses").glob("*/*.py"))


@pytest.fixture(autouse=True)
def plain():
    with mpl.rc_context():
        mpl.rcdefaults()
        plt.switch_backend("agg")
        yield
        plt.close("all")


@pytest.fixture(scope="module")
def horizon():
    rng = np.random.default_rng(0)
    shape, dims = (2, 3, 24, 4), ("layer", "batch", "token", "channel")
    trace = xr.Dataset(
        {
            "delta": (dims, rng.uniform(0.05, 0.5, shape).astype("f4")),
            "A": (("layer", "channel", "state"), -np.ones((2, 4, 3), "f4")),
        },
        coords={
            "layer": [0, 1],
            "valid": (("batch", "token"), np.ones((3, 24), bool)),
            "position": (("batch", "token"), np.tile(np.arange(24), (3, 1))),
        },
        attrs={
            "schema_version": 1,
            "family": "mamba",
            "discretization": "euler",
            "model": "a model of a long name " * 5,
        },
    )
    return memory_horizon.measure(trace)


def rc_of(name):
    with plt.style.context(f"mamba_probe.{name}"):
        return dict(mpl.rcParams)


def test_the_styles_differ_in_sizes_alone():
    house, column, page = (rc_of(name) for name in STYLES)
    assert column["figure.figsize"] == [3.25, 2.6]
    assert page["figure.figsize"][0] == 6.75
    for other in (column, page):
        differs = {key for key in house if house[key] != other[key]}
        assert {
            key for key in differs if key not in SIZES and not key.startswith(("lines.", "xtick.", "ytick."))
        } == set()
    assert {key for key in column if column[key] != page[key]} == {"figure.figsize"}


def test_a_plot_is_in_the_house_style_where_none_is_chosen(horizon):
    ax = memory_horizon.plot(horizon)
    assert tuple(ax.figure.get_size_inches()) == (7.0, 4.0)
    assert not ax.spines["top"].get_visible()
    assert not ax.get_legend().get_frame_on()
    assert plt.rcParams["figure.figsize"] == [6.4, 4.8], "and changes nothing outside"
    assert plt.rcParams["axes.spines.top"]


CHOSEN = {
    "figure.figsize": (5.0, 3.0),
    "font.size": 13.0,
    "legend.fontsize": 5.0,
    "legend.frameon": True,
    "axes.titlelocation": "right",
    "axes.titlesize": 17.0,
}


@pytest.mark.parametrize("how", ["rc_context", "rcParams", "style.use"])
def test_what_a_user_sets_wins(horizon, how):
    chosen = {key: value for key, value in CHOSEN.items() if key != "legend.frameon"}
    if how == "style.use":
        plt.style.use(chosen)
    elif how == "rcParams":
        plt.rcParams.update(chosen)
    with plt.rc_context(chosen if how == "rc_context" else {}):
        ax = lti_limits.plot(lti_limits.measure(np.repeat([1.0, 0.0], 32)[None], n_states=(4, 8)))
        style.title(ax, "A title")
    assert tuple(ax.figure.get_size_inches()) == (5.0, 3.0)
    assert ax.get_legend().get_texts()[0].get_fontsize() == 5.0
    assert ax.get_title("right") == "A title"
    assert ax.title.get_text() == "" == ax.get_title("left")
    assert ax._right_title.get_fontsize() == 17.0
    assert ax.xaxis.label.get_fontsize() == 13.0
    assert not ax.spines["top"].get_visible()


def test_a_style_sheet_of_another_wins(horizon):
    with plt.style.context("classic"):
        ax = memory_horizon.plot(horizon)
        assert list(ax.figure.get_size_inches()) == plt.rcParams["figure.figsize"]
    assert ax.get_legend().get_texts()[0].get_fontsize() == pytest.approx(14.4)


def test_lines_and_marks_grow_with_rc(horizon):
    thin, left = memory_horizon.plot(horizon), plt.subplots()[1]
    own = left.plot([0, 1], [1, 1], lw=0.5)[0]
    with plt.rc_context({"lines.linewidth": 4.5, "lines.markersize": 3.0}):
        thick = memory_horizon.plot(horizon, left)
    widths = [[line.get_linewidth()[0] for line in ax.collections] for ax in (thin, thick)]
    assert np.allclose(np.multiply(widths[0], 3.0), widths[1])
    sizes = [[line.get_markersize() for line in ax.lines if line is not own] for ax in (thin, thick)]
    assert np.allclose(np.divide(sizes[0], 2.0), sizes[1])
    marks = [[handle.get_markersize() for handle in ax.get_legend().legend_handles] for ax in (thin, thick)]
    assert np.allclose(np.divide(marks[0], 2.0), marks[1])
    assert own.get_linewidth() == 0.5, "what was there before is left alone"


@pytest.mark.parametrize("name", STYLES)
def test_text_is_saved_as_text(horizon, name):
    with plt.style.context(f"mamba_probe.{name}"):
        ax = memory_horizon.plot(horizon)
        svg, pdf = io.BytesIO(), io.BytesIO()
        ax.figure.savefig(svg, format="svg", metadata={"Date": None})
        ax.figure.savefig(pdf, format="pdf")
    assert b">layer<" in svg.getvalue() or b"layer</text>" in svg.getvalue()
    assert b"Type3" not in pdf.getvalue()
    assert b"CIDFontType2" in pdf.getvalue()


@pytest.mark.parametrize("name", STYLES)
def test_nothing_leaves_the_figure(horizon, name):
    with plt.style.context(f"mamba_probe.{name}"):
        ax = memory_horizon.plot(horizon)
        style.title(ax, horizon.attrs["model"])
        ax.figure.canvas.draw()
    width, height = ax.figure.canvas.get_width_height()
    for artist in (ax.get_legend(), *ax.texts, ax._left_title, ax.xaxis.label, ax.yaxis.label):
        box = artist.get_window_extent()
        assert box.x0 >= -1, artist
        assert box.x1 <= width + 1, artist
        assert box.y0 >= -1, artist
        assert box.y1 <= height + 1, artist
    legend = ax.get_legend().get_window_extent()
    assert ax._left_title.get_window_extent().y0 >= legend.y1 - 1, "the title stands above the legend"


def test_plots_set_no_size_that_rc_has():
    """By reading them: text sizes are relative words or parts of rc's, figures are made in one place."""
    for path in PLOTS:
        for node in ast.walk(ast.parse(path.read_text())):
            if not isinstance(node, ast.keyword):
                continue
            assert node.arg != "figsize" or path.name == "style.py", f"{path}: {ast.unparse(node)}"
            if node.arg in ("fontsize", "labelsize") or (node.arg == "size" and isinstance(node.value, ast.Constant)):
                said = ast.unparse(node.value)
                assert said in ("'small'", "'x-small'", "'x-large'") or said.startswith("style.dense("), (
                    f"{path}: {said}"
                )
            assert node.arg not in ("loc", "frameon") or "title" not in ast.unparse(node), path
