"""The closed form of a last layer under a softmax is the general way, at C² per sample."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from laplace_debiased import DebiasedLaplace
from laplace_debiased.curvature.rows import BiasRows, MatrixRows
from laplace_debiased.curvature.softmax_head import (
    SoftmaxBiasRows,
    SoftmaxMatrixRows,
    softmax_covariance,
    softmax_curvature,
)
from laplace_debiased.estimation.kron_estimator import SoftmaxHeadEstimator
from laplace_debiased.likelihoods import SoftmaxCrossEntropy

C = 5


def data(n: int = 40, ignored: bool = False) -> tuple[Tensor, Tensor]:
    x = torch.randn(n, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    y = torch.arange(n) % C
    return x, torch.where(torch.arange(n) % 7 == 0, -100, y) if ignored else y


def network(scale: float = 3.0, bias: bool = True) -> nn.Module:
    """Confident on many samples."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(2)
        model = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, C, bias=bias)).double()
    with torch.no_grad():
        model[2].weight *= scale
    return model


def fitted(model: nn.Module, *, batch_size: int = 7, ignored: bool = False, **options: Any) -> Any:
    arguments = {"n_samples": options.pop("n_samples", None), "seed": 3}
    la = DebiasedLaplace(
        model, "classification", "last_layer", ignore_index=-100 if ignored else None, **options
    )
    la.fit(DataLoader(TensorDataset(*data(ignored=ignored)), batch_size=batch_size), **arguments)
    return la


def assert_same_estimate(one: Any, other: Any) -> None:
    """Factors, directional curvature (as matrices: bases may differ by signs) and the rest."""
    for a, b in zip(one.fitted.curvature.folds, other.fitted.curvature.folds, strict=True):
        assert a.n_samples == b.n_samples
        for mine, general in zip(a.blocks, b.blocks, strict=True):
            torch.testing.assert_close(mine.output, general.output, rtol=1e-10, atol=1e-12)
            if general.input is not None:
                torch.testing.assert_close(mine.input, general.input, rtol=1e-10, atol=1e-12)
    for a, b in zip(one.fitted.curvature.tables, other.fitted.curvature.tables, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)
    assert one.loss == other.loss
    assert one.effective_sample_size == pytest.approx(other.effective_sample_size, rel=1e-12)
    x = data()[0]
    for a, b in zip(
        one._glm_predictive_distribution(x), other._glm_predictive_distribution(x), strict=True
    ):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)


CASES: dict[str, dict[str, Any]] = {
    "cross_fit": {},
    "three folds": {"folds": 3},
    "two_batch": {"scheme": "two_batch"},
    "single": {"scheme": "single"},
    "the paper's magnitudes": {"magnitudes": "kfac"},
    "weighted draws": {"sampling": "curvature", "n_samples": 25},
    "weighted draws in two batches": {
        "sampling": "curvature",
        "n_samples": 30,
        "scheme": "two_batch",
    },
    "small chunks": {"byte_budget": 200},
    "labels that do not count": {"ignored": True},
}


