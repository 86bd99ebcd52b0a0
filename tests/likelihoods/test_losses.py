"""Roots, traces and gradients of the loss models against automatic differentiation."""

import pytest
import torch
from torch import Tensor

from laplace_debiased.likelihoods import curvature_columns, loss_model
from laplace_debiased.options import Fisher
from tests import oracles
from tests.tolerances import EXACT, SIGMAS, assert_exact, deviation

EXTREME = torch.tensor(
    [
        [0.0, 0.0, 0.0, 0.0],
        [800.0, 0.0, 1.0, -3.0],
        [0.0, 0.0, 1.0, 800.0],
        [-800.0, 30.0, 30.0, -30.0],
        [40.0, 0.0, -40.0, -80.0],
        [-80.0, -40.0, 0.0, 40.0],
        [1e4, 1e4, -1e4, 0.0],
    ],
    dtype=torch.float64,
)
LIKELIHOODS = ("classification", "regression")


def outputs_and_targets(likelihood: str, m: int = 9) -> tuple[Tensor, Tensor]:
    g = torch.Generator().manual_seed(0)
    f = 2 * torch.randn(m, 4, generator=g, dtype=torch.float64)
    if likelihood == "classification":
        return f, torch.randint(4, (m,), generator=g)
    return f, torch.randn(m, 4, generator=g, dtype=torch.float64)


@pytest.mark.parametrize("likelihood", LIKELIHOODS)
def test_root_trace_and_gradient_are_those_of_the_loss(likelihood: str) -> None:
    f, y = outputs_and_targets(likelihood)
    loss, hessians = loss_model(likelihood), oracles.loss_hessians(likelihood, f, y)
    root = loss.hessian_root(f)
    assert_exact(root @ root.mT, hessians)
    assert_exact(loss.hessian_trace(f), hessians.diagonal(dim1=1, dim2=2).sum(-1))
    leaf = f.clone().requires_grad_()
    total = oracles.loss_of(likelihood, leaf, oracles.as_rows(likelihood, f, y))
    assert_exact(loss.losses(f, y), total)
    (gradient,) = torch.autograd.grad(total.sum(), leaf)
    assert_exact(loss.output_gradient(f, y), gradient)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_softmax_root_at_extreme_logits(dtype: torch.dtype) -> None:
    f = EXTREME.to(dtype)
    p = torch.softmax(EXTREME, -1)
    expected = torch.diag_embed(p) - p.unsqueeze(-1) * p.unsqueeze(1)
    root = loss_model("classification").hessian_root(f)
    assert torch.isfinite(root).all()
    assert float((root @ root.mT - expected).abs().max()) <= EXACT[dtype]
    trace = loss_model("classification").hessian_trace(f)
    assert float((trace - (1 - p.square().sum(-1))).abs().max()) <= EXACT[dtype]
    assert bool((trace >= 0).all())


def test_softmax_root_keeps_the_small_entries_of_a_dominated_row() -> None:
    """At f = (40, 0) the variance p(1−p) = 4e-18 is lost to cancellation if 1 − p is formed."""
    for f in ([40.0, 0.0], [0.0, 40.0]):
        root = loss_model("classification").hessian_root(torch.tensor([f], dtype=torch.float64))
        variance = float(torch.exp(torch.tensor(-40.0, dtype=torch.float64)))
        assert float(root[0, 0].square().sum()) == pytest.approx(variance, rel=1e-12)


def test_permuting_the_classes_permutes_what_the_root_spans() -> None:
    f, _ = outputs_and_targets("classification")
    order = torch.tensor([2, 0, 3, 1])
    root, permuted = (loss_model("classification").hessian_root(x) for x in (f, f[:, order]))
    assert_exact(permuted @ permuted.mT, (root @ root.mT)[:, order][:, :, order])


@pytest.mark.parametrize("likelihood", LIKELIHOODS)
@pytest.mark.parametrize("draws", [1, 3])
def test_monte_carlo_columns_are_an_unbiased_root(likelihood: str, draws: int) -> None:
    """Seed 1, 40 000 samples of one f; 10 distinct entries, each at 4 σ: error rate 0.06 %."""
    m = 40_000
    f = torch.tensor([[1.0, 0.0, -1.0, 0.5]], dtype=torch.float64).expand(m, -1)
    loss = loss_model(likelihood)
    noise = loss.label_noise((m, 4, draws), torch.Generator().manual_seed(1))
    columns = curvature_columns(loss, f, torch.zeros(m), Fisher.MC, noise=noise)
    assert columns.shape == (m, 4, draws)
    root = loss.hessian_root(f[:1])
    off = deviation(columns @ columns.mT, (root @ root.mT)[0])
    assert float(off.max()) <= SIGMAS + 1
    assert float(deviation(columns.sum(-1), 0.0).max()) <= SIGMAS + 1


