"""The gallery: examples/ drawn by the build, in a copy, so that nothing is written beside the scripts."""

import re
import shutil
from pathlib import Path
from typing import Any

__all__ = ["FOLDER", "drawn", "gallery"]

FOLDER = "docs/gallery"
TITLE = re.compile(r'r?"""\n(.+)\n=+\n')
HEADER = """
Gallery
=======

One short script a picture. Each runs offline on the models that ship with the package, and says what it asks and how to
read the answer; colours mean the same in all of them (:doc:`/docs/figures`).
"""


def drawn(examples: Path) -> dict[str, str]:
    """Title of each script that has a page: those whose docstring begins with one; others draw nothing, or for long."""
    found = {path.stem: TITLE.match(path.read_text(encoding="utf-8")) for path in sorted(examples.glob("*.py"))}
    return {name: match.group(1) for name, match in found.items() if match}


def gallery(docs: Path) -> dict[str, Any]:
    """Copy the scripts into the build, and say how they are run and shown."""
    examples, copied = docs.parent / "examples", docs / "_build" / "examples"
    copied.mkdir(parents=True, exist_ok=True)
    shown = drawn(examples)
    for gone in {path.stem for path in copied.glob("*.py")} - set(shown):
        (copied / f"{gone}.py").unlink()
    for name in shown:
        shutil.copy2(examples / f"{name}.py", copied)
    (copied / "GALLERY_HEADER.rst").write_text(HEADER, encoding="utf-8")
    return {
        "examples_dirs": str(copied),
        "gallery_dirs": FOLDER,
        "filename_pattern": r"\.py$",
        "within_subsection_order": "ExampleTitleSortKey",
        "abort_on_example_error": True,
        "min_reported_time": 1e9,
        "show_memory": False,
        "show_signature": False,
        "download_all_examples": False,
        "write_computation_times": False,
        "thumbnail_size": (480, 360),
        "reference_url": {"mamba_probe": None},
        "doc_module": ("mamba_probe",),
        "backreferences_dir": f"{FOLDER}/backreferences",
        "reset_modules": ("matplotlib",),
        "image_scrapers": ("matplotlib",),
    }
