"""Pages in Chromium: quiet, sorted by click and by key, within a phone's width, in the dark, and printed whole."""

import base64
import re
from dataclasses import dataclass

import pytest

import mamba_probe as mp
from mamba_probe.pages import Table, write_page
from mamba_probe.report import analyse, load_beside, write_report
from mamba_probe.reproduce import reproduce
from mamba_probe.reproduce.keep import KEEP
from mamba_probe.run import record_given

pytestmark = pytest.mark.browser

PHONE, A4 = 360, (794 - 2 * 53, 1123 - 2 * 60)
"""Pixels of CSS: a narrow phone; a sheet within the margins that the page sets."""


@pytest.fixture(scope="module")
def report(tmp_path_factory):
    folder = tmp_path_factory.mktemp("report")
    task = mp.tasks.mqar(batch=4, length=16, n_pairs=2, vocab=16, seed=0)
    run = record_given(load_beside("construction:mamba1", 16), task)
    names = ("recall_circuit", "memory_horizon", "wavelet_alignment", "state_dynamics")
    results = analyse(run, folder / "results", names=names)
    return write_report(run, results, folder)


@pytest.fixture(scope="module")
def claims(tmp_path_factory):
    folder = tmp_path_factory.mktemp("claims")
    cells = [cell for cell in KEEP.cells() if cell.build.get("length") == 64][:4]
    reproduce(["keep"], folder, cells={"keep": cells})
    return folder / "index.html"


@pytest.fixture(params=["report", "claims"])
def page(request):
    return request.getfixturevalue(request.param)


@dataclass(frozen=True)
class View:
    """How the browser shows a page."""

    driver: object

    def set(self, width=1200, height=900, scheme="light", media="", script=True):
        do = self.driver.execute_cdp_cmd
        size = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": width == PHONE}
        do("Emulation.setDeviceMetricsOverride", size)
        features = [{"name": "prefers-color-scheme", "value": scheme}]
        do("Emulation.setEmulatedMedia", {"media": media, "features": features})
        do("Emulation.setScriptExecutionDisabled", {"value": not script})


@pytest.fixture
def view(browser):
    shown = View(browser)
    yield shown
    shown.set()
    browser.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_a_page_is_quiet_and_asks_nothing(view, visit, page, scheme):
    view.set(scheme=scheme)
    seen = visit(page)
    assert seen.console == []
    assert seen.requests == {page.as_uri(), "data:image/png;base64"}


# -- sorting --------------------------------------------------------------------------------------------------------

CELLS = ["10", "9", "at least 2", "-1.5", "2.0e+07", "none", "beyond the recording", "0.25 to 0.5", "1 - 1.0e-05", "5%"]
UP = ["-1.5", "0.25 to 0.5", "1 - 1.0e-05", "at least 2", "5%", "9", "10", "2.0e+07", "beyond the recording", "none"]
"""As numbers: what is none stands last, whichever way."""


@pytest.fixture(scope="module")
def table(tmp_path_factory):
    rows = [(f"layer {10 - i}", cell) for i, cell in enumerate(CELLS)]
    template = (
        '{% extends "base.html" %}{% block main %}{% with table = table %}{% include "table.html" %}{% endwith %}'
        "{% endblock %}"
    )
    shown = Table("some", ["what", "value"], rows, ["value"])
    return write_page(tmp_path_factory.mktemp("t") / "t.html", template, title="t", contents=[], table=shown)


def column(browser, n):
    script = "return [...document.querySelectorAll('tbody tr')].map(row => row.cells[arguments[0]].textContent)"
    return browser.execute_script(script, n)


def states(browser):
    return browser.execute_script("return [...document.querySelectorAll('thead th')].map(th => th.ariaSort)")


def test_a_heading_that_is_clicked_sorts_numbers_as_numbers(browser, visit, table):
    visit(table)
    assert states(browser) == ["none", "none"]
    button = browser.find_elements("css selector", "th button")[1]
    button.click()
    assert (column(browser, 1), states(browser)) == (UP, ["none", "ascending"])
    button.click()
    assert (column(browser, 1), states(browser)) == ([*UP[-2::-1], "none"], ["none", "descending"])
    button.click()
    assert (column(browser, 1), states(browser)) == (CELLS, ["none", "none"])


def test_the_keyboard_sorts_too_and_text_has_its_numbers_in_order(browser, visit, table):
    from selenium.webdriver.common.keys import Keys

    visit(table)
    body = browser.switch_to.active_element
    for _ in range(3):  # the contents, the table's box, its first heading
        body.send_keys(Keys.TAB)
        body = browser.switch_to.active_element
    assert (body.tag_name, body.text.split()[0]) == ("button", "what")
    body.send_keys(Keys.ENTER)
    assert column(browser, 0) == [f"layer {i}" for i in range(1, 11)]
    body.send_keys(Keys.SPACE)
    assert states(browser) == ["descending", "none"]
    assert browser.execute_script("return getComputedStyle(document.activeElement).outlineStyle") == "solid"


def test_without_the_script_the_page_is_whole(browser, view, visit, report):
    whole = visit(report).text
    view.set(script=False)
    browser.get(report.as_uri())
    assert browser.find_elements("css selector", "th button") == []
    plain = " ".join(browser.find_element("css selector", "html").get_attribute("textContent").split())
    assert plain == whole


