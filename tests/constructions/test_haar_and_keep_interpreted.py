"""The Triton kernel without a GPU: small constructions through its interpreter."""

import pytest


@pytest.mark.parametrize(("given", "cases"), [([], 4), pytest.param(["all"], 8, marks=pytest.mark.long)])
def test_the_interpreted_kernel_holds_the_tolerances(interpreted, given, cases):
    assert len(interpreted("interpreted.py", *given)) == cases
