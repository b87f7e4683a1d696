"""The site: its front page lists every page, its reference every public name; what is built fetches nothing."""

import re
import subprocess
import sys
from importlib import import_module
from pathlib import Path

import pytest

import mamba_probe as mp
from mamba_probe.analyses.common.analysis import analyses

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"
NOT_A_PAGE = re.compile(r"README|reference/(?!index)|gallery/")
"""Lists themselves; and what their own index lists."""


@pytest.fixture(scope="module")
def navigation():
    sys.path.insert(0, str(DOCS / "_extensions"))
    yield import_module("navigation")
    sys.path.remove(str(DOCS / "_extensions"))


def pages():
    found = [path.relative_to(DOCS) for kind in ("md", "rst") for path in DOCS.rglob(f"*.{kind}")]
    return {f"docs/{path.with_suffix('')}" for path in found if path.parts[0][0] not in "_."}


def test_the_front_page_lists_every_page_once(navigation):
    listed = [page for each in navigation.listed((DOCS / "README.md").read_text()).values() for page in each]
    assert len(set(listed)) == len(listed)
    assert {page for page in pages() if not NOT_A_PAGE.search(page)} <= set(listed)
    for page in set(listed) - {"docs/gallery/index"}:
        assert any((ROOT / f"{page}.{kind}").exists() for kind in ("md", "rst")), page
    assert listed[0] == "docs/notation"
    assert {f"docs/{name}" for name in analyses()} <= set(listed)


def test_every_page_of_the_reference_is_in_its_index():
    index = (DOCS / "reference/index.rst").read_text()
    inside = set(re.findall(r"^   (\w+)$", index, re.M))
    assert inside == {path.stem for path in (DOCS / "reference").glob("*.rst")} - {"index"}


ENTRY = re.compile(r"^\.\. (currentmodule|automodule|auto\w+):: ([\w.]+)(?:\(\))?$", re.M)


def described():
    """Every object and module that the reference describes."""
    objects, modules = {}, set()
    for path in (DOCS / "reference").glob("*.rst"):
        here = ""
        for kind, target in re.findall(ENTRY, path.read_text()):
            if kind in ("currentmodule", "automodule"):
                here = target
                modules |= {target} if kind == "automodule" else set()
            else:
                module, _, name = (f"{here}.{target}" if "." not in target else target).rpartition(".")
                thing = getattr(import_module(module), name)
                assert f"{module}.{name}" not in objects, f"{module}.{name} is described twice"
                objects[f"{module}.{name}"] = thing
    return objects, modules


def test_the_reference_describes_every_public_name():
    objects, modules = described()
    known = [each for each in objects.values() if callable(each)]
    for module in (mp, mp.constructions, mp.patching, mp.reduce, mp.tasks, import_module("mamba_probe.zoo")):
        for name in module.__all__:
            thing = getattr(module, name)
            if isinstance(thing, type(mp)):
                assert thing.__name__ in modules, f"{module.__name__}.{name}"
            elif callable(thing):
                assert any(thing is each for each in known), f"{module.__name__}.{name}"
    for name in [*analyses(), "lti_limits"]:
        module = import_module(f"mamba_probe.analyses.{name}")
        for public in module.__all__:
            assert f"{module.__name__}.{public}" in objects, f"{name}.{public}"
    scan = "mamba_probe.kernels.scan"
    assert {f"{scan}.{name}" for name in ("selective_scan", "Emit", "Emission", "ScanResult")} <= set(objects)
    assert {"mamba_probe.Probe", "mamba_probe.Recorder", "mamba_probe.trace.ProbeAccessor"} <= set(objects)


def test_links_to_scripts_lead_to_their_pictures(navigation):
    assert navigation.to_gallery("[a](../examples/haar.py)") == "[a](/docs/gallery/haar.rst)"
    assert navigation.to_gallery("[a](examples/README.md)") == "[a](/docs/gallery/index.rst)"
    assert navigation.to_gallery("4 rows (examples/haar.py).") == "4 rows ([examples/haar.py](/docs/gallery/haar.rst))."
    kept = "[a](../examples/record_many_gpus.py) [b](haar.py)"
    assert navigation.to_gallery(kept) == kept


def test_every_image_is_on_a_page():
    text = "".join(path.read_text() for path in [ROOT / "README.md", *DOCS.rglob("*.md")])
    for path in (DOCS / "images").iterdir():
        assert f"images/{path.name})" in text, path.name


LOADS = re.compile(r"""<(?:script|link|img|iframe|source)\b[^>]*?\b(?:src|href)=["'](?:https?:)?//[^>]*""")


@pytest.mark.long
def test_the_site_is_built_without_a_warning_and_fetches_nothing():
    done = subprocess.run(["make", "docs"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    built = DOCS / "_build/html"
    html = sorted(built.rglob("*.html"))
    assert len(html) > 50
    for page in html:
        assert not LOADS.search(page.read_text()), page
    for sheet in built.rglob("*.css"):
        assert not re.search(r"url\(['\"]?(?:https?:)?//|@import", sheet.read_text()), sheet
    assert "<math" in (built / "docs/notation.html").read_text()
    assert len(list((built / "_images").glob("sphx_glr_*.png"))) > 20
