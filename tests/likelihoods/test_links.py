"""Links against laplace-torch's, at the edges of their range, and by sampling."""

import pytest
import torch
from laplace.baselaplace import BaseLaplace
from torch import Tensor, nn

from laplace_debiased.likelihoods import gaussian_samples, laplace_bridge, monte_carlo, probit
from tests.tolerances import SIGMAS, assert_exact, deviation


def moments(m: int = 6, n_classes: int = 4) -> tuple[Tensor, Tensor]:
    g = torch.Generator().manual_seed(0)
    mean = torch.randn(m, n_classes, generator=g, dtype=torch.float64)
    root = torch.randn(m, n_classes, n_classes, generator=g, dtype=torch.float64)
    return mean, root @ root.mT + 0.1 * torch.eye(n_classes)


class _Host(BaseLaplace):
    """As much of laplace-torch as its links need."""

    def __init__(self, mean: Tensor, covariance: Tensor) -> None:
        self.moments = mean, covariance
        self.model = nn.Linear(1, 1).to(mean.dtype)

    def _glm_predictive_distribution(self, x, joint=False, diagonal_output=False):
        return self.moments[0].clone(), self.moments[1].clone()


@pytest.mark.parametrize("link", ["probit", "bridge", "bridge_norm"])
def test_links_equal_laplace_torchs(link: str) -> None:
    mean, covariance = moments()
    ours = {
        "probit": lambda: probit(mean, covariance.diagonal(dim1=1, dim2=2)),
        "bridge": lambda: laplace_bridge(mean, covariance),
        "bridge_norm": lambda: laplace_bridge(mean, covariance, normalise=True),
    }[link]()
    host = _Host(mean, covariance)._glm_forward_call(None, "classification", link_approx=link)
    assert_exact(ours, host)


@pytest.mark.parametrize("normalise", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_bridge_is_a_distribution_at_logits_that_overflow(
    normalise: bool, dtype: torch.dtype
) -> None:
    mean = torch.tensor([[900.0, 0.0, -900.0], [300.0, 300.0, 0.0], [0.0, 0.0, 0.0]], dtype=dtype)
    covariance = (torch.eye(3, dtype=dtype) + 0.1).expand(3, 3, 3)
    probabilities = laplace_bridge(mean, covariance, normalise=normalise)
    assert torch.isfinite(probabilities).all()
    torch.testing.assert_close(probabilities.sum(-1), torch.ones(3, dtype=dtype))
    assert probabilities[0].argmax() == 0
    torch.testing.assert_close(probabilities[2], torch.full((3,), 1 / 3, dtype=dtype))


def test_links_leave_their_arguments_alone() -> None:
    mean, covariance = moments()
    before = mean.clone(), covariance.clone()
    laplace_bridge(mean, covariance, normalise=True)
    monte_carlo(mean, covariance, 3, torch.Generator())
    assert torch.equal(mean, before[0])
    assert torch.equal(covariance, before[1])


@pytest.mark.parametrize("diagonal", [False, True])
@pytest.mark.parametrize("rank", [1, 4])
def test_samples_have_the_moments_that_were_asked_for(diagonal: bool, rank: int) -> None:
    """Seed 0, 20 000 draws; 10 second and 4 first moments at 4 σ: error rate 0.1 %."""
    mean, covariance = moments(1)
    if rank == 1:  # no Cholesky factor
        column = covariance[0, :, :1]
        covariance = (column @ column.mT).unsqueeze(0)
    given = covariance.diagonal(dim1=1, dim2=2) if diagonal else covariance
    draws = gaussian_samples(mean, given, 20_000, torch.Generator().manual_seed(0))[:, 0]
    centred = draws - mean[0]
    expected = torch.diag(given[0]) if diagonal else covariance[0]
    assert float(deviation(draws, mean[0]).max()) <= SIGMAS + 1
    products = centred.unsqueeze(-1) * centred.unsqueeze(1)
    assert float(deviation(products, expected).max()) <= SIGMAS + 1


def test_zero_covariance_gives_the_softmax() -> None:
    mean, covariance = moments()
    expected = torch.softmax(mean, -1)
    zero = torch.zeros_like(covariance)
    assert_exact(probit(mean, zero.diagonal(dim1=1, dim2=2)), expected)
    assert_exact(monte_carlo(mean, zero, 3, torch.Generator()), expected)


def test_generator_decides_the_draws_and_the_global_one_stays() -> None:
    mean, covariance = moments()
    before = torch.get_rng_state()
    one, two = (
        monte_carlo(mean, covariance, 5, torch.Generator().manual_seed(3)) for _ in range(2)
    )
    assert torch.equal(one, two)
    assert torch.equal(torch.get_rng_state(), before)


def test_no_draws_are_refused() -> None:
    with pytest.raises(ValueError, match="n_samples"):
        monte_carlo(*moments(), 0)
