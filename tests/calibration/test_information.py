"""The epistemic part of the entropy, and what it tells of inputs from elsewhere."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader, TensorDataset

from laplace_debiased import DebiasedLaplace, evaluate
from laplace_debiased.likelihoods import mutual_information, softmax
from tests.likelihoods.problems import case
from tests.zoo import problem


def fitted(**kwargs: object):
    p = problem("mlp", n=40)
    la = DebiasedLaplace(p.model, prior_precision=0.5, **kwargs)
    la.fit(p.loader())
    return la, p


@pytest.mark.parametrize("structure", ["kron", "lowrank"])
@pytest.mark.parametrize("link", ["probit", "mc", None])
def test_it_is_that_of_the_outputs_whatever_the_link(structure: str, link: str | None) -> None:
    la, p = fitted(hessian_structure=structure)
    found = evaluate(la, p.loader(), link_approx=link)
    expected = mutual_information(*la._glm_predictive_distribution(p.x))
    assert found.mutual_information == pytest.approx(float(expected.mean()), rel=1e-9)
    call = {} if link is None else {"link_approx": link}
    probs = la(p.x, **call)
    nll = -probs.gather(-1, p.y.unsqueeze(-1)).log().mean()
    assert found.nll == pytest.approx(float(nll), rel=1e-9)
    assert evaluate(probs, p.y).mutual_information is None
    assert evaluate(la, p.loader(), pred_type="nn").mutual_information is None


def test_it_shrinks_with_the_prior_and_tells_inputs_from_elsewhere() -> None:
    la, p = fitted()
    far = DataLoader(TensorDataset(20 * p.x), batch_size=7)
    found = evaluate(la, p.loader(), ood_loader=far)
    assert found.auroc_information > 0.9
    inside, outside = (
        mutual_information(*la._glm_predictive_distribution(x)).numpy() for x in (p.x, 20 * p.x)
    )
    pairs = np.greater.outer(outside, inside).mean()
    assert found.auroc_information == pytest.approx(pairs)
    threshold = np.sort(inside)[int(np.ceil(0.95 * len(inside))) - 1]
    assert found.fpr95_information == pytest.approx((outside <= threshold).mean())
    la.prior_precision = 1e12
    certain = evaluate(la, p.loader())
    assert certain.mutual_information == pytest.approx(0.0, abs=1e-9)
    assert "mutual_information" in repr(found)


@pytest.mark.parametrize("name", ["multi-label", "binary", "sequence", "sequence ignoring"])
def test_labels_of_a_sample_add_up_and_ignored_positions_do_not_count(name: str) -> None:
    c = case(name)
    la = c.posterior()
    la.fit(c.loader())
    moments = la._glm_predictive_distribution(c.x)
    binary = c.likelihood == "bernoulli"
    expected = mutual_information(*moments, torch.sigmoid if binary else softmax)
    if not binary:
        expected = expected[c.y != -100] if "ignoring" in name else expected.flatten()
    found = evaluate(la, c.loader())
    assert found.n_samples == len(expected)
    assert found.mutual_information == pytest.approx(float(expected.mean()), rel=1e-6)
