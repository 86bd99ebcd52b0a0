"""Directional profiles."""

from __future__ import annotations

import pytest
import torch
from torch.utils.data import DataLoader

from laplace_debiased.diagnostics import (
    DirectionalProfile,
    DirectionalQuadratic,
    directional_profile,
)
from laplace_debiased.diagnostics.estimates import MomentSums
from tests.diagnostics import oracles
from tests.oracles import ggn
from tests.tolerances import assert_exact, assert_same
from tests.zoo import Breaking, problem


def profile_of(p, k=6, reference=True, **options):
    loader = p.loader(slice(10, None)) if reference else None
    return directional_profile(
        p.model, p.likelihood, (p.x[:5], p.y[:5]), (p.x[5:10], p.y[5:10]), loader, k, **options
    )


@pytest.mark.parametrize("likelihood", ["classification", "regression"])
@pytest.mark.parametrize("kind", ["mlp", "cnn"])
def test_all_three_quadratics_equal_the_dense_oracle(kind, likelihood):
    p = problem(kind, likelihood)
    profile = profile_of(p)
    u = profile.directions
    expected = torch.linalg.eigvalsh(ggn(p, p.names, slice(0, 5))).flip(0)[:6]
    assert_exact(profile.own.curvature.mean, expected)
    gradients = oracles.gradients(p.model, likelihood, p.x, p.y)
    for quadratic, index in (
        (profile.own, slice(0, 5)),
        (profile.other, slice(5, 10)),
        (profile.reference, slice(10, None)),
    ):
        assert_exact(quadratic.curvature.mean, oracles.along(ggn(p, p.names, index), u))
        assert_exact(quadratic.slope.mean, gradients[index].mean(0) @ u)
    assert (profile.own.slope.mean >= 0).all()


def test_with_one_batch_in_both_roles_the_bias_is_invisible():
    p = problem("cnn")
    batch = (p.x[:8], p.y[:8])
    profile = directional_profile(p.model, p.likelihood, batch, batch, k=5)
    assert_same(profile.other.curvature.mean, profile.own.curvature.mean)
    fresh = directional_profile(p.model, p.likelihood, batch, (p.x[8:16], p.y[8:16]), k=5)
    assert float(fresh.own.curvature.mean.sum()) > 1.05 * float(fresh.other.curvature.mean.sum())


def test_the_default_k_is_what_exists():
    p = problem("mlp")
    assert profile_of(p, k=100, reference=False).n_directions == 10  # 5 samples × (C − 1)
    assert profile_of(p, k=100, reference=False).reference is None


@pytest.mark.parametrize("matrix", ["ggn", "hessian"])
def test_rebatching_and_shuffling_the_reference_changes_nothing(matrix):
    p = problem("mlp")
    profiles = [
        directional_profile(
            p.model,
            p.likelihood,
            (p.x[:5], p.y[:5]),
            (p.x[5:10], p.y[5:10]),
            DataLoader(p.dataset, batch_size=size, shuffle=shuffle),
            4,
            matrix=matrix,
        )
        for size, shuffle in ((26, False), (4, False), (7, True))
    ]
    for again in profiles[1:]:
        assert_same(again.reference.curvature.mean, profiles[0].reference.curvature.mean)
        assert_same(again.reference.slope.covariance, profiles[0].reference.slope.covariance)


def test_weight_decay_is_the_regularised_loss_seen_along_the_same_directions():
    p = problem("mlp")
    bare = profile_of(p)
    decay = bare.with_weight_decay(0.3)
    u, theta = bare.directions, oracles.flat(p.model)
    size = len(theta)
    regularised = ggn(p, p.names, slice(10, None)) + 0.3 * torch.eye(size, dtype=torch.float64)
    assert_exact(decay.reference.curvature.mean, oracles.along(regularised, u))
    slopes = oracles.gradients(p.model, p.likelihood, p.x, p.y)[10:].mean(0) + 0.3 * theta
    assert_exact(decay.reference.slope.mean, slopes @ u)
    back = decay.with_weight_decay(0.0)
    assert_same(back.own.slope.mean, bare.own.slope.mean)
    assert_same(back.other.curvature.mean, bare.other.curvature.mean)
    for bad in (-1.0, float("nan"), float("inf")):
        with pytest.raises(ValueError, match="weight_decay"):
            bare.with_weight_decay(bad)


