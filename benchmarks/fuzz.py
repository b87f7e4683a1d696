"""Run every fuzzer whole and write benchmarks/results/fuzz.md: cases by fuzzer, and how they ended."""

import argparse
import platform
import subprocess
import sys
import tempfile
import xml.etree.ElementTree as tree
from collections import Counter, defaultdict
from importlib.metadata import version
from pathlib import Path

ROOT = Path(__file__).parents[1]
PACKAGES = ("torch", "transformers", "xarray", "zarr", "hypothesis")
VERDICTS = ("clean", "our error", "finding")
ADDOPTS = "--import-mode=importlib --strict-markers --strict-config -ra"
"""Without the annotations' checks of our own tests: what a user meets."""


def ran(workers: int) -> tree.Element:
    """The report of all tests of tests/fuzz, long ones too."""
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "fuzz.xml"
        subprocess.run(
            [
                sys.executable,
                "-m",
                "pytest",
                "-o",
                f"addopts={ADDOPTS}",
                "-o",
                "timeout=3600",
                "-n",
                str(workers),
                "-q",
                "-m",
                "long or not long",
                f"--junitxml={report}",
                "tests/fuzz/test_fuzz.py",
            ],
            cwd=ROOT,
            check=False,
        )
        return tree.parse(report).getroot()


def counted(report: tree.Element) -> dict[str, Counter[str]]:
    """Verdicts by fuzzer."""
    counts: dict[str, Counter[str]] = defaultdict(Counter)
    for test in report.iter("testcase"):
        name = test.attrib["name"].partition("[")[2].rstrip("]").partition("-")[0]
        for one in test.iter("property"):
            if one.attrib["name"] in VERDICTS:
                counts[name][one.attrib["name"]] += int(one.attrib["value"])
    return counts


def page(counts: dict[str, Counter[str]]) -> str:
    commit = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True, check=True
    )
    rows = [
        [name, *(f"{counts[name][kind]:,}" for kind in VERDICTS), f"{sum(counts[name].values()):,}"] for name in counts
    ]
    total = sum(counts.values(), Counter())
    rows.append(["all", *(f"{total[kind]:,}" for kind in VERDICTS), f"{sum(total.values()):,}"])
    found = f"Python {platform.python_version()}, " + ", ".join(f"{name} {version(name)}" for name in PACKAGES)
    table = "\n".join("| " + " | ".join(row) + " |" for row in rows)
    notes = Path(__file__).with_name("fuzz_notes.md").read_text(encoding="utf-8")
    head = "| fuzzer | clean | our error | finding | cases |\n|---|---|---|---|---|"
    made = f"Written by `python benchmarks/fuzz.py` at {commit.stdout.strip()}, {found}."
    return f"# Fuzzing\n\n{made}\n\n{head}\n{table}\n\n{notes}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--workers", type=int, default=2)
    counts = counted(ran(parser.parse_args().workers))
    (ROOT / "benchmarks" / "results" / "fuzz.md").write_text(page(counts), encoding="utf-8")
    sys.exit(sum(each["finding"] for each in counts.values()) > 0)


if __name__ == "__main__":
    main()
