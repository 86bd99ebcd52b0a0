"""The examples in the docstrings run."""

import doctest

import pytest

from laplace_debiased.optim import cg, newton_cg


@pytest.mark.parametrize("module", [cg, newton_cg])
def test_examples_in_docstrings(module):
    found = doctest.testmod(module)
    assert found.attempted > 0
    assert found.failed == 0
