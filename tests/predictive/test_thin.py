"""Fits of a few samples, whose factors lack rank, against dense matrices of the same posterior."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from laplace_debiased.curvature.rows.rotated import PositionRows
from laplace_debiased.posterior import DebiasedKronLaplace, DebiasedKronLLLaplace
from laplace_debiased.predictive import OutputCovariance
from tests import oracles
from tests.moments import moments
from tests.moments import sweep as sweep_of
from tests.predictive.test_moments import dense_covariance, per_sample
from tests.tolerances import FINITE_DIFFERENCE, assert_exact, assert_same, relative_error
from tests.zoo import Problem

N_CLASSES = 3
PRIORS = torch.tensor([1e-3, 0.5, 40.0], dtype=torch.float64)


class Swapped(nn.Module):
    """An embedding, and a linear layer over its positions."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.inner = nn.Embedding(9, 8), nn.Linear(8, 6)
        self.head = nn.Linear(6, N_CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        tokens = (x.flatten(1)[:, :3].abs() * 4).long().clamp_max(8)
        return self.head(torch.tanh(self.inner(self.table(tokens))).mean(1))


class Attending(nn.Module):
    """Gradients of the keys add up to zero over positions: a group of lower rank."""

    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(18, 2, batch_first=True)
        self.norm, self.head = nn.LayerNorm(18), nn.Linear(36, N_CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        x = x.reshape(len(x), 2, 18)
        return self.head(self.norm(x + self.attention(x, x, x)[0]).flatten(1))


def convolutional(first: nn.Module, width: int) -> nn.Module:
    return nn.Sequential(first, nn.Tanh(), nn.Flatten(), nn.Linear(width, N_CLASSES))


NETWORKS: dict[str, Callable[[], nn.Module]] = {
    "mlp": lambda: nn.Sequential(
        nn.Flatten(), nn.Linear(36, 11), nn.Tanh(), nn.Linear(11, N_CLASSES)
    ),
    "convolution": lambda: convolutional(nn.Conv2d(4, 6, 2, padding=1, stride=2), 24),
    "wide": lambda: convolutional(nn.Conv2d(4, 40, 3), 40),
    "groups": lambda: convolutional(nn.Conv2d(4, 12, 3, groups=2), 12),
    "transposed": lambda: convolutional(nn.ConvTranspose2d(4, 6, 3, stride=3), 486),
    "norm": lambda: nn.Sequential(
        nn.BatchNorm2d(4), nn.Flatten(), nn.LayerNorm(36), nn.Linear(36, N_CLASSES)
    ),
    "tokens": Swapped,
    "attention": Attending,
}
CAPPED = ("mlp", "convolution", "wide", "groups", "transposed", "attention")
CASES = [(name, 1024) for name in NETWORKS] + [(name, 2) for name in CAPPED]


def problem(name: str, n: int = 12) -> Problem:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        model = NETWORKS[name]().double().eval()
        x = torch.randn(n, 4, 3, 3, dtype=torch.float64)
        y = torch.randn(n, N_CLASSES, dtype=torch.float64)
    return Problem(model, x, y, "regression")


def fitted(p: Problem, max_rank: int = 1024, **options: object) -> DebiasedKronLaplace:
    la = DebiasedKronLaplace(
        p.model,
        p.likelihood,
        max_rank=max_rank,
        sigma_noise=0.6,
        temperature=1.7,
        prior_precision=0.4,
        **options,
    )
    la.fit(p.loader(slice(0, 2)), magnitude_loader=p.loader(slice(2, 5)), n_data=50)
    return la


def thin_sides(la: DebiasedKronLaplace) -> int:
    return sum(block.is_thin for block in la.H.blocks)


@pytest.mark.parametrize(("name", "max_rank"), CASES)
def test_magnitudes_are_the_dense_curvature_its_complement_averaged(
    name: str, max_rank: int
) -> None:
    p = problem(name)
    la = fitted(p, max_rank)
    assert thin_sides(la) >= 1
    matrix = 50 * oracles.ggn(p, la.coverage.covered, slice(2, 5))
    assert_exact(oracles.table(la.H), oracles.directional(la.H, matrix))
    counted = sum((b.multiplicities() * b.eigenvalues).sum() for b in la.H.blocks)
    assert_exact(counted, matrix.trace())


@pytest.mark.parametrize(("name", "max_rank"), CASES)
def test_covariances_and_sweeps_are_the_dense_posteriors(name: str, max_rank: int) -> None:
    p = problem(name)
    la = fitted(p, max_rank)
    x = p.x[6:10]
    joint = dense_covariance(la, x)
    assert_exact(la(x, joint=True)[1], joint)
    assert_exact(la(x)[1], per_sample(joint, 4))
    assert_exact(la(x, diagonal_output=True)[1], per_sample(joint, 4).diagonal(dim1=1, dim2=2))
    for diagonal in (False, True):
        _, swept = sweep_of(la, x, PRIORS, diagonal)
        alone = la.predictor.sweep(x, la._H_factor, PRIORS, diagonal=diagonal).prior_only
        jacobian = oracles.jacobian(p.model, x, la.coverage.covered)
        expected = jacobian @ jacobian.mT
        assert_exact(alone, expected.diagonal(dim1=1, dim2=2) if diagonal else expected)
        for prior, actual in zip(PRIORS, swept, strict=True):
            la.prior_precision = prior
            expected = per_sample(dense_covariance(la, x), 4)
            assert_exact(actual, expected.diagonal(dim1=1, dim2=2) if diagonal else expected)


def test_few_positions_are_not_written_out() -> None:
    p = problem("convolution")
    la = fitted(p)
    (chunk,) = la.predictor.engine.chunks(p.x[:2], lambda f, rows: f.unsqueeze(-1))
    name, rows = next(iter(chunk.blocks))
    assert name == la.coverage.covered[0]
    assert isinstance(rows.rotated(la.H.blocks[0]), PositionRows)


@pytest.mark.parametrize("name", NETWORKS)
def test_re_batching_and_reordering_change_nothing(name: str) -> None:
    p = problem(name)
    order = [1, 0]
    results = []
    for index, batch_size in (([0, 1], 2), ([0, 1], 1), (order, 2)):
        la = DebiasedKronLaplace(p.model, p.likelihood, prior_precision=0.4)
        held = p.loader([2, 3, 4] if index != order else [4, 2, 3], batch_size)
        la.fit(p.loader(index, batch_size), magnitude_loader=held, n_data=50)
        results.append((la(p.x[6:])[1], la.log_marginal_likelihood()))
    for covariance, evidence in results[1:]:
        assert_same(covariance, results[0][0])
        assert_same(evidence, results[0][1])


@pytest.mark.parametrize("scheme", ["cross_fit", "single"])
@pytest.mark.parametrize("magnitudes", ["kfac", "ggn"])
def test_every_scheme_predicts_as_its_dense_precision(scheme: str, magnitudes: str) -> None:
    p = problem("convolution")
    la = DebiasedKronLaplace(
        p.model, p.likelihood, scheme=scheme, magnitudes=magnitudes, prior_precision=0.4
    )
    la.fit(p.loader(slice(0, 3)), n_data=50, seed=1)
    assert thin_sides(la) >= 1
    joint = dense_covariance(la, p.x[6:10])
    assert_exact(la(p.x[6:10])[1], per_sample(joint, 4))
    precision = oracles.dense_precision(la.H, la.prior_precision.double())
    assert_exact(la.log_det_posterior_precision, torch.logdet(precision))


@pytest.mark.parametrize("likelihood", ["regression", "classification"])
@pytest.mark.parametrize("max_rank", [2, 1024])
def test_last_layers_predict_as_their_dense_precision(likelihood: str, max_rank: int) -> None:
    p = problem("mlp")
    y = p.y if likelihood == "regression" else p.y.argmax(1)
    la = DebiasedKronLLLaplace(p.model, likelihood, prior_precision=0.4, max_rank=max_rank)
    loaders = [
        DataLoader(TensorDataset(p.x[part], y[part]), batch_size=2)
        for part in (slice(0, 2), slice(2, 5))
    ]
    la.fit(loaders[0], magnitude_loader=loaders[1], n_data=50)
    assert thin_sides(la) >= 1
    q = Problem(p.model, p.x, y, likelihood)
    matrix = 50 * oracles.ggn(q, la.coverage.covered, slice(2, 5))
    assert_exact(oracles.table(la.H), oracles.directional(la.H, matrix))
    x = p.x[6:10]
    flat = oracles.jacobian(p.model, x, la.coverage.covered).flatten(0, 1)
    precision = oracles.dense_precision(la.H, la.prior_precision.double())
    joint = flat @ torch.linalg.solve(precision, flat.T)
    blocks = per_sample(joint, 4)
    for kind, expected in (
        (OutputCovariance.PER_SAMPLE, blocks),
        (OutputCovariance.JOINT, joint),
        (OutputCovariance.DIAGONAL, blocks.diagonal(dim1=1, dim2=2)),
    ):
        assert_exact(moments(la, x, kind)[1], expected)
    _, swept = sweep_of(la, x, PRIORS, False)
    for prior, actual in zip(PRIORS, swept, strict=True):
        precision = oracles.dense_precision(la.H, prior.reshape(1))
        expected = per_sample(flat @ torch.linalg.solve(precision, flat.T), 4)
        assert_exact(actual, expected)


@pytest.mark.parametrize("name", ["mlp", "convolution", "groups"])
def test_float32_covariances_are_float64s(name: str) -> None:
    p = problem(name)
    expected = fitted(p)(p.x[6:10])[1]
    small = Problem(p.model.float(), p.x.float(), p.y.float(), p.likelihood)
    assert_exact(fitted(small)(small.x[6:10])[1], expected.float())


@pytest.mark.parametrize("name", ["mlp", "convolution", "groups"])
def test_gradients_of_covariances_reach_the_inputs(name: str) -> None:
    p = problem(name)
    la = fitted(p, enable_backprop=True)
    x = p.x[6:8].clone().requires_grad_()
    direction = torch.randn(x.shape, dtype=x.dtype, generator=torch.Generator().manual_seed(0))
    (gradient,) = torch.autograd.grad(la(x)[1].sum(), x)
    step = 1e-5
    high, low = (la((x + s * direction).detach())[1].sum().detach() for s in (step, -step))
    along = (gradient * direction).sum().reshape(1)
    assert relative_error(along, (high - low).reshape(1) / (2 * step)) < FINITE_DIFFERENCE
