"""The laboratory against closed forms and enumeration."""

from __future__ import annotations

import pytest
import torch

from laplace_debiased.diagnostics import LinearRegressionLab, directional_profile
from laplace_debiased.diagnostics.laboratory import quadratic_along
from tests.diagnostics.closed_forms import enumerate_batch_pairs, isotropic_plane_top_curvature
from tests.diagnostics.oracles import expected_disjoint, own_slope_at_optimum
from tests.tolerances import SIGMAS, assert_exact


def generator(seed):
    return torch.Generator().manual_seed(seed)


def population(size=7, dimensions=3, seed=0):
    g = generator(seed)
    draw = lambda *shape: torch.randn(*shape, dtype=torch.float64, generator=g)  # noqa: E731
    return draw(size, dimensions), draw(size, 1), draw(dimensions)


def within(estimate, expected):
    return (estimate.mean - expected).abs() <= SIGMAS * estimate.stderr + 1e-12


def test_the_profile_of_the_labs_model_is_its_closed_form():
    lab = LinearRegressionLab((2.0, 1.0, 0.5), noise_std=0.3, offset=(1.0, -1.0, 0.2))
    own, other = lab.batch(6, generator(0)), lab.batch(9, generator(1))
    profile = directional_profile(
        lab.model(), "regression", own, other, [lab.batch(50, generator(2))]
    )
    u = profile.directions
    assert_exact(profile.own.curvature.mean, torch.linalg.eigvalsh(own[0].T @ own[0] / 6).flip(0))
    for data, quadratic in ((own, profile.own), (other, profile.other)):
        slopes, curvatures = quadratic_along(*data, lab.weights, u)
        assert_exact(quadratic.slope.mean, slopes)
        assert_exact(quadratic.curvature.mean, curvatures)


def test_the_reference_converges_to_the_population():
    # 20000 samples, 6 comparisons at 3 standard errors: error rate 1.6 %, seed 5.
    lab = LinearRegressionLab((2.0, 1.0, 0.5), noise_std=0.3, offset=(1.0, -1.0, 0.2))
    own = lab.batch(6, generator(3))
    profile = directional_profile(
        lab.model(), "regression", own, own, [lab.batch(20000, generator(5))]
    )
    u = profile.directions
    assert within(profile.reference.curvature, lab.population_curvature(u)).all()
    assert within(profile.reference.slope, lab.population_slope(u)).all()


@pytest.mark.parametrize("batch_size", [1, 2, 3])
def test_enumeration_over_all_pairs_confirms_the_finite_population_correction(batch_size):
    inputs, targets, weights = population()
    exact = enumerate_batch_pairs(inputs, targets, weights, batch_size)
    for own, other, everything in (
        (exact.own, exact.other, exact.population),
        (exact.own_slope, exact.other_slope, exact.population_slope),
    ):
        torch.testing.assert_close(
            expected_disjoint(own, everything, batch_size, 7), other, rtol=1e-12, atol=1e-12
        )
        share = batch_size / 7
        torch.testing.assert_close(
            share * own + (1 - share) * other, everything, rtol=1e-12, atol=1e-12
        )


def test_enumeration_shows_the_bias_at_both_ends_and_that_it_sums_to_zero():
    inputs, targets, weights = population()
    exact = enumerate_batch_pairs(inputs, targets, weights, 3)
    bias = exact.own - exact.population
    assert float(bias[0]) > 0.2 * float(exact.population[0])
    assert float(bias[-1]) < -0.2 * float(exact.population[-1])
    assert float(bias.sum()) == pytest.approx(0.0, abs=1e-12)
    assert (exact.own_slope > exact.population_slope)[0]


def test_a_batch_that_is_the_population_would_have_no_bias():
    inputs, targets, weights = population(size=6)
    biases = [enumerate_batch_pairs(inputs, targets, weights, m) for m in (1, 2, 3)]
    gaps = [float((e.own - e.population)[0]) for e in biases]
    assert gaps[0] > gaps[1] > gaps[2] > 0


@pytest.mark.parametrize("batch_size", [1, 2, 5, 20])
def test_top_curvature_in_an_isotropic_plane_has_its_closed_form(batch_size):
    # 4000 draws per size, error rate 0.3 % each, seed 11.
    lab = LinearRegressionLab((1.0, 1.0))
    bias = lab.expected_bias(batch_size, 4000, generator(11))
    expected = isotropic_plane_top_curvature(batch_size)
    assert within(bias.own_curvature, torch.tensor([expected, 2.0 - expected])).all()
    assert within(bias.other_curvature, torch.ones(2, dtype=torch.float64)).all()


def test_curvature_bias_alone_has_no_slopes_and_is_cured_by_another_batch():
    # 800 draws, 10 ranks at 3 standard errors: error rate 2.7 %, seed 13.
    lab = LinearRegressionLab(tuple(1 / j for j in range(1, 11)))
    bias = lab.expected_bias(20, 800, generator(13))
    assert not bias.own_slope.mean.any()
    gap = bias.own_curvature.mean - bias.population_curvature.mean
    assert float(gap[0]) > 5 * float(bias.own_curvature.stderr[0])
    assert float(gap[-1]) < -5 * float(bias.population_curvature.stderr[-1])
    difference = (bias.other_curvature.mean - bias.population_curvature.mean).abs()
    assert (difference <= SIGMAS * bias.other_curvature.stderr).all()


def test_slope_bias_alone_leaves_curvature_unbiased_and_is_cured_by_another_batch():
    # One direction: 4000 draws, 4 comparisons at 3 standard errors: error rate 1.1 %, seed 17.
    lab = LinearRegressionLab((1.5,), noise_std=2.0)
    bias = lab.expected_bias(8, 4000, generator(17))
    assert within(bias.own_curvature, 1.5).all()
    assert within(bias.other_curvature, 1.5).all()
    assert within(bias.other_slope, 0.0).all()
    assert float(bias.own_slope.mean[0]) > 20 * float(bias.own_slope.stderr[0])


def test_own_slopes_at_the_optimum_have_their_closed_form():
    # The inputs are kept, the noise is drawn 3000 times; 3 comparisons, error rate 0.8 %, seed 19.
    lab = LinearRegressionLab((2.0, 1.0, 0.5), noise_std=0.7)
    inputs, _ = lab.batch(6, generator(19))
    values, vectors = torch.linalg.eigh(inputs.T @ inputs / 6)
    noise = 0.7 * torch.randn(3000, 6, 1, dtype=torch.float64, generator=generator(20))
    slopes = quadratic_along(inputs.expand(3000, 6, 3), noise, lab.weights, vectors)[0].abs()
    expected = own_slope_at_optimum(values, 0.7, 6)
    error = slopes.std(0) / 3000**0.5
    assert ((slopes.mean(0) - expected).abs() <= SIGMAS * error).all()


def test_bad_laboratories_raise():
    for arguments in (((),), ((1.0, -1.0),), ((float("nan"),),), ((1.0,), -1.0)):
        with pytest.raises(ValueError, match="must"):
            LinearRegressionLab(*arguments)
    with pytest.raises(ValueError, match="equally long"):
        LinearRegressionLab((1.0, 2.0), offset=(1.0,))
