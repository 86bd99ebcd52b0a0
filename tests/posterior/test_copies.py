"""Copies and pickles of a posterior are posteriors of their own, on a model of their own."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch

from laplace_debiased import DebiasedLaplace
from laplace_debiased.errors import ModelChangedError, NotFittedError
from tests.posterior.cases import INPUTS, STRUCTURES, assert_equal, fitted, loader, network
from tests.untouched import untouched

COPIES: dict[str, Callable[[Any], Any]] = {
    "deepcopy": copy.deepcopy,
    "pickle": lambda la: pickle.loads(pickle.dumps(la)),
}


@pytest.mark.parametrize("how", COPIES)
@pytest.mark.parametrize("structure", STRUCTURES)
def test_copy_is_equal_and_independent(structure: str, how: str) -> None:
    la = fitted(structure, strict=False, prior_precision=2.0, temperature=0.5)
    with untouched(la._target.model):
        twin = COPIES[how](la)
    assert type(twin) is type(la)
    assert_equal(twin, la)
    assert twin._target.model is not la._target.model
    expected = la(INPUTS)
    with torch.no_grad():
        twin._target.model[3].weight += 1
    with pytest.raises(ModelChangedError):
        twin(INPUTS)
    twin.fit(loader())
    assert not torch.equal(twin(INPUTS), expected)
    assert torch.equal(la(INPUTS), expected)


@pytest.mark.parametrize("how", COPIES)
def test_copied_last_layer_does_not_write_to_the_originals_features(how: str) -> None:
    la = fitted("kron_last_layer")
    la(INPUTS)
    twin = COPIES[how](la)
    expected = la(INPUTS)
    twin(INPUTS[:4])
    for one in (la, twin):
        assert not one.model.last_layer._forward_hooks
        assert not one.model._features
    assert torch.equal(la(INPUTS), expected)


@pytest.mark.parametrize("how", COPIES)
@pytest.mark.parametrize("structure", STRUCTURES)
def test_unfitted_posterior_is_copied_with_its_options(structure: str, how: str) -> None:
    subset, hessian = STRUCTURES[structure]
    la = DebiasedLaplace(
        network(), "regression", subset, hessian, sigma_noise=0.3, prior_precision=4.0, folds=3
    )
    twin = COPIES[how](la)
    with pytest.raises(NotFittedError):
        twin(INPUTS)
    assert float(twin.prior_precision) == 4.0
    assert float(twin.sigma_noise) == pytest.approx(0.3)
    assert twin.arguments.options.folds == 3


def test_shallow_copy_shares_the_model() -> None:
    la = fitted("kron")
    twin = copy.copy(la)
    assert twin.model is la.model
    twin.prior_precision = 7.0
    assert float(la.prior_precision) == 1.0