# -- widths, colours, paper -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("width", [320, PHONE, 768, 1200, 1600])
def test_a_page_does_not_scroll_sideways(browser, view, visit, page, width):
    view.set(width)
    visit(page)
    assert browser.execute_script("for (const each of document.querySelectorAll('details')) each.open = true;"
                                  "return document.documentElement.scrollWidth") <= width  # fmt: skip
    script = """return [...document.querySelectorAll('main *, header *')].filter(each =>
        !each.closest('.scroll, .picture') && each.getBoundingClientRect().right > innerWidth + 1)
        .map(each => each.outerHTML)"""
    assert browser.execute_script(script) == []


def test_the_contents_are_at_hand_on_a_phone_and_lead_to_each_section(browser, view, visit, report):
    view.set(PHONE, 740)
    visit(report)
    browser.execute_script("document.documentElement.style.scrollBehavior = 'auto'; scrollTo(0, 4000)")
    summary = browser.find_element("css selector", ".contents summary")
    assert browser.execute_script("return arguments[0].getBoundingClientRect().top", summary) < 20
    assert browser.execute_script("return arguments[0].getBoundingClientRect().height", summary) >= 40, "a finger's"
    summary.click()
    browser.find_element("css selector", ".contents a[href='#wavelet_alignment']").click()
    place = "return document.querySelector('#wavelet_alignment h2').getBoundingClientRect().top"
    assert 40 < browser.execute_script(place) < 140, "its heading is below the bar of contents"
    assert not browser.execute_script("return document.querySelector('.contents').open")


CONTRASTS = """
const ratio = (a, b) => { const [x, y] = [a, b].map(luminance).sort((p, q) => q - p); return (x + .05) / (y + .05); };
const luminance = ([r, g, b]) => [[.2126, r], [.7152, g], [.0722, b]].reduce((sum, [weight, part]) =>
  sum + weight * (part / 255 <= .04045 ? part / 255 / 12.92 : ((part / 255 + .055) / 1.055) ** 2.4), 0);
const parts = colour => colour.match(/[\\d.]+/g).map(Number);
const behind = each => { for (; each; each = each.parentElement) {
  const found = parts(getComputedStyle(each).backgroundColor); if (found.length < 4 || found[3] === 1) return found; }
  return [255, 255, 255]; };
for (const each of document.querySelectorAll('details')) each.open = true;
return [...document.querySelectorAll('body *')].filter(each => each.getClientRects().length
  && [...each.childNodes].some(node => node.nodeType === 3 && node.data.trim()))
  .map(each => [ratio(parts(getComputedStyle(each).color), behind(each)), each.outerHTML.slice(0, 80)]);
"""


@pytest.mark.parametrize(("scheme", "media", "paper"), [
    ("light", "", "rgb(255, 255, 255)"), ("dark", "", "rgb(20, 23, 26)"), ("dark", "print", "rgb(255, 255, 255)"),
])  # fmt: skip
def test_every_text_can_be_read_against_what_is_behind_it(browser, view, visit, page, scheme, media, paper):
    view.set(scheme=scheme, media=media)
    visit(page)
    assert browser.execute_script("return getComputedStyle(document.body).backgroundColor") == paper
    found = browser.execute_script(CONTRASTS)
    assert len(found) > 50
    assert [each for each in found if each[0] < 4.5] == []
    card = "return getComputedStyle(document.querySelector('.picture')).backgroundColor"
    assert browser.execute_script(card) == "rgb(255, 255, 255)", "figures are drawn for white"


def test_paper_has_all_and_cuts_no_figure(browser, view, visit, page):
    view.set(*A4, scheme="dark", media="print")
    visit(page)
    sizes = browser.execute_script(
        "return [...document.images].map(each => each.getBoundingClientRect()).map(box => [box.width, box.height])"
    )
    assert sizes
    assert all(100 < width <= A4[0] and 100 < height <= A4[1] for width, height in sizes)
    assert browser.execute_script("return document.documentElement.scrollWidth") <= A4[0]
    style = "return [...document.querySelectorAll(arguments[0])].map(each => getComputedStyle(each)[arguments[1]])"
    assert set(browser.execute_script(style, ".picture, .scroll", "overflowX")) == {"visible"}
    assert set(browser.execute_script(style, ".picture", "breakInside")) == {"avoid"}
    assert set(browser.execute_script(style, ".contents, .up", "display")) == {"none"}
    shut = """return [...document.querySelectorAll('details:not(.contents) > :not(summary)')]
        .filter(each => each.checkVisibility({contentVisibilityAuto: true}) === false).length"""
    assert browser.execute_script(shut) == 0, "what is folded is printed, without the script too"


def test_a_printed_page_is_a_pdf_of_some_sheets_and_folds_again(browser, view, visit, report):
    view.set()
    visit(report)
    before = browser.execute_script("return document.querySelectorAll('details[open]').length")
    data = base64.b64decode(browser.execute_cdp_cmd("Page.printToPDF", {"preferCSSPageSize": True})["data"])
    sheets = len(re.findall(rb"/Type\s*/Page\b", data))
    assert data[:5] == b"%PDF-"
    assert 4 <= sheets <= 16
    assert browser.execute_script("return document.querySelectorAll('details[open]').length") == before
