"""The deterministic link: against many draws and high-order quadrature, and whatever the batch."""

from __future__ import annotations

import math
from functools import cache

import numpy as np
import pytest
import torch
from scipy.integrate import quad
from scipy.special import expit
from torch import Tensor

from laplace_debiased.likelihoods import gaussian_samples, monte_carlo, mutual_information, probit
from laplace_debiased.likelihoods.integrals import (
    centred,
    normal_points,
    pivoted_root,
    symmetric_root,
)
from tests.tolerances import assert_exact

SCALES = [10.0**k for k in range(-4, 7)]
"""Of the output covariance: what a grid of prior precisions from 1e6 down to 1e-4 gives."""


def moments(m: int = 16, n_classes: int = 10, dtype: torch.dtype = torch.float64):
    """Means and covariances of unit variance with a spectrum and a shared shift, as networks'."""
    g = torch.Generator().manual_seed(0)
    mean = 3 * torch.randn(m, n_classes, generator=g, dtype=torch.float64)
    decay = torch.arange(1, 21, dtype=torch.float64) ** -0.5
    root = torch.randn(m, n_classes, 20, generator=g, dtype=torch.float64) * decay
    covariance = root @ root.mT / root.square().sum(-1).mean() + 1.0
    return mean.to(dtype), covariance.to(dtype)


