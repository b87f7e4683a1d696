"""The page of a report, read by the standard library: its order, its pictures' texts, its tables, its colours."""

import json
import re
from dataclasses import replace
from html.parser import HTMLParser
from itertools import pairwise

import pytest
from matplotlib.image import imread

import mamba_probe as mp
from mamba_probe.analyses.common.analysis import Row, number
from mamba_probe.pages import picture, read_template, write_page
from mamba_probe.report import Finding, analyse, finding, load_beside, write_report
from mamba_probe.run import record_given

NAMES = ("recall_circuit", "memory_horizon", "wavelet_alignment")


class Page(HTMLParser):
    """Elements in the page's order, as (tag, attributes, the section they stand in); the text of each section."""

    def __init__(self, path):
        super().__init__()
        self.elements, self.text, self.section, self.silent = [], {}, "", False
        self.feed(path.read_text(encoding="utf-8"))

    def handle_starttag(self, tag, attrs):
        self.section = dict(attrs)["id"] if tag == "section" else self.section
        self.silent = tag in ("script", "style")
        self.elements.append((tag, dict(attrs), self.section))

    def handle_endtag(self, tag):
        self.silent = False

    def handle_data(self, data):
        if not self.silent:
            self.text[self.section] = " ".join(f"{self.text.get(self.section, '')} {data}".split())

    def all(self, tag):
        return [attributes for each, attributes, _ in self.elements if each == tag]


@pytest.fixture(scope="module")
def run():
    task = mp.tasks.mqar(batch=3, length=16, n_pairs=2, vocab=8, seed=0)
    return record_given(load_beside("construction:mamba1", 8), task)


@pytest.fixture(scope="module")
def made(run, tmp_path_factory):
    folder = tmp_path_factory.mktemp("page")
    results = analyse(run, folder / "results", names=NAMES)
    return folder, results, Page(write_report(run, results, folder))


def test_plain_words_come_first_and_provenance_last(made):
    page = made[2]
    order = [attributes["id"] for attributes in page.all("section")]
    assert order == ["found", *NAMES, "parity", "provenance"]
    links = [attributes["href"] for attributes in page.all("a")]
    assert [link for link in links if link[1:] in order][: len(order)] == [f"#{name}" for name in order], "contents"
    assert {link[1:] for link in links} <= {
        attributes["id"] for _, attributes, _ in page.elements if "id" in attributes
    }
    for name in NAMES:
        tags = [tag for tag, _, section in page.elements if section == name]
        places = [tags.index(tag) for tag in ("h2", "figure", "img", "figcaption", "table", "details")]
        assert places == sorted(places), name


def test_what_was_found_has_the_value_its_interval_and_its_null(made):
    _, results, page = made
    for name, result in results.items():
        found = finding(name, result)
        assert found.sentence in page.text["found"]
        row = found.headline
        assert row.null, name
        assert f"{row.what}: {row.value}" in page.text["found"]
        assert f"null {row.null}" in page.text["found"]
        assert f"95 % interval {row.interval}" in page.text["found"]
    assert "No circuit to score" not in page.text["found"]


def test_an_empty_table_has_no_headline_and_a_number_with_a_null_goes_before_one_without():

    rows = (
        Row("a", "1", null="none", interval="0 to 2"),
        Row("b", "2", null="0"),
        Row("c", "3", null="0", interval="2 to 4"),
    )
    for n, best in enumerate((None, *rows)):
        assert Finding("", "", "", "", rows[:n], ()).headline is best


def test_a_task_that_is_not_solved_has_no_circuit_to_score(run, tmp_path):
    wrong = run.trace.assign_coords(prediction=(run.trace["target"] + 1) % 8)

    failing = replace(run, trace=wrong, interventions=None, twin=None)
    results = analyse(failing, tmp_path / "results", names=("recall_circuit",))
    page = Page(write_report(failing, results, tmp_path))
    assert "No circuit to score. No circuit: accuracy 0.00" in page.text["found"]
    assert "task accuracy: 0 (0/6)" in page.text["found"]
    assert page.all("img") == []


def test_a_pictures_text_holds_the_numbers_of_the_result(made):
    _, results, page = made
    texts = {section: attributes["alt"] for tag, attributes, section in page.elements if tag == "img"}
    horizon, cosine = results["memory_horizon"], results["wavelet_alignment"]
    at_least = horizon["layer_forward_horizon_at_least"].sel(quantile=0.5).item()
    assert f"median horizon, tokens at least {number(at_least)} (null time-invariant" in texts["memory_horizon"]
    kinds = ("", "null_", "null_shuffle_", "baseline_")
    value, lti, shuffled, twin = (number(cosine[f"layer_{name}best_cosine"].item()) for name in kinds)
    ends = (number(cosine[f"layer_best_cosine_{end}"].item()) for end in ("low", "high"))
    nulls = f"time-invariant {lti}; steps shuffled {shuffled}; untrained {twin}"
    said = f"|cos| with the best single wavelet {value} (null {nulls}; 95 % interval {' to '.join(ends)})"
    assert said in texts["wavelet_alignment"]
    signature = results["recall_circuit"].sel(signature="S2", layer=0)
    assert f"{number(signature['value'].item())} (null {number(signature['null'].item())}" in texts["recall_circuit"]
    assert re.search(r"; \d+ more in the table below\.$", texts["recall_circuit"])


