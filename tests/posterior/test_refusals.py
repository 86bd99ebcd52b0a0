"""Bad input is refused by name, and nothing is lost."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, IterableDataset, TensorDataset

from laplace_debiased.errors import (
    CoverageError,
    NotFittedError,
    NumericalError,
    ReadOnlyError,
)
from laplace_debiased.factory import DebiasedLaplace
from laplace_debiased.posterior import DebiasedKronLaplace
from tests.zoo import problem


def loader(x: torch.Tensor, y: torch.Tensor, batch_size: int = 5) -> DataLoader:
    return DataLoader(TensorDataset(x, y), batch_size=batch_size)


P = problem("mlp")
R = problem("mlp", "regression")


class Stream(IterableDataset):
    def __iter__(self):
        return zip(P.x, P.y, strict=True)


NAN_LATE = P.x.clone()
NAN_LATE[20, 0] = torch.nan

BAD_FITS = {
    "empty loader": (P, lambda: [], {"n_data": 5}, "empty"),
    "empty by drop_last": (
        P,
        lambda: DataLoader(P.dataset, batch_size=99, drop_last=True),
        {},
        "empty",
    ),
    "label -100": (P, lambda: loader(P.x, P.y - 100), {}, r"0\.\.2"),
    "label out of range": (P, lambda: loader(P.x, P.y + 1), {}, r"0\.\.2"),
    "one-hot labels": (P, lambda: loader(P.x, torch.eye(3)[P.y]), {}, "argmax"),
    "regression target too narrow": (R, lambda: loader(R.x, R.y[:, :1]), {}, r"\(5, 1\)"),
    "regression target too flat": (R, lambda: loader(R.x, R.y[:, 0]), {}, "unsqueeze"),
    "regression target of integers": (R, lambda: loader(R.x, R.y.long()), {}, "floating"),
    "regression target NaN": (R, lambda: loader(R.x, R.y * torch.nan), {}, "NaN"),
    "NaN data": (P, lambda: loader(P.x * torch.nan, P.y), {}, "NaN"),
    "NaN data late": (P, lambda: loader(NAN_LATE, P.y), {}, "NaN"),
    "infinite data": (P, lambda: loader(P.x / 0, P.y), {}, "NaN|infinite"),
    "unknown size": (P, lambda: DataLoader(Stream(), batch_size=5), {}, "n_data"),
    "budget 0": (P, P.loader, {"n_samples": 0}, "n_samples"),
    "budget over N": (P, P.loader, {"n_samples": 27}, r"n_samples=27 exceeds"),
    "budget unknown": (P, P.loader, {"n_samples": "all"}, "'auto'"),
    "budget from a stream": (
        P,
        lambda: DataLoader(Stream(), batch_size=5),
        {"n_samples": 8, "n_data": 26},
        "n_samples",
    ),
    "n_data 0": (P, P.loader, {"n_data": 0}, "n_data"),
    "budget and two loaders": (
        P,
        P.loader,
        {"magnitude_loader": P.loader(), "n_samples": 5, "n_data": 9},
        "Give one of the two",
    ),
}


@pytest.mark.parametrize("options", [{}, {"scheme": "single", "magnitudes": "kfac"}])
@pytest.mark.parametrize("case", BAD_FITS)
def test_bad_fit_names_the_argument_and_keeps_the_posterior(
    case: str, options: dict, untouched
) -> None:
    p, make, kwargs, message = BAD_FITS[case]
    la = DebiasedKronLaplace(p.model, p.likelihood, **options)
    la.fit(p.loader())
    evidence, before = la.log_marginal_likelihood(), la.H
    with untouched(p.model), pytest.raises(ValueError, match=message):
        la.fit(make(), **kwargs)
    assert la.H is before
    assert la.log_marginal_likelihood() == evidence
    fresh = DebiasedKronLaplace(p.model, p.likelihood, **options)
    with pytest.raises(ValueError, match=message):
        fresh.fit(make(), **kwargs)
    with pytest.raises(NotFittedError):
        fresh.log_marginal_likelihood()


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_weights_that_are_not_finite_are_named(bad: float) -> None:
    p = problem("mlp")
    la = DebiasedKronLaplace(p.model)
    with torch.no_grad():
        p.model[2].bias[1] = bad
    with pytest.raises(NumericalError, match=r"'2\.bias'"):
        la.fit(p.loader())


POSITIVE = [-1.0, 0.0, float("nan"), float("inf")]


@pytest.mark.parametrize("value", POSITIVE)
@pytest.mark.parametrize("name", ["prior_precision", "sigma_noise", "temperature"])
def test_hyper_parameters_must_be_positive(name: str, value: float) -> None:
    with pytest.raises(ValueError, match=f"{name} must be positive"):
        DebiasedKronLaplace(R.model, "regression", **{name: value})
    la = DebiasedKronLaplace(R.model, "regression")
    la.fit(R.loader())
    before = la(R.x)[1]
    with pytest.raises(ValueError, match=f"{name} must be positive"):
        setattr(la, name, value)
    if name != "temperature":
        with pytest.raises(ValueError, match=f"{name} must be positive"):
            la.log_marginal_likelihood(**{name: torch.tensor(value)})
    assert torch.equal(la(R.x)[1], before)


def test_prior_of_the_wrong_length_names_the_tensors() -> None:
    message = r"4 here: 0\.weight, 0\.bias, 2\.weight, 2\.bias"
    for prior in (torch.ones(3), torch.ones(43), torch.ones(4, 1)):
        with pytest.raises(ValueError, match=message):
            DebiasedKronLaplace(P.model, prior_precision=prior)
    with pytest.raises(ValueError, match="prior_mean must be finite"):
        DebiasedKronLaplace(P.model, prior_mean=float("nan")).fit(P.loader())


BAD_OPTIONS: dict[str, tuple[dict, type[Exception], str]] = {
    "unknown option": ({"shceme": "single"}, TypeError, "'shceme'"),
    "unknown scheme": ({"scheme": "both"}, ValueError, "'cross_fit'"),
    "unknown magnitudes": ({"magnitudes": "full"}, ValueError, "'ggn'"),
    "unknown sampling": ({"sampling": "all"}, ValueError, "'curvature'"),
    "unknown fisher": ({"fisher": "true"}, ValueError, "'empirical'"),
    "unknown likelihood": ({"likelihood": "poisson"}, ValueError, "'classification'"),
    "one fold": ({"folds": 1}, ValueError, "folds"),
    "no draws": ({"mc_samples": 0}, ValueError, "mc_samples"),
    "fraction 1": ({"direction_fraction": 1.0}, ValueError, "direction_fraction"),
    "no memory": ({"byte_budget": 0}, ValueError, "byte_budget"),
    "pool 0": ({"pool_size": 0}, ValueError, "pool_size"),
    "weighted factors": (
        {"magnitudes": "kfac", "sampling": "curvature"},
        ValueError,
        "needs magnitudes='ggn'",
    ),
    "rank": ({"rank": 3}, ValueError, "lowrank"),
    "damping": ({"damping": True}, ValueError, "damping"),
    "strict": ({"strict": "yes"}, ValueError, "strict"),
    "sigma in classification": ({"sigma_noise": 2.0}, ValueError, "regression"),
}


@pytest.mark.parametrize("case", BAD_OPTIONS)
def test_bad_option_is_refused_with_the_choices(case: str) -> None:
    kwargs, error, message = BAD_OPTIONS[case]
    with pytest.raises(error, match=message):
        DebiasedLaplace(P.model, **kwargs)


def test_model_must_be_a_module_with_something_to_cover() -> None:
    with pytest.raises(TypeError, match=r"torch\.nn\.Module"):
        DebiasedLaplace(lambda x: x)
    frozen = nn.Linear(2, 2).requires_grad_(False)
    with pytest.raises(CoverageError, match="frozen by the user"):
        DebiasedLaplace(frozen)


@pytest.mark.parametrize(
    "use",
    [
        lambda la: la(P.x),
        lambda la: la.log_marginal_likelihood(),
        lambda la: la.posterior_precision,
        lambda la: la.sample(),
        lambda la: la.state_dict(),
        lambda la: la.optimize_prior_precision(),
        lambda la: la.predictive_samples(P.x),
        lambda la: la.bias_report(),
        lambda la: la.functional_samples(P.x),
    ],
)
def test_use_before_fit_says_so(use: Callable) -> None:
    with pytest.raises(NotFittedError, match=r"call fit\(train_loader\) first"):
        use(DebiasedKronLaplace(P.model))


@pytest.fixture(scope="module")
def fitted() -> DebiasedKronLaplace:
    la = DebiasedKronLaplace(P.model)
    la.fit(P.loader())
    return la


BAD_CALLS: dict[str, tuple[Callable, str]] = {
    "pred_type": (lambda la: la(P.x, pred_type="mcmc"), "pred_type"),
    "link": (lambda la: la(P.x, link_approx="logit"), "link_approx"),
    "nn with probit": (lambda la: la(P.x, pred_type="nn", link_approx="probit"), "'mc'"),
    "generator": (lambda la: la(P.x, link_approx="mc", generator=3), "generator"),
    "no draws": (lambda la: la(P.x, link_approx="mc", n_samples=0), "n_samples"),
    "no networks": (lambda la: la(P.x, pred_type="nn", n_samples=0), "n_samples"),
    "empty batch": (lambda la: la(P.x[:0]), "no sample"),
    "NaN input": (lambda la: la(P.x * torch.nan), "NaN"),
    "method": (lambda la: la.optimize_prior_precision(method="CV"), "method"),
    "no validation": (lambda la: la.optimize_prior_precision(method="gridsearch"), "val_loader"),
    "empty validation": (lambda la: la.optimize_prior_precision(val_loader=[]), "empty"),
    "no grid": (
        lambda la: la.optimize_prior_precision(val_loader=P.loader(), grid_size=0),
        "grid_size",
    ),
    "grid reversed": (
        lambda la: la.optimize_prior_precision(val_loader=P.loader(), log_prior_prec_min=5),
        "below",
    ),
    "diagonal prior": (lambda la: la.optimize_prior_precision(prior_structure="diag"), "layerwise"),
    "label in validation": (
        lambda la: la.optimize_prior_precision(val_loader=loader(P.x, P.y - 100)),
        r"0\.\.2",
    ),
    "sigma": (lambda la: la.log_marginal_likelihood(sigma_noise=torch.tensor(2.0)), "regression"),
}


@pytest.mark.parametrize("case", BAD_CALLS)
def test_bad_call_is_refused_and_changes_nothing(fitted, case: str) -> None:
    call, message = BAD_CALLS[case]
    before = fitted.prior_precision.clone(), fitted(P.x)
    with pytest.raises(ValueError, match=message):
        call(fitted)
    assert torch.equal(fitted.prior_precision, before[0])
    assert torch.equal(fitted(P.x), before[1])


@pytest.mark.parametrize("kwargs", [{"seed": "a"}, {"n_samples": True}, {"n_data": 2.5}])
def test_numbers_of_the_wrong_type_are_named(kwargs: dict) -> None:
    (name,) = kwargs
    with pytest.raises(TypeError, match=name):
        DebiasedKronLaplace(P.model).fit(P.loader(), **kwargs)


def test_variance_of_one_sampled_network_is_refused() -> None:
    la = DebiasedKronLaplace(R.model, "regression")
    la.fit(R.loader())
    with pytest.raises(ValueError, match="at least 2"):
        la(R.x, pred_type="nn", n_samples=1)


def test_iterators_and_batches_without_targets_are_refused() -> None:
    la = DebiasedKronLaplace(P.model)
    with pytest.raises(TypeError, match="iterator"):
        la.fit(iter(P.loader()), n_data=26)
    with pytest.raises(TypeError, match="pairs"):
        la.fit([P.x], n_data=26)


def test_attributes_of_a_users_own_are_set_as_often_as_they_like() -> None:
    class Noted(DebiasedKronLaplace):
        _key = ("all", "noted")
        calls = 0

        def __init__(self, model: nn.Module) -> None:
            self.early = "a"
            super().__init__(model)
            self.late = "a"

    la = Noted(problem("mlp").model)
    for word in ("b", "c"):
        la.calls += 1
        la.early = la.late = la.note = word
        la.fit(P.loader())
    assert (la.calls, la.early, la.late, la.note) == (2, "c", "c", "c")
    for name in ("n_data", "mean", "loss", "H", "model", "tuning_result", "coverage"):
        with pytest.raises(ReadOnlyError, match=name):
            setattr(la, name, 3)
