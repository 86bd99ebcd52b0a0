"""After the marginal likelihood, training samples tell whether its prior does harm."""

from __future__ import annotations

import warnings

import pytest
import torch
from torch.utils.data import DataLoader, IterableDataset, TensorDataset

from laplace_debiased import DebiasedLaplace
from laplace_debiased.tuning import marglik
from tests.likelihoods.problems import NAMES, case
from tests.untouched import untouched
from tests.zoo import Problem, problem

HARM = "predicts training samples far worse than the MAP model"


def certain(factor: float = 8.0, n: int = 60) -> Problem:
    """A network that fits its training labels closely."""
    p = problem("mlp", n=n)
    with torch.no_grad():
        p.model[2].weight.mul_(factor)
        labels = p.model(p.x).argmax(-1)
    return Problem(p.model, p.x, labels, "classification")


def fitted(p: Problem, loader: object = None, **kwargs: object):
    la = DebiasedLaplace(p.model, p.likelihood, **kwargs)
    la.fit(loader or p.loader(), n_samples=None)
    return la


def nlls(la, p: Problem) -> tuple[float, float]:
    """Of the posterior and the MAP model, by ``la(x)`` and torch's loss."""
    own = -la(p.x).gather(-1, p.y.unsqueeze(-1)).log().mean()
    with torch.no_grad():
        return float(own), float(torch.nn.functional.cross_entropy(la.model(p.x), p.y))


@pytest.mark.parametrize("structure", ["scalar", "layerwise"])
@pytest.mark.parametrize("kind", ["kron", "lowrank"])
def test_harm_is_told_once_with_figures_and_remedy(
    kind: str, structure: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    p, limit = certain(), 0.1 if kind == "kron" else 1e-4
    monkeypatch.setattr(marglik, "_HARM", limit)
    la = fitted(p, hessian_structure=kind)
    with untouched(p.model, p.loader()), pytest.warns(UserWarning, match=HARM) as caught:
        la.optimize_prior_precision(n_steps=0, init_prior_prec=1e-7, prior_structure=structure)
    assert len(caught) == 1
    assert caught[0].filename == __file__
    own, network = nlls(la, p)
    assert own > network + limit
    text = str(caught[0].message)
    assert f"NLL {own:.3g} against {network:.3g} on 60 of them" in text
    assert "optimize_prior_precision(val_loader=...)" in text


def test_a_prior_that_costs_little_says_nothing() -> None:
    p = problem("mlp", n=60)  # random labels: nothing is fitted closely
    la = fitted(p)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        la.optimize_prior_precision(n_steps=5)
        # A model from a file knows no training samples.
        other = DebiasedLaplace(certain().model)
        other.load_state_dict(fitted(certain()).state_dict())
        other.optimize_prior_precision(n_steps=5)


class Stream(IterableDataset):
    def __init__(self, p: Problem) -> None:
        self.p = p

    def __iter__(self):
        return iter(zip(self.p.x, self.p.y, strict=True))


@pytest.mark.parametrize("stream", [False, True])
def test_it_looks_at_so_many_samples_of_the_training_set(
    stream: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    p = certain()
    monkeypatch.setattr("laplace_debiased.posterior.priors.N_SAMPLES", 20)
    loader = DataLoader(Stream(p), batch_size=5) if stream else p.loader()
    la = DebiasedLaplace(p.model)
    la.fit(loader, n_samples=None, n_data=60)
    with pytest.warns(UserWarning, match="on 20 of them"):
        la.optimize_prior_precision(n_steps=0, init_prior_prec=1e-7)


@pytest.mark.parametrize("name", NAMES)
def test_every_likelihood_is_compared(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    c = case(name)
    la = c.posterior()
    la.fit(c.loader())
    monkeypatch.setattr(marglik, "_HARM", -torch.inf)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        la.optimize_prior_precision(n_steps=1)
    assert len(caught) == (0 if c.likelihood == "reward_modeling" else 1)


def test_a_loader_that_fails_leaves_the_prior_as_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    p = certain()
    la = fitted(p, prior_precision=3.0)

    def broken(*args: object) -> None:
        raise OSError("the disk is gone")

    monkeypatch.setattr(TensorDataset, "__getitem__", broken)
    with pytest.raises(OSError, match="disk"):
        la.optimize_prior_precision(n_steps=1)
    assert la.prior_precision.item() == 3.0
