"""A report full of hostile text in Chromium: nothing runs, nothing is fetched, and the text is read as it stands."""

import json
from dataclasses import replace

import numpy as np
import pytest

import mamba_probe as mp
from mamba_probe import tasks
from mamba_probe.pages import POLICY, write_page
from mamba_probe.report import analyse, write_report
from mamba_probe.run import record_given
from mamba_probe.visible import visible

pytestmark = pytest.mark.browser

HOSTILE = (
    "<script>window.hit=1;alert(1)</script>", "<img src=x onerror=window.hit=1>",
    "</style><script>window.hit=1</script>", "</title><svg onload=window.hit=1>", "javascript:window.hit=1",
    "\" onmouseover=\"window.hit=1\" '`", "{{ 7*7 }}{% x %}", "a\u202eb\u2066c\u200b", "nul\x00esc\x1b[31m",
    r"$\frac{1}{0$ \$", "--><iframe src=https://example.invalid/></iframe>", "&lt;b&gt;&#60;script&#62;",
    "<link rel=stylesheet href=https://example.invalid/a.css>", "<base href=https://example.invalid/>",
)  # fmt: skip
TEXT = " ".join(HOSTILE)


def hostile_tokens(run):
    """The run with hostile token texts, which the measures take up; of roles a task knows its own alone."""
    shape = run.trace["token_id"].shape
    text = np.resize(np.array(HOSTILE, dtype=object), shape)
    return replace(run, trace=run.trace.assign_coords(token_text=(("batch", "token"), text)))


def hostile_names(run):
    """The run with hostile text wherever its stores hold any."""
    params = json.dumps({HOSTILE[2]: HOSTILE[3], **json.loads(run.trace.attrs["task_params"])})
    named = {"model": TEXT, "task": TEXT, "task_params": params, "versions": TEXT, "created_at": TEXT}
    parity = run.parity.assign_attrs(error=TEXT, parting=TEXT)
    return replace(run, trace=run.trace.assign_attrs(named), parity=parity)


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    folder = tmp_path_factory.mktemp("report")
    mp.constructions.mqar("mamba1", 4, 4).save(folder / "model")
    task = tasks.mqar(batch=2, length=16, n_pairs=2, vocab=8)
    run = hostile_tokens(record_given(mp.load(folder / "model"), task))
    stated = dict.fromkeys(("estimator", "null", "interval", "reduces_over"), TEXT)
    stated["model"] = HOSTILE[0] + HOSTILE[9]  # a longer one leaves a figure no place
    measured = analyse(run, folder / "results", names=("memory_horizon", "recall_circuit", "sinks"))
    results = {name: result.assign_attrs(stated) for name, result in measured.items()}
    run = hostile_names(run)
    return write_report(replace(run, beside=run), results, folder, beside=results)


def test_a_report_of_hostile_text_is_inert_and_read_as_it_stands(browser, visit, page):
    seen = visit(page)
    assert seen.hit is None
    assert seen.dialogs == []
    assert seen.requests == {page.as_uri(), "data:image/png;base64"}
    assert seen.console == []
    for text in (TEXT, *HOSTILE):
        assert " ".join(visible(text).split()) in seen.text, text
    given = " ".join(visible(TEXT).split())
    assert browser.title == f"{given} on task {given}: findings of mamba_probe"


def test_what_the_page_needs_still_works(browser, visit, page):
    visit(page)
    widths = browser.execute_script("return [...document.images].map(each => each.naturalWidth)")
    assert len(widths) >= 2
    assert min(widths) > 500
    style = "return getComputedStyle(document.querySelector(arguments[0]))[arguments[1]]"
    assert browser.execute_script(style, "h1", "marginTop") == "0px"
    assert browser.execute_script(style, ".answer", "borderLeftWidth") == "4px"
    browser.execute_script("document.querySelector('summary').click()")
    assert browser.execute_script("return document.querySelector('details').open")


def test_its_figures_are_inert(visit, page):
    figures = sorted((page.parent / "figures").glob("*.svg"))
    assert len(figures) == 3
    for path in figures:
        seen = visit(path)
        assert (seen.hit, seen.dialogs, seen.console) == (None, [], [])
        assert seen.requests == {path.as_uri()}


def test_the_browser_would_tell(browser, visit, tmp_path):
    """Unescaped and without a policy the same text runs, asks and opens a dialog; with the policy alone it does not."""
    raw = "<html><head>{head}</head><body>" + HOSTILE[1] + HOSTILE[10] + "<script>window.hit=2</script>"
    (tmp_path / "open.html").write_text(raw.format(head=""))
    seen = visit(tmp_path / "open.html")
    assert seen.hit is not None
    assert any("example.invalid" in url for url in seen.requests)
    policy = f'<meta http-equiv="Content-Security-Policy" content="{POLICY}">'
    (tmp_path / "held.html").write_text(raw.format(head=policy))
    seen = visit(tmp_path / "held.html")
    assert seen.hit is None
    assert not any("example.invalid" in url for url in seen.requests)
    assert any("Content Security Policy" in line for line in seen.console)
    (tmp_path / "asks.html").write_text("<script>setTimeout(() => alert(1), 50)</script>")
    from selenium.common.exceptions import UnexpectedAlertPresentException

    with pytest.raises(UnexpectedAlertPresentException):
        visit(tmp_path / "asks.html")
    browser.switch_to.alert.accept()


def test_the_policy_survives_the_template(visit, tmp_path):
    template = '<meta http-equiv="Content-Security-Policy" content="{{ policy }}"><script>window.hit = 1</script>'
    assert visit(write_page(tmp_path / "a.html", template)).hit is None