def test_sampled_labels_follow_the_softmax() -> None:
    loss, m = loss_model("classification"), 20_000
    f = torch.tensor([[2.0, 0.0, -50.0]], dtype=torch.float64).expand(m, -1)
    noise = loss.label_noise((m, 3, 1), torch.Generator().manual_seed(0))
    p = torch.softmax(f[0], -1)
    drawn = p - loss.sampled_output_gradients(f, noise)[..., 0]
    assert float(deviation(drawn[:, :2], p[:2]).max()) <= SIGMAS
    assert float(drawn[:, 2].sum()) == 0.0


@pytest.mark.parametrize("likelihood", LIKELIHOODS)
def test_empirical_column_is_the_gradient_at_the_label(likelihood: str) -> None:
    f, y = outputs_and_targets(likelihood)
    loss = loss_model(likelihood)
    columns = curvature_columns(loss, f, y, Fisher.EMPIRICAL)
    assert_exact(columns, loss.output_gradient(f, y).unsqueeze(-1))


def test_monte_carlo_without_noise_is_refused() -> None:
    f, y = outputs_and_targets("classification")
    with pytest.raises(ValueError, match="noise"):
        curvature_columns(loss_model("classification"), f, y, Fisher.MC)


@pytest.mark.parametrize(
    ("likelihood", "targets", "message"),
    [
        ("classification", torch.tensor([0, -100]), r"0\.\.3; got values from -100"),
        ("classification", torch.tensor([0, 4]), r"0\.\.3"),
        ("classification", torch.eye(4)[:2], "argmax"),
        ("classification", torch.eye(4)[:2].long(), "argmax"),
        ("classification", torch.tensor([0.0, 1.0]), "integer class indices"),
        ("classification", torch.tensor([0]), "2 model outputs for 1 targets"),
        ("regression", torch.zeros(2), "unsqueeze"),
        ("regression", torch.zeros(2, 1), r"\(2, 1\)"),
        ("regression", torch.zeros(2, 4, dtype=torch.int64), "floating-point"),
        ("regression", torch.full((2, 4), torch.nan), "NaN"),
    ],
)
def test_targets_that_do_not_fit_are_refused(
    likelihood: str, targets: Tensor, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        loss_model(likelihood).check_targets(torch.zeros(2, 4), targets)


def test_single_logit_and_unknown_likelihood_are_refused() -> None:
    with pytest.raises(ValueError, match="bernoulli"):
        loss_model("classification").check_targets(torch.zeros(2, 1), torch.zeros(2).long())
    with pytest.raises(ValueError, match="likelihood must be"):
        loss_model("poisson")


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int8, torch.int16, torch.int32])
@pytest.mark.parametrize("shape", [(9,), (3, 3)])
def test_labels_of_any_integer_type_give_what_int64_gives(
    dtype: torch.dtype, shape: tuple[int, ...]
) -> None:
    f, y = outputs_and_targets("classification")
    f, y = f.reshape(*shape, 4), y.reshape(shape)
    for ignored in (None, 2):
        loss = loss_model("classification", ignore_index=ignored, positions=True)
        loss.check_targets(f, y.to(dtype))
        assert torch.equal(loss.losses(f, y.to(dtype)), loss.losses(f, y))
        assert torch.equal(loss.output_gradient(f, y.to(dtype)), loss.output_gradient(f, y))
        assert torch.equal(loss.n_labels(y.to(dtype)), loss.n_labels(y))


def test_an_unsigned_label_never_matches_a_negative_ignore_index() -> None:
    f, y = outputs_and_targets("classification")
    loss = loss_model("classification", ignore_index=-100)
    with pytest.raises(ValueError, match=r"uint8 hold no negative number.*ignore_index=-100"):
        loss.check_targets(f, y.to(torch.uint8))
    # -100 is 156 in eight bits: a class, and no marker.
    many = torch.randn(1, 200, dtype=torch.float64)
    assert float(loss.losses(many, torch.tensor([156], dtype=torch.uint8))) > 0
    loss.check_targets(f, y.to(torch.int8))
