"""Names and token texts from anyone: shown as they stand in figures, pages and terminals, and never interpreted."""

import base64
import hashlib
import io
import re
import xml.etree.ElementTree as ET
from dataclasses import replace
from html.parser import HTMLParser

import matplotlib.pyplot as plt
import numpy as np
import pytest
import xarray as xr
from typer.testing import CliRunner

import mamba_probe as mp
from mamba_probe import patching, tasks
from mamba_probe.analyses.common.analysis import analyses
from mamba_probe.analyses.common.style import house, names_as_they_are
from mamba_probe.cli import app
from mamba_probe.cli_steps import Terminal, headed
from mamba_probe.pages import POLICY, write_page
from mamba_probe.report import analyse, draw, write_report
from mamba_probe.run import record_given
from mamba_probe.visible import literal, visible

HOSTILE = {
    "script": "<script>window.hit=1</script>", "image": "<img src=x onerror=window.hit=1>", "style": "</style><b>",
    "quotes": "\"'`", "template": "{{ 7*7 }}{% raw %}", "dollar": "$", "maths": r"$\frac{1}{0$", "brace": "a$_{",
    "esc": "\x1b[31mred\x1b]0;t\x07", "bidi": "a\u202eb\u2066c", "nul": "a\x00b", "c1": "\x9b31m",
    "markup": "[bold red]x[/bold red][/nope]", "surrogate": "\ud800", "entity": "&lt;b&gt;", "back": "a\\$b\\",
    "xml": "]]><svg onload=window.hit=1>", "emoji": ":warning:", "zero": "a\u200bb",
}  # fmt: skip
HIDDEN = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u200b-\u200f\u202a-\u202e\u2066-\u2069\ud800-\udfff]")


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model") / "small"
    mp.constructions.mqar("mamba1", 4, 4).save(folder)
    return record_given(mp.load(folder), tasks.mqar(batch=2, length=16, n_pairs=2, vocab=8))


def drawn_texts(figure):
    """What an SVG reader sees, by a parser of its own."""
    data = io.BytesIO()
    with house():
        figure.savefig(data, format="svg")
    tree = ET.fromstring(data.getvalue())
    names = {element.tag.rpartition("}")[2] for element in tree.iter()}
    assert not names & {"script", "image", "a", "foreignObject", "iframe", "b"}, names
    assert not [key for element in tree.iter() for key in element.attrib if key.lower().startswith("on")]
    return [" ".join("".join(element.itertext()).split()) for element in tree.iter() if element.tag.endswith("}text")]


@pytest.mark.parametrize("name", HOSTILE)
def test_a_figure_shows_a_text_as_it_stands(name):
    @names_as_they_are
    def plot(result, ax):
        ax.set_title(f"{result.attrs['model']}: " + r"$\Delta$ at its mean")
        ax.set_xlabel(result.attrs["model"])
        ax.set_xticks([0], [str(result["token_text"].values[0])])

    figure, ax = plt.subplots()
    plot(
        xr.Dataset(
            coords={"token_text": ("x", np.array([HOSTILE[name]], dtype=object))}, attrs={"model": HOSTILE[name]}
        ),
        ax,
    )
    shown = drawn_texts(figure)
    plt.close(figure)
    wanted = " ".join(visible(HOSTILE[name]).split())
    assert shown.count(wanted) >= 2, (wanted, shown)
    assert not HIDDEN.search("".join(shown))


SOME = {"memory_horizon", "sinks", "recall_circuit"}


def hostile(result):
    """A result whose every name of ours that a stranger may choose is hostile."""
    text = "".join(HOSTILE[name] for name in ("script", "dollar", "brace", "bidi", "nul", "maths"))
    return result.assign_attrs(model=text, name=text)


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[pytest.mark.long] * (name not in SOME)) for name in sorted(analyses())]
)
def test_every_analysis_draws_a_hostile_model(name, run, tmp_path):
    if analyses()[name].lacks(run):
        pytest.fail(f"{name} lacks {analyses()[name].lacks(run)}")
    result = hostile(analyses()[name].of_run(run, 0).compute())
    for path in draw(name, result, tmp_path):
        if path.suffix == ".svg":
            ET.parse(path)
            assert not re.search("<script", path.read_text(), re.IGNORECASE)
            assert not HIDDEN.search(path.read_text().replace("\n", ""))


def test_a_plot_that_forgets_would_raise(run):
    """matplotlib itself stumbles over such a name, or this file proves nothing."""
    figure, ax = plt.subplots()
    ax.set_title(HOSTILE["maths"] + "$x$")
    with pytest.raises(ValueError, match=r"Expected|Unknown|Parse"):
        figure.canvas.draw()
    plt.close(figure)


def test_patchings_texts_are_drawn_as_they_stand():
    values = np.ones((1, 1, 1, len(HOSTILE)), np.float32)
    dims = ("quantity", "batch", "layer", "token")
    result = xr.Dataset(
        {"recovered": (dims, values), "base": ("batch", [0.0]), "source": ("batch", [1.0])},
        {"quantity": ["B"], "layer": [0], "token": np.arange(len(HOSTILE)),
         "token_text": (("batch", "token"), np.array([list(HOSTILE.values())], dtype=object))},
        {"kind": "patching", "metric": "m", "analysis": "patching", "model": "x"},
    )  # fmt: skip
    for given in (None, list(HOSTILE.values())):
        ax = patching.plot(result, token_text=given)
        assert [label.get_text() for label in ax.get_xticklabels()] == [literal(text) for text in HOSTILE.values()]
        plt.close(ax.figure)


def printed(*what, **options):
    file = io.StringIO()
    Terminal(file=file, width=400, force_terminal=True, color_system="truecolor", **options).print(*what)
    return file.getvalue()