def test_every_figure_says_how_to_read_it_and_has_its_size(made):
    folder, _, page = made
    tags = [tag for tag, _, _ in page.elements if tag in ("figure", "img", "figcaption")]
    assert tags == ["figure", "img", "figcaption"] * len(NAMES)
    for name, image in zip(NAMES, page.all("img"), strict=True):
        height, width = imread(folder / f"figures/{name}.png").shape[:2]
        assert (image["width"], image["height"]) == (str(width), str(height))
        assert page.text[name].index("How to read it.") < page.text[name].index("How to read the numbers.")


def test_tables_are_sorted_by_column_where_there_is_an_order(made):
    page = made[2]
    assert all(attributes["scope"] in ("col", "row") for attributes in page.all("th"))
    sortable = [section for tag, attributes, section in page.elements if tag == "table" and attributes]
    assert sortable == [*NAMES, "parity"]
    heads = [attributes for tag, attributes, section in page.elements if tag == "th" and section == NAMES[0]]
    assert [head.get("class") for head in heads if head["scope"] == "col"] == [None, "n", "n", "n"]
    captions = page.all("caption")
    assert len(captions) == len(page.all("table")) == len(NAMES) + 2


def test_a_page_holds_png_files_alone(tmp_path):
    (tmp_path / "a.png").write_bytes(b"GIF89a" + bytes(40))
    with pytest.raises(ValueError, match=r"a\.png: a page holds PNG files; this one begins with b'GIF89a"):
        picture(tmp_path / "a.png", "", "")


def test_the_title_names_the_model_and_the_task(made):
    text = (made[0] / "report.html").read_text()
    assert "<title>construction:mamba1 on task mqar: findings of mamba_probe</title>" in text
    assert '<meta name="viewport" content="width=device-width, initial-scale=1">' in text
    assert '<html lang="en">' in text


def test_headings_go_down_one_at_a_time(made):
    levels = [int(tag[1]) for tag, _, _ in made[2].elements if re.fullmatch(r"h\d", tag)]
    assert levels[0] == 1
    assert levels.count(1) == 1
    assert all(after <= before + 1 for before, after in pairwise(levels))


def test_a_template_that_lacks_a_value_is_refused(tmp_path):
    from jinja2 import UndefinedError

    with pytest.raises(UndefinedError, match="'title' is undefined"):
        write_page(tmp_path / "a.html", read_template("report.html"))


# -- colours ------------------------------------------------------------------------------------------------------

PAIRS = [("ink", "paper", 7.0), ("soft", "paper", 4.5), ("blue", "paper", 4.5), ("ink", "card", 7.0),
         ("soft", "card", 4.5), ("blue", "card", 4.5), ("ink", "quote", 7.0), ("quote-ink", "quote", 4.5),
         ("alarm-ink", "alarm", 4.5)]  # fmt: skip


def luminance(colour):
    """WCAG 2.2, relative luminance of #rrggbb."""
    parts = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
    return sum(weight * part for weight, part in zip((0.2126, 0.7152, 0.0722), linear, strict=True))


def contrast(one, other):
    """WCAG 2.2, contrast ratio, 1 to 21."""
    light, dark = sorted((luminance(one), luminance(other)), reverse=True)
    return (light + 0.05) / (dark + 0.05)


def test_contrast_is_that_of_the_standard():
    assert contrast("#000000", "#ffffff") == pytest.approx(21)
    assert contrast("#767676", "#ffffff") == pytest.approx(4.54, abs=0.005)  # the standard's own example of grey


def test_text_can_be_read_in_light_and_dark():
    schemes = [dict(re.findall(r"--([\w-]+): (#\w{6})", block))
               for block in re.findall(r":root \{(.*?)\}", read_template("page.css"), re.S)]  # fmt: skip
    assert [len(scheme) for scheme in schemes] == [10, 10]
    for scheme in schemes:
        for ink, paper, least in PAIRS:
            assert contrast(scheme[ink], scheme[paper]) >= least, (ink, paper, scheme)
    light, dark = (luminance(scheme["paper"]) for scheme in schemes)
    assert light > 0.9
    assert dark < 0.05


def test_every_colour_has_a_name_in_both_schemes():
    css = read_template("page.css")
    body = re.sub(r":root \{.*?\}", "", css, flags=re.S)
    assert set(re.findall(r"var\(--([\w-]+)\)", body)) <= set(re.findall(r"--([\w-]+): #", css))
    assert re.findall(r"#[0-9a-f]{3,6}", body) == ["#ffffff"], "the card of a picture is white in both"
    assert "@media screen and (prefers-color-scheme: dark)" in css, "printed as light"


def test_the_script_is_small_and_no_json_is_in_it():
    script = read_template("page.js")
    assert len(script) < 4000
    assert not re.search(r"innerHTML|eval|Function\(|fetch|XMLHttp|import\(|localStorage", script)
    assert json.dumps(script).isascii()


@pytest.mark.parametrize(("rows", "said"), [(1, False), (2, True), (7, True), (8, False)])
def test_few_rows_are_said_to_make_intervals_too_narrow(tmp_path, rows, said):
    """A percentile bootstrap of two rows is the two values."""
    task = mp.tasks.mqar(batch=rows, length=16, n_pairs=2, vocab=8, seed=0)
    page = write_report(record_given(load_beside("construction:mamba1", 8), task), {}, tmp_path).read_text()
    assert (f"Of {rows} rows an interval is" in page) == said
    assert ("too narrow" in page) == said
