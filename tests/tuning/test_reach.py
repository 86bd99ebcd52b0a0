"""The search finds an optimum wherever it lies, and the link with it, and says what it beats."""

from __future__ import annotations

import math
import warnings

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from laplace_debiased import DebiasedLaplace
from laplace_debiased.likelihoods import monte_carlo, probit
from tests.tolerances import INTERPOLATED

KINDS = ("kron", "lowrank", "last_layer")


class Scaled(nn.Module):
    """A linear classifier of inputs times c: its best prior precision is proportional to c²."""

    def __init__(self, scale: float, weight: Tensor) -> None:
        super().__init__()
        self.scale = scale
        self.head = nn.Linear(*weight.shape[::-1], bias=False, dtype=weight.dtype)
        with torch.no_grad():
            self.head.weight.copy_(weight / scale)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.scale * x)


def data(n: int = 60, seed: int = 0) -> TensorDataset:
    """Inputs with labels drawn from a linear classifier."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(n, 6, generator=generator, dtype=torch.float64)
    labels = torch.multinomial((x @ truth().T).softmax(-1), 1, generator=generator).squeeze(-1)
    return TensorDataset(x, labels)


def truth() -> Tensor:
    generator = torch.Generator().manual_seed(7)
    return torch.randn(3, 6, generator=generator, dtype=torch.float64)


VALIDATION = data(40, 1)


def tuned(scale: float, confidence: float = 3.0, kind: str = "kron", **kwargs: object):
    """A posterior of a classifier whose weights are too large, or too small."""
    subset, structure = ("last_layer", "kron") if kind == "last_layer" else ("all", kind)
    la = DebiasedLaplace(Scaled(scale, confidence * truth()), "classification", subset, structure)
    la.fit(DataLoader(data(), batch_size=20), n_samples=None)
    la.optimize_prior_precision(val_loader=DataLoader(VALIDATION, batch_size=20), **kwargs)
    return la


def nll(la) -> float:
    x, y = VALIDATION.tensors
    return float(-la(x).gather(-1, y.unsqueeze(-1)).log().mean())


@pytest.mark.parametrize("kind", KINDS)
def test_no_prior_is_better_than_the_tuned_one_by_1e_4(kind: str) -> None:
    la = tuned(1.0, kind=kind)
    found, best = nll(la), la.prior_precision.item()
    others = []
    for step in torch.linspace(-1.0, 1.0, 41).tolist():
        la.prior_precision = best * 10.0**step
        others.append(nll(la))
    assert min(others) > found - 1e-4
    assert min(others[0], others[-1]) > found + 1e-3, "it lies between the others"


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("optimum", [1e7, 1e-6])
def test_the_optimum_is_found_beyond_the_hosts_grid(optimum: float, kind: str) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        here = tuned(1.0, kind=kind).tuning_result
        assert 1e-2 < here.prior_precision < 1e2, "in the middle of the grid"
        there = tuned(math.sqrt(optimum / here.prior_precision), kind=kind)
    result = there.tuning_result
    assert not result.on_edge
    assert len(result.losses) == 37, "from one pass"
    assert result.prior_precision == pytest.approx(optimum, rel=0.1)
    assert result.loss == pytest.approx(here.loss, rel=INTERPOLATED)
    assert nll(there) == pytest.approx(result.loss, rel=INTERPOLATED)
    assert there.tuned_link_approx == result.link == here.link
    assert result.prior_only_loss == pytest.approx(here.prior_only_loss, rel=1e-6)


@pytest.mark.parametrize("optimum", [1e-9, 1e-13, 1e14])
def test_further_away_it_takes_another_pass(optimum: float) -> None:
    here = tuned(1.0, link_approx="probit").tuning_result
    there = tuned(math.sqrt(optimum / here.prior_precision), link_approx="probit")
    result = there.tuning_result
    assert result.prior_precision == pytest.approx(optimum, rel=0.1)
    assert nll(there) == pytest.approx(result.loss, rel=1e-3), "one node per decade"
    assert (len(result.losses) > 37) == (not 1e-10 < optimum < 1e12)


def test_what_rounding_hides_has_no_loss() -> None:
    far = tuned(1e6).tuning_result
    curves = far.losses_by_link
    assert curves["mc"][0] == math.inf, "a shift of all outputs has 1e22 times the rest's variance"
    assert all(map(math.isfinite, curves["probit"]))
    here = tuned(1.0).tuning_result
    assert far.prior_precision == pytest.approx(1e12 * here.prior_precision, rel=0.1)
    # Down to where it is hidden, the loss of 1e12 times the prior is the same.
    near = dict(zip(here.prior_precisions, here.losses_by_link["mc"], strict=True))
    for prior, loss in zip(far.prior_precisions, curves["mc"], strict=True):
        other = next((v for k, v in near.items() if math.isclose(k * 1e12, prior)), math.nan)
        if math.isfinite(loss) and math.isfinite(other):
            assert loss == pytest.approx(other, rel=1e-3)


def test_where_the_map_model_is_best_it_says_so_and_stays_inside() -> None:
    with pytest.warns(UserWarning, match=r"no better than the [\d.]+ of the MAP model") as caught:
        la = tuned(1.0, confidence=0.3)
    assert len(caught) == 1
    result = la.tuning_result
    assert f"NLL of {result.loss:.4g}" in str(caught[0].message)
    assert result.loss == pytest.approx(result.map_loss, abs=2e-5)
    assert result.prior_only_loss == pytest.approx(result.map_loss, abs=2e-5)
    assert not result.on_edge


@pytest.mark.parametrize("kind", KINDS)
def test_both_links_are_scored_and_the_better_one_is_used(kind: str) -> None:
    la = tuned(1.0, kind=kind)
    result = la.tuning_result
    assert set(result.losses_by_link) == {"mc", "probit"}
    assert result.losses == result.losses_by_link[result.link]
    given = {link: tuned(1.0, kind=kind, link_approx=link) for link in ("mc", "probit")}
    for link, other in given.items():
        assert other.tuned_link_approx == link
        assert list(other.tuning_result.losses_by_link) == [link]
        assert other.tuning_result.losses == pytest.approx(result.losses_by_link[link], rel=1e-9)
        assert nll(other) == pytest.approx(other.tuning_result.loss, rel=INTERPOLATED)
    best = min(given.values(), key=lambda other: other.tuning_result.loss).tuning_result
    assert (result.link, result.loss) == (best.link, best.loss)
    x, _ = VALIDATION.tensors
    assert torch.equal(la(x), la(x, link_approx=result.link))


@pytest.mark.parametrize("kind", KINDS)
def test_the_prior_only_loss_is_that_of_the_jacobian_and_its_optimum(kind: str) -> None:
    la = tuned(1.0, kind=kind)
    result = la.tuning_result
    x, y = VALIDATION.tensors
    # The Jacobian of W x in W: the covariance at prior precision δ is |x|²/δ times the identity.
    unit = x.square().sum(-1)[:, None, None] * torch.eye(3).double()
    with torch.no_grad():
        mean = la.model(x)

    def loss(prior: float, link: str) -> float:
        covariance = unit / prior
        p = (
            monte_carlo(mean, covariance)
            if link == "mc"
            else probit(mean, covariance.diagonal(dim1=-2, dim2=-1))
        )
        return float(-p.gather(-1, y.unsqueeze(-1)).log().mean())

    best, link = result.prior_only_precision, result.prior_only_link
    assert result.prior_only_loss == pytest.approx(loss(best, link), rel=1e-10)
    others = [loss(best * factor, other) for factor in (0.8, 1.25) for other in ("mc", "probit")]
    assert min(others) > result.prior_only_loss


def test_regression_reaches_as_far_and_knows_its_prior_only_loss() -> None:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(40, 3, generator=generator, dtype=torch.float64)
    y = torch.randn(40, 2, generator=generator, dtype=torch.float64)
    loader = DataLoader(TensorDataset(x, y), batch_size=9)
    results = []
    for scale in (1.0, 1e4):
        la = DebiasedLaplace(Scaled(scale, torch.zeros(2, 3).double()), "regression")
        la.sigma_noise = 0.5
        la.fit(loader, n_samples=None)
        la.optimize_prior_precision(val_loader=loader)
        results.append(la.tuning_result)
    one, other = results
    assert one.link is None
    assert one.losses_by_link == {}
    assert other.prior_precision == pytest.approx(1e8 * one.prior_precision, rel=0.05)
    prior = one.prior_only_precision
    variance = (x.square().sum(-1, keepdim=True) / prior + 0.25).expand(-1, 2)
    normal = torch.distributions.Normal(torch.zeros(40, 2).double(), variance.sqrt())
    assert one.prior_only_loss == pytest.approx(float(-normal.log_prob(y).sum(-1).mean()))
    assert one.loss < one.map_loss
