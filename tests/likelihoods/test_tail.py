"""Links on the K most probable classes, against the same links on all of them."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from laplace_debiased.likelihoods import ChosenMoments, laplace_bridge, probit
from laplace_debiased.likelihoods.integrals import mean_softmax
from tests.tolerances import assert_exact


def moments(n_classes: int, k: int, m: int = 5, scale: float = 1.0) -> ChosenMoments:
    g = torch.Generator().manual_seed(0)
    mean = 2 * torch.randn(m, n_classes, generator=g, dtype=torch.float64)
    root = scale * torch.randn(m, k, k + 2, generator=g, dtype=torch.float64)
    covariance = root @ root.mT / k + 0.4 * scale**2
    return ChosenMoments(mean, covariance, mean.topk(k).indices)


def completed(c: ChosenMoments) -> Tensor:
    """All of the covariance [m, C, C] that the chosen ones stand for."""
    m, n_classes = c.mean.shape
    k = c.chosen.shape[-1]
    off = ~torch.eye(k, dtype=torch.bool)
    full = torch.empty(m, n_classes, n_classes, dtype=torch.float64)
    for n in range(m):
        v = c.covariance[n]
        full[n] = v[off].mean()
        full[n].diagonal().fill_(v.diagonal().mean())
        full[n][c.chosen[n][:, None], c.chosen[n]] = v
    return full


def kl(p: Tensor, q: Tensor) -> Tensor:
    return (p * (p / q).log()).sum(-1)


@pytest.mark.parametrize("k", [1, 4])
def test_probit_and_bridges_are_those_of_the_completed_covariance(k: int) -> None:
    c = moments(9, k)
    full = completed(c) if k > 1 else None
    if full is None:  # nothing is shared that one output could tell
        full = torch.diag_embed(c.variances.expand(-1, 9).contiguous())
    assert_exact(c.probit(), probit(c.mean, full.diagonal(dim1=1, dim2=2)))
    assert_exact(c.bridge(), laplace_bridge(c.mean, full))
    assert_exact(c.bridge(normalise=True), laplace_bridge(c.mean, full, normalise=True))


def test_a_tail_of_one_class_is_that_class() -> None:
    """All outputs but the last, which shares c with them, against all: the same Gaussian."""
    c = moments(7, 6)
    rest = c.covariance - c.shared()[:, None, None]
    definite = torch.linalg.eigvalsh(rest)[:, 0] > 0  # else c is more than all of them share
    assert int(definite.sum()) >= 3
    p = mean_softmax(c.mean, completed(c), 8192)
    assert float(kl(p, c.monte_carlo(8192))[definite].max()) < 1e-5
    assert_exact(c.monte_carlo().sum(-1), torch.ones(5, dtype=torch.float64))


def test_the_tail_is_integrated_as_all_outputs_are() -> None:
    """500 classes, 16,000 draws (they alone have a KL of about 0.1e-3), seed 0.

    Left at its mean, the tail costs fifty times as much and more.
    """
    c, n, step = moments(500, 16, m=3), 16_000, 2_000
    g = torch.Generator().manual_seed(0)
    shared = c.shared()
    own = (c.variances.mean(-1) - shared).sqrt()
    root = torch.linalg.cholesky(c.covariance)
    total = torch.zeros_like(c.mean)
    for _ in range(n // step):
        noise = torch.randn(step, 3, 500, generator=g, dtype=torch.float64)
        common = torch.randn(step, 3, 1, generator=g, dtype=torch.float64)
        f = c.mean + own[:, None] * noise + shared.sqrt()[:, None] * common
        top = c.mean.gather(1, c.chosen) + torch.einsum("mij,smj->smi", root, noise[..., :16])
        total += torch.softmax(f.scatter(2, c.chosen.expand(step, -1, -1), top), -1).sum(0)
    error = float(kl(total / n, c.monte_carlo()).mean())
    at_its_mean = mean_softmax(c.mean, None, root=_rows_at(c, c._root(shared)))
    assert error < 5e-4
    assert float(kl(total / n, at_its_mean).mean()) > 50 * error


def test_the_tail_tells_as_much_as_all_its_classes_do() -> None:
    """500 classes, 8,000 draws, seed 0: H(E p) − E H(p) to one percent."""
    c, n, step = moments(500, 16, m=3), 8_000, 2_000
    g = torch.Generator().manual_seed(0)
    shared = c.shared()
    own = (c.variances.mean(-1) - shared).sqrt()
    root = c._root(shared)
    total, within = torch.zeros_like(c.mean), torch.zeros(3, dtype=torch.float64)
    for _ in range(n // step):
        f = c.mean + own[:, None] * torch.randn(step, 3, 500, generator=g, dtype=torch.float64)
        noise = torch.randn(step, 3, 16, generator=g, dtype=torch.float64)
        top = c.mean.gather(1, c.chosen) + torch.einsum("mij,smj->smi", root, noise)
        p = torch.softmax(f.scatter(2, c.chosen.expand(step, -1, -1), top), -1)
        total += p.sum(0)
        within += torch.special.entr(p).sum((0, 2))
    expected = torch.special.entr(total / n).sum(-1) - within / n
    torch.testing.assert_close(c.mutual_information(), expected, rtol=0.02, atol=0)


def _rows_at(c: ChosenMoments, root: Tensor) -> Tensor:
    """A root [m, C, K] of all outputs that is zero beyond the chosen ones."""
    index = c.chosen[:, :, None].expand_as(root)
    return torch.zeros(*c.mean.shape, root.shape[-1], dtype=root.dtype).scatter(1, index, root)


def test_independent_outputs_share_nothing() -> None:
    c = moments(30, 5)
    alone = ChosenMoments(c.mean, c.variances, c.chosen)
    assert float(alone.shared().abs().max()) == 0.0
    matrix = ChosenMoments(c.mean, torch.diag_embed(c.variances), c.chosen)
    assert float(kl(matrix.monte_carlo(), alone.monte_carlo()).max()) < 1e-3
    assert_exact(alone.probit(), matrix.probit())


def test_random_draws_follow_the_generator() -> None:
    c = moments(30, 5)
    one, two = (c.monte_carlo(200, torch.Generator().manual_seed(1)) for _ in range(2))
    assert torch.equal(one, two)
    assert float(kl(c.monte_carlo(), one).mean()) < 0.05


def test_gradients_pass_through() -> None:
    c = moments(7, 3, m=2)
    mean, covariance = c.mean.requires_grad_(), c.covariance.requires_grad_()

    def p(mean: Tensor, covariance: Tensor) -> Tensor:
        symmetric = (covariance + covariance.mT) / 2
        return ChosenMoments(mean, symmetric, c.chosen).probit()

    assert torch.autograd.gradcheck(p, (mean, covariance))
