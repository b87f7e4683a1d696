"""Cases drawn from committed seeds, each a clean result or our error; the corpus of what was a finding once.

`benchmarks/fuzz.py` runs all of it and writes benchmarks/results/fuzz.md.
"""

import call_cases
import checkpoint_cases
import probe_cases
import pytest
import scan_cases
import trace_cases
from harness import Fuzzer, Unclean, explored, judged, replayed
from hypothesis import strategies as st

FUZZERS = {
    module.FUZZER.name: module.FUZZER for module in (scan_cases, checkpoint_cases, probe_cases, trace_cases, call_cases)
}
SHARDS = [(name, seed) for name, each in FUZZERS.items() for seed in range(1, 1 + each.long // each.shard)]


def test_there_are_ten_thousand_cases():
    assert sum(FUZZERS[name].shard for name, _ in SHARDS) >= 10_000


def held(found, record_property):
    for kind, count in found.counts.items():
        record_property(kind, count)
    assert not found.findings, found.text()


@pytest.mark.parametrize("name", FUZZERS)
def test_what_was_a_finding_once(name, record_property):
    held(replayed(FUZZERS[name]), record_property)


@pytest.mark.parametrize("name", FUZZERS)
def test_some_cases(name, record_property):
    held(explored(FUZZERS[name], FUZZERS[name].short, 0), record_property)


@pytest.mark.long
@pytest.mark.parametrize(("name", "seed"), SHARDS)
def test_all_cases(name, seed, record_property):
    held(explored(FUZZERS[name], FUZZERS[name].shard, seed), record_property)


def _refuse(_case):
    from mamba_probe.arguments import whole

    whole("seed", -1)


def _borrowed(_case):
    int("no number")


def _wrong(_case):
    raise Unclean("NaN")


@pytest.mark.parametrize(
    ("run", "verdict"),
    [(lambda case: None, "clean"), (_refuse, "our error"), (_borrowed, "finding"), (_wrong, "finding")],
)
def test_the_verdict(run, verdict):
    """Ours is what our code raised itself; a ValueError of Python's own is none."""
    found = explored(Fuzzer("test", st.integers(), run, 1, 1), 3, 0)
    assert set(found.counts) == {verdict}
    assert bool(found.findings) == (verdict == "finding")
    judged(Fuzzer("test", st.integers(), run, 1, 1), 0, found)
