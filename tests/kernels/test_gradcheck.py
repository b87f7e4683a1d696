"""The Triton scan and its backward in float64 against finite differences."""

import pytest


def test_interpreted_derivatives(interpreted):
    assert len(interpreted("finite_differences.py")) == 13


@pytest.mark.long
def test_interpreted_derivatives_one_by_one(interpreted):
    assert len(interpreted("finite_differences.py", "all")) == 15