def test_frozen_parameters_are_no_directions():
    p = problem("mlp")
    p.model[0].weight.requires_grad_(False)
    profile = profile_of(p, k=3, solver="lanczos")
    assert profile.directions.shape[0] == len(oracles.flat(p.model))
    expected = torch.linalg.eigvalsh(ggn(p, p.names, slice(0, 5))).flip(0)[:3]
    assert_exact(profile.own.curvature.mean, expected)


@pytest.mark.parametrize("matrix", ["ggn", "hessian"])
@pytest.mark.parametrize("solver", ["auto", "lanczos"])
def test_the_users_world_is_untouched(untouched, matrix, solver):
    p = problem("cnn")
    p.model.train()
    p.model[0].eval()
    p.model(p.x).sum().backward()
    loader = DataLoader(p.dataset, batch_size=6, shuffle=True)
    with untouched(p.model, loader), torch.no_grad():
        directional_profile(
            p.model,
            p.likelihood,
            (p.x[:5], p.y[:5]),
            (p.x[5:10], p.y[5:10]),
            loader,
            3,
            matrix=matrix,
            solver=solver,
        )


def test_the_users_world_is_untouched_when_the_loader_raises(untouched):
    p = problem("cnn")
    p.model.train()
    loader = Breaking(p.loader(), after=2)
    with untouched(p.model), pytest.raises(OSError, match="the disk is gone"):
        directional_profile(
            p.model, p.likelihood, (p.x[:5], p.y[:5]), (p.x[5:10], p.y[5:10]), loader, 3
        )


def test_it_works_inside_inference_mode():
    p = problem("mlp")
    outside = profile_of(p)
    with torch.inference_mode():
        inside = directional_profile(
            p.model, p.likelihood, (p.x[:5] + 0.0, p.y[:5]), (p.x[5:10], p.y[5:10]), k=6
        )
    assert_same(inside.own.curvature.mean, outside.own.curvature.mean)


def test_a_transformer_in_training_mode_is_measured_in_evaluation_mode(untouched):
    model, tokens, labels = oracles.attention()
    batches = (tokens[:3], labels[:3]), (tokens[3:], labels[3:])
    with untouched(model):
        forward, reverse = (
            directional_profile(model, "classification", *batches, k=4, derivatives=mode)
            for mode in ("forward", "reverse")
        )
    assert_exact(forward.other.curvature.mean, reverse.other.curvature.mean)
    model.eval()
    again = directional_profile(model, "classification", *batches, k=4)
    assert_exact(again.own.curvature.mean, forward.own.curvature.mean)


def quadratic(slopes, curvatures):
    """Two samples with the given means."""
    pairs = [torch.tensor([v, v], dtype=torch.float64) for v in (slopes, curvatures)]
    return DirectionalQuadratic(*(MomentSums.of(pair).estimate() for pair in pairs))


def test_a_profile_takes_any_directions_and_orients_them_by_the_own_slope():
    profile = DirectionalProfile.of(
        quadratic([-1.0, 2.0], [3.0, 4.0]),
        quadratic([-0.5, -0.5], [1.0, 2.0]),
        parameters_along=torch.tensor([1.0, 1.0]),
    )
    assert profile.own.slope.mean.tolist() == [1.0, 2.0]
    assert profile.other.slope.mean.tolist() == [0.5, -0.5]
    assert profile.own.curvature.mean.tolist() == [3.0, 4.0]
    assert profile.parameters_along.tolist() == [-1.0, 1.0]
    assert profile.directions is None
    with pytest.raises(ValueError, match="other measured 1"):
        DirectionalProfile.of(quadratic([1.0, 1.0], [1.0, 1.0]), quadratic([1.0], [1.0]))


def test_options_are_checked():
    p = problem("mlp")
    for option, value in (("matrix", "fisher"), ("solver", "x"), ("derivatives", "x")):
        with pytest.raises(ValueError, match=option):
            profile_of(p, **{option: value})
    with pytest.raises(ValueError, match="likelihood"):
        directional_profile(p.model, "poisson", (p.x, p.y), (p.x, p.y))