def bare(text):
    """Without the styles that rich itself writes."""
    return re.sub(r"\x1b\[[0-9;]*m", "", text)


@pytest.mark.parametrize("name", HOSTILE)
def test_a_terminal_shows_a_text_as_it_stands(name):
    from rich.table import Table

    table = Table("what")
    table.add_row(HOSTILE[name])
    wanted = visible(HOSTILE[name], keep="\n")
    for what in (HOSTILE[name], headed("x", HOSTILE[name]), headed(HOSTILE[name], "x"), table):
        text = bare(printed(what))
        assert wanted in text
        assert not HIDDEN.search(text)
        assert "\x1b" not in text


def test_the_commands_show_a_hostile_model(run, tmp_path):
    """From a stored run to the terminal and the page, with a text that is markup in both."""
    text = "[bold]m[/bold]\x1b[31m<script>alert(1)</script>\u202e"
    named = replace(run, trace=run.trace.assign_attrs(model=text))
    named.save(tmp_path / "run")
    done = CliRunner().invoke(
        app, ["analyze", "memory_horizon,recall_circuit", str(tmp_path / "run"), "-o", str(tmp_path / "out")]
    )
    assert done.exit_code == 0, done.output
    assert not HIDDEN.search(bare(done.output).replace("\r", ""))
    page = (tmp_path / "out" / "report.html").read_text()
    assert "[bold]m[/bold]\\x1b[31m&lt;script&gt;alert(1)&lt;/script&gt;\\u202e" in page
    assert page.count("<script") == 1, "ours, see test_the_report_runs_its_own_script_alone_and_asks_nothing"
    (tmp_path / "[red]x").mkdir()
    lost = CliRunner().invoke(app, ["analyze", "memory_horizon", str(tmp_path / "[red]x"), "-o", str(tmp_path / "o")])
    assert "[red]x holds no run" in " ".join(lost.stderr.split())


@pytest.mark.parametrize("name", HOSTILE)
def test_a_page_shows_a_text_as_it_stands(name, tmp_path):
    """Read back by an HTML parser that shares no code with Jinja."""
    seen, tags = [], []

    class Reader(HTMLParser):
        def handle_data(self, data):
            seen.append(data)

        def handle_starttag(self, tag, attrs):
            tags.append((tag, dict(attrs)))

    path = write_page(tmp_path / "a.html", '<p title="{{ text }}">{{ text }}</p>', text=HOSTILE[name])
    Reader().feed(path.read_text(encoding="utf-8"))
    wanted = visible(HOSTILE[name])
    assert tags == [("p", {"title": wanted})]
    assert "".join(seen) == wanted


class Held(HTMLParser):
    """What a page holds, by a parser that shares no code with Jinja: tags, attributes, scripts and styles."""

    def __init__(self, page):
        super().__init__()
        self.tags, self.attributes, self.held, self.open = [], [], [], ""
        self.feed(page)

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += attrs
        self.open = tag if tag in ("script", "style") else ""

    def handle_endtag(self, tag):
        self.open = ""

    def handle_data(self, data):
        if self.open:
            self.held.append((self.open, data))


def test_the_report_runs_its_own_script_alone_and_asks_nothing(run, tmp_path):
    results = analyse(run, tmp_path / "results", names=("memory_horizon",))
    page = write_report(run, results, tmp_path).read_text()
    assert page.index("Content-Security-Policy") < page.index("<title>") < page.index("<style>")
    assert f'content="{POLICY}"'.replace("'", "&#39;") in page
    seen = Held(page)
    assert not set(seen.tags) & {"iframe", "object", "embed", "form", "link", "base", "svg"}
    assert not [name for name, _ in seen.attributes if name.startswith("on") or name == "style"]
    assert {kind: seen.tags.count(kind) for kind in ("script", "style")} == {"script": 1, "style": 1}
    for kind, text in seen.held:
        digest = base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
        assert f"{kind}-src 'sha256-{digest}';" in POLICY, f"{kind} is not the one that the policy allows"
    assert POLICY.startswith("default-src 'none'")
    assert "unsafe" not in POLICY


def test_nothing_is_written_through_a_link(run, tmp_path):
    """A folder from a stranger may hold links where we write: what they lead to stays as it is."""
    mine = tmp_path / "mine"
    mine.write_text("precious")
    out = tmp_path / "out"
    (out / "figures").mkdir(parents=True)
    names = ["report.html", "report.partial", "report.html.unfinished", "figures/memory_horizon.png",
             "figures/memory_horizon.svg", "memory_horizon.nc.partial"]  # fmt: skip
    for name in names:
        (out / name).symlink_to(mine)
    results = analyse(run, out, names=("memory_horizon",))
    write_report(run, results, out)
    assert mine.read_text() == "precious"
    assert not (out / "report.html").is_symlink()
    assert not (out / "figures" / "memory_horizon.png").is_symlink()


def test_overwriting_removes_a_link_and_not_what_it_leads_to(run, tmp_path):
    (tmp_path / "kept").mkdir()
    (tmp_path / "kept" / "file").write_text("precious")
    run.save(tmp_path / "run")
    (tmp_path / "run" / "weights.nc").unlink()
    (tmp_path / "run" / "weights.nc").symlink_to(tmp_path / "kept" / "file")
    run.save(tmp_path / "run", overwrite=True)
    assert (tmp_path / "kept" / "file").read_text() == "precious"


@pytest.mark.parametrize(
    "character", ["\u202e", "\u2066", "\u200f", "\x1b", "\x9b", "\x00", "\ud800", "\ufeff", "\U000e0041"]
)
def test_what_is_hidden_is_shown(character):
    assert visible(f"a{character}b") == f"a{character.encode('unicode_escape').decode()}b"
    assert visible("añ漢字🙂π ") == "añ漢字🙂π "
