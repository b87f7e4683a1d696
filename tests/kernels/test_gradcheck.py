"""The Triton scan and its backward in float64 against finite differences."""

import pytest


def test_interpreted_derivatives(script):
    assert len(script("finite_differences.py", TRITON_INTERPRET="1")) == 13


@pytest.mark.long
def test_interpreted_derivatives_one_by_one(script):
    assert len(script("finite_differences.py", "all", TRITON_INTERPRET="1")) == 15