@cache
def by_draws(scale: float, n: int = 60_000) -> Tensor:
    """E[softmax] by random draws, an oracle that shares no code with the link."""
    mean, covariance = moments()
    covariance = covariance * scale
    root = torch.linalg.cholesky(covariance + 1e-9 * covariance.abs().amax() * torch.eye(10))
    g, total = torch.Generator().manual_seed(1), torch.zeros_like(mean)
    for _ in range(n // 2000):
        noise = torch.randn(len(mean), mean.shape[-1], 2000, generator=g, dtype=torch.float64)
        total += torch.softmax(mean.unsqueeze(-1) + root @ noise, 1).sum(-1)
    return total / n


def kl(p: Tensor, q: Tensor) -> float:
    p, q = p.double(), q.double()
    return float((p * (p.log() - q.log())).sum(-1).mean())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_default_link_is_as_good_as_twenty_thousand_draws_at_every_scale(
    dtype: torch.dtype,
) -> None:
    """60,000 draws have a KL of at most 9/120,000 = .075e-3 themselves."""
    mean, covariance = moments(dtype=dtype)
    worst_probit = 0.0
    for scale in SCALES:
        expected = by_draws(scale)
        assert kl(expected, monte_carlo(mean, covariance * scale)) <= 0.3e-3, scale
        variance = (covariance * scale).diagonal(dim1=1, dim2=2)
        worst_probit = max(worst_probit, kl(expected, probit(mean, variance)))
    assert worst_probit > 0.1  # what the oracle is able to see


def test_more_points_are_taken_only_where_they_are_needed() -> None:
    mean, covariance = moments()
    certain, wide = covariance * 0.1, covariance * 1e3
    assert torch.equal(monte_carlo(mean, certain), monte_carlo(mean, certain, 256))
    assert not torch.equal(monte_carlo(mean, wide), monte_carlo(mean, wide, 256))
    mixed = torch.cat([certain[:8], wide[8:]])
    expected = torch.cat([monte_carlo(mean, certain)[:8], monte_carlo(mean, wide)[8:]])
    assert torch.equal(monte_carlo(mean, mixed), expected)


def test_few_directions_of_a_large_variance_take_more_points() -> None:
    """Steps in the probabilities that 256 points miss, and that the spread does not tell."""
    g = torch.Generator().manual_seed(3)
    n, n_classes = 24, 10
    mean = 2.0 * torch.randn(n, n_classes, generator=g, dtype=torch.float64)
    mean[:, 0] += 16.0
    root = torch.randn(n, n_classes, 4, generator=g, dtype=torch.float64)
    covariance = 4.0 * root @ root.mT
    expected = monte_carlo(mean, covariance, 2**17)
    coarse = monte_carlo(mean, covariance, 256)
    assert kl(expected, coarse) >= 0.5e-3  # what the points are for
    assert kl(expected, monte_carlo(mean, covariance)) <= 0.1e-3
    shared = covariance + 100.0  # what all outputs share moves no probability
    assert kl(expected, monte_carlo(mean, shared)) <= 0.1e-3


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(
    ("n_classes", "threads"), [(2, 1), (3, 1), (5, 2), (10, 1), (10, 2), (17, 1)]
)
def test_a_sample_gets_the_same_bits_in_every_batch(
    n_classes: int, dtype: torch.dtype, threads: int
) -> None:
    mean, covariance = moments(13, n_classes, dtype)
    covariance = covariance * torch.logspace(-2, 3, 13, dtype=dtype)[:, None, None]
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        for n_points in (None, 7):
            whole = monte_carlo(mean, covariance, n_points)
            information = mutual_information(mean, covariance)
            assert torch.equal(whole, monte_carlo(mean, covariance, n_points))
            for size in (1, 5):
                parts = list(zip(mean.split(size), covariance.split(size), strict=True))
                links = [monte_carlo(mu, sigma, n_points) for mu, sigma in parts]
                assert torch.equal(torch.cat(links), whole), (size, n_points)
                shares = [mutual_information(mu, sigma) for mu, sigma in parts]
                assert torch.equal(torch.cat(shares), information), size
    finally:
        torch.set_num_threads(before)


def test_no_random_number_is_drawn_and_no_inference_tensor_kept() -> None:
    mean, covariance = moments(4, 6)
    normal_points.cache_clear()
    before = torch.get_rng_state()
    with torch.inference_mode():
        inside = monte_carlo(mean, covariance)
    assert torch.equal(torch.get_rng_state(), before)
    leaf = covariance.clone().requires_grad_(True)
    outside = monte_carlo(mean, leaf)
    assert_exact(outside, inside.clone())
    outside[:, 0].sum().backward()
    assert leaf.grad is not None
    assert torch.isfinite(leaf.grad).all()


def test_gradients_are_those_of_finite_differences() -> None:
    mean, covariance = moments(2, 3)
    covariance = covariance + torch.eye(3)

    def link(mu: Tensor, sigma: Tensor) -> Tensor:
        return monte_carlo(mu, sigma + sigma.mT)

    mean.requires_grad_(True)
    covariance.requires_grad_(True)
    # Roots are cut to multiples of 2⁻³² of their largest entry: steps must be far wider.
    assert torch.autograd.gradcheck(link, (mean, covariance), eps=1e-3, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("rank", [0, 1, 4, 10])
@pytest.mark.parametrize("make", [pivoted_root, symmetric_root])
def test_roots_of_singular_matrices(make, rank: int, dtype: torch.dtype) -> None:
    g = torch.Generator().manual_seed(2)
    root = torch.randn(5, 10, rank, generator=g, dtype=torch.float64)
    covariance = root @ root.mT
    covariance[0] = 1e12 * torch.eye(10)  # regular neighbours are left alone
    found = make(covariance.to(dtype)).double()
    scale = covariance.abs().amax((-2, -1), keepdim=True).clamp_min(1e-30)
    error = ((found @ found.mT - covariance) / scale).abs().amax()
    assert torch.isfinite(found).all()
    assert float(error) <= 100 * torch.finfo(dtype).eps


def test_a_singular_covariance_of_many_outputs_is_survived_in_float32() -> None:
    """Up to 64 outputs by pivoting, beyond by Cholesky factors or eigenvectors."""
    g = torch.Generator().manual_seed(3)
    for n_classes in (64, 65):
        mean = torch.randn(3, n_classes, generator=g)
        root = torch.randn(3, n_classes, 4, generator=g)
        link = monte_carlo(mean, root @ root.mT, 2048)
        expected = monte_carlo(mean, root=root, n_samples=2048)
        assert torch.isfinite(link).all()
        assert kl(expected, link) <= 1e-3


def test_a_shift_that_all_logits_share_changes_nothing() -> None:
    mean, covariance = moments()
    shifted = monte_carlo(mean + 5.0, covariance + 300.0)
    assert kl(monte_carlo(mean, covariance), shifted) <= 1e-9
    assert float(centred(covariance + 300.0).sum(-1).abs().amax()) <= 1e-10


def test_factored_diagonal_and_full_covariances_agree() -> None:
    mean, covariance = moments()
    variance = covariance.diagonal(dim1=1, dim2=2)
    deviations = torch.diag_embed(variance.sqrt())
    independent = monte_carlo(mean, variance, 8192)
    assert kl(independent, monte_carlo(mean, root=deviations, n_samples=8192)) <= 1e-9
    assert kl(independent, monte_carlo(mean, torch.diag_embed(variance), 8192)) <= 0.1e-3
    root = torch.linalg.cholesky(covariance)
    assert kl(monte_carlo(mean, covariance), monte_carlo(mean, root=root)) <= 0.3e-3
    one, two = (
        gaussian_samples(mean, given, 5, torch.Generator().manual_seed(0), root=factor)
        for given, factor in ((covariance, None), (None, root))
    )
    assert_exact(one, two)


def test_positions_of_sequences_are_samples() -> None:
    mean, covariance = moments(6, 4)
    flat = monte_carlo(mean, covariance)
    positions = monte_carlo(mean.reshape(2, 3, 4), covariance.reshape(2, 3, 4, 4))
    assert torch.equal(positions.reshape(6, 4), flat)
    information = mutual_information(mean.reshape(2, 3, 4), covariance.reshape(2, 3, 4, 4))
    assert torch.equal(information.flatten(), mutual_information(mean, covariance))
    square = torch.rand(4, 4, dtype=torch.float64)  # [m, C] variances with m = C are no matrix
    assert monte_carlo(mean[:4, :4], square).shape == (4, 4)


def sigmoid_integral(mu: float, deviation: float, function=expit) -> float:
    def integrand(t: float) -> float:
        return function(t) * math.exp(-0.5 * ((t - mu) / deviation) ** 2)

    reach = 12 * deviation
    ends = [mu - reach, *sorted(p for p in (-40, -5, 0, mu, 5, 40) if abs(p - mu) < reach)]
    pieces = zip(ends, [*ends[1:], mu + reach], strict=True)
    found = sum(quad(integrand, a, b, epsabs=1e-13, epsrel=1e-12)[0] for a, b in pieces)
    return found / (deviation * math.sqrt(2 * math.pi))


@pytest.mark.parametrize("deviation", [1e-3, 0.5, 1.0, 3.9, 4.1, 20.0, 1e3])
@pytest.mark.parametrize("mu", [-12.0, -1.0, 0.0, 0.3, 7.0])
def test_binary_labels_are_integrated_exactly(mu: float, deviation: float) -> None:
    expected = sigmoid_integral(mu, deviation)
    mean, variance = torch.tensor([[mu]]).double(), torch.tensor([[deviation**2]]).double()
    found = float(monte_carlo(mean, variance, inverse_link=torch.sigmoid))
    assert found == pytest.approx(expected, abs=1e-8, rel=1e-6)

    def entropy(t: float) -> float:
        p = np.clip(expit(t), 1e-300, 1 - 1e-16)
        return float(-p * np.log(p) - (1 - p) * np.log1p(-p))

    total = -expected * math.log(expected) - (1 - expected) * math.log1p(-expected)
    information = float(mutual_information(mean, variance, torch.sigmoid))
    within = sigmoid_integral(mu, deviation, entropy)
    assert information == pytest.approx(total - within, abs=1e-7)


def test_binary_labels_take_no_part_in_each_other() -> None:
    mean, covariance = moments(5, 4)
    variance = covariance.diagonal(dim1=1, dim2=2)
    full = monte_carlo(mean, covariance, inverse_link=torch.sigmoid)
    assert torch.equal(full, monte_carlo(mean, variance, inverse_link=torch.sigmoid))
    root = torch.linalg.cholesky(covariance)
    assert_exact(monte_carlo(mean, root=root, inverse_link=torch.sigmoid), full)


def test_mutual_information_is_that_of_many_draws() -> None:
    mean, covariance = moments()
    for scale in (1e-3, 1.0, 100.0):
        g = torch.Generator().manual_seed(4)
        p = torch.softmax(gaussian_samples(mean, covariance * scale, 20_000, g), -1)
        expected = torch.special.entr(p.mean(0)).sum(-1) - torch.special.entr(p).sum(-1).mean(0)
        found = mutual_information(mean, covariance * scale)
        assert float((found - expected).abs().mean()) <= 0.03 * float(expected.mean()) + 1e-5
        assert float(found.min()) >= 0.0


def test_more_dimensions_than_a_sobol_sequence_has() -> None:
    points = normal_points(21_202, 4)
    assert points.shape == (21_202, 4)
    assert torch.equal(points, normal_points(21_202, 4))
    assert abs(float(points.mean())) <= 4 / math.sqrt(points.numel())
    assert float(points.std()) == pytest.approx(1.0, abs=0.02)
    assert torch.equal(normal_points(10, 1024)[:, :256], normal_points(10, 256))