@pytest.mark.parametrize("name", CASES)
def test_closed_form_is_the_general_way(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    closed = fitted(network(), **CASES[name])
    monkeypatch.setattr("laplace_debiased.estimation.kron.in_closed_form", lambda walk: walk)
    assert_same_estimate(closed, fitted(network(), **CASES[name]))


@pytest.mark.parametrize("part", ["weight", "bias", "no bias at all"])
def test_parts_of_the_layer(part: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def one() -> Any:
        model = network(bias=part != "no bias at all")
        if part != "no bias at all":
            other = "bias" if part == "weight" else "weight"
            getattr(model[2], other).requires_grad_(False)
        return fitted(model)

    closed = one()
    monkeypatch.setattr("laplace_debiased.estimation.kron.in_closed_form", lambda walk: walk)
    assert_same_estimate(closed, one())


def test_fit_that_is_added_and_batch_sizes(monkeypatch: pytest.MonkeyPatch) -> None:
    def added(batch_size: int) -> Any:
        la = fitted(network(), n_samples=14, batch_size=batch_size)
        loader = DataLoader(TensorDataset(*data()), batch_size=batch_size)
        la.fit(loader, override=False, n_samples=16, seed=4)
        return la

    closed = added(7)
    assert_same_estimate(closed, added(40))
    monkeypatch.setattr("laplace_debiased.estimation.kron.in_closed_form", lambda walk: walk)
    assert_same_estimate(closed, added(7))


@pytest.mark.parametrize(
    ("likelihood", "options", "closed"),
    [
        ("classification", {}, True),
        ("classification", {"fisher": "mc"}, False),
        ("classification", {"fisher": "empirical"}, False),
        ("regression", {}, False),
        ("bernoulli", {}, False),
    ],
)
def test_only_softmax_and_its_own_hessian_have_it(
    likelihood: str, options: dict[str, Any], closed: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    walks = []
    own = SoftmaxHeadEstimator.fold_statistics
    monkeypatch.setattr(
        SoftmaxHeadEstimator,
        "fold_statistics",
        lambda self: walks.append(self.task.plan) or own(self),
    )
    x, y = data()
    targets = y if likelihood == "classification" else nn.functional.one_hot(y, C).double()
    la = DebiasedLaplace(network(), likelihood, "last_layer", **options)
    la.fit(DataLoader(TensorDataset(x, targets), batch_size=10), n_samples=None)
    assert bool(walks) is closed


def columns_of(outputs: Tensor, weights: Tensor) -> Tensor:
    return torch.softmax(outputs, -1).sqrt() * weights.sqrt().unsqueeze(-1)


def dense(outputs: Tensor, weights: Tensor) -> Tensor:
    """Loss Hessians w (diag p − p pᵀ) [m, C, C]."""
    p = torch.softmax(outputs, -1)
    return weights[:, None, None] * (torch.diag_embed(p) - p[:, :, None] * p[:, None])


def problem() -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(5)
    outputs = 3 * torch.randn(12, C, generator=generator, dtype=torch.float64)
    weights = torch.rand(12, generator=generator, dtype=torch.float64)
    weights[3] = 0.0
    basis = torch.randn(C, 4, generator=generator, dtype=torch.float64)
    return outputs, weights, basis


def test_kernels_are_the_dense_hessian() -> None:
    outputs, weights, basis = problem()
    q, hessians = columns_of(outputs, weights), dense(outputs, weights)
    torch.testing.assert_close(softmax_covariance(q), hessians.sum(0), rtol=1e-12, atol=1e-14)
    wanted = torch.einsum("ci,ncd,di->ni", basis, hessians, basis)
    torch.testing.assert_close(softmax_curvature(q, basis), wanted, rtol=1e-10, atol=1e-14)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("margin", [5.0, 15.0, 30.0])
def test_confident_samples_lose_no_digits(dtype: torch.dtype, margin: float) -> None:
    """p_k = 1 − ρ with ρ down to 1e-13: the reference is a root in float64 that keeps it."""
    outputs = problem()[0] / 10
    outputs[torch.arange(12), torch.arange(12) % C] += margin
    ones, basis = torch.ones(12, dtype=torch.float64), problem()[2]
    rounded = outputs.to(dtype)
    root = SoftmaxCrossEntropy().hessian_root(rounded.double())
    q = columns_of(rounded, ones.to(dtype))
    rtol = 1e-5 if dtype is torch.float32 else 1e-10
    expected = (root.mT @ basis).square().sum(1)
    torch.testing.assert_close(softmax_curvature(q, basis.to(dtype)), expected, rtol=rtol, atol=0)
    covariance = torch.einsum("ncr,ndr->cd", root, root)
    torch.testing.assert_close(
        softmax_covariance(q).double(), covariance, rtol=rtol, atol=rtol * float(covariance.max())
    )
    assert float(softmax_curvature(q, torch.ones(C, 1, dtype=dtype)).abs().max()) == 0.0


def test_rows_are_those_of_a_root() -> None:
    outputs, weights, basis = problem()
    q = columns_of(outputs, weights)[:, None, None]
    features = torch.randn(12, 1, 3, generator=torch.Generator().manual_seed(1)).double()
    root = SoftmaxCrossEntropy().hessian_root(outputs) * weights.sqrt()[:, None, None]
    columns = root.mT.unsqueeze(2)

    class Bases:
        output_basis = torch.linalg.qr(basis @ basis.T + torch.eye(C))[0]
        input_basis = torch.linalg.qr(features[:3, 0])[0]

    coefficients = torch.rand(12, generator=torch.Generator().manual_seed(6)).double()
    pairs = [
        (SoftmaxMatrixRows(features, q), MatrixRows(features, columns)),
        (SoftmaxBiasRows(q), BiasRows(columns)),
    ]
    for closed, general in pairs:
        for used in (slice(None), slice(2, 9)):
            mine, wanted = closed.select(used), general.select(used)
            for one, other in (
                tuple(r.column_factor(summed_bias=True) for r in (mine, wanted)),
                (
                    mine.curvature(Bases(), coefficients[used]),
                    wanted.curvature(Bases(), coefficients[used]),
                ),
            ):
                torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-13)
