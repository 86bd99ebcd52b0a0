"""`evaluate` on posteriors and moments of regression models."""

import math

import numpy as np
import pytest
import torch

from laplace_debiased.calibration import evaluate
from tests.calibration.helpers import RTOL, FakePosterior, calibrated_gaussians, loader_of


def _posterior(sigma_noise):
    return FakePosterior(likelihood="regression", sigma_noise=sigma_noise)


def _inputs(mean, variance):
    return np.concatenate([mean, variance], axis=1)


def test_record_of_one_known_prediction():
    record = evaluate((np.array([1.0]), np.array([4.0])), np.array([4.0]))
    assert record.nll == pytest.approx(0.5 * (math.log(2 * math.pi * 4) + 9 / 4), rel=RTOL)
    assert record.rmse == 3.0
    assert record.total_std == 2.0
    assert record.interval_coverage == 1.0
    assert record.ence == pytest.approx(0.5, rel=RTOL)
    for name in ("ece", "accuracy", "brier", "auroc", "epistemic_std"):
        assert getattr(record, name) is None


def test_noise_is_added_to_the_epistemic_variance_of_a_posterior():
    mean, std, targets = calibrated_gaussians()
    la = _posterior(sigma_noise=torch.tensor(0.8, dtype=torch.float64))
    record = evaluate(la, loader_of(_inputs(mean, std**2), targets))
    expected = evaluate((mean, std**2 + 0.64), targets)
    for name in ("nll", "rmse", "ence", "interval_coverage", "total_std"):
        assert getattr(record, name) == pytest.approx(getattr(expected, name), rel=RTOL), name
    assert record.epistemic_std == pytest.approx(std.mean(), rel=RTOL)


def test_noise_of_each_output_is_its_own():
    mean, std, targets = calibrated_gaussians()
    la = _posterior(sigma_noise=torch.tensor([0.5, 2.0], dtype=torch.float64))
    record = evaluate(la, loader_of(_inputs(mean, std**2), targets))
    expected = evaluate((mean, std**2 + np.array([0.25, 4.0])), targets)
    assert record.nll == pytest.approx(expected.nll, rel=RTOL)


def test_correlated_outputs_are_scored_under_their_covariance():
    rng = np.random.default_rng(0)
    root = rng.normal(size=(20, 2, 2))
    covariance = root @ root.transpose(0, 2, 1) + 0.1 * np.eye(2)
    mean, targets = rng.normal(size=(20, 2)), rng.normal(size=(20, 2))
    record = evaluate((mean, covariance), targets)
    density = torch.distributions.MultivariateNormal(
        torch.tensor(mean), covariance_matrix=torch.tensor(covariance)
    )
    expected = -density.log_prob(torch.tensor(targets)).mean().item()
    assert record.nll == pytest.approx(expected, rel=RTOL)
    marginal = evaluate((mean, np.diagonal(covariance, axis1=1, axis2=2)), targets)
    assert record.interval_coverage == marginal.interval_coverage
    assert record.ence == pytest.approx(marginal.ence, rel=RTOL)
    assert abs(record.nll - marginal.nll) > 0.01


def test_batches_and_order_change_nothing_and_units_only_shift():
    mean, std, targets = calibrated_gaussians(n=90)
    reference = evaluate((mean, std**2), targets)
    for batch_size, shuffle in ((7, False), (32, True)):
        loader = loader_of(
            _inputs(mean, std**2 - 0.01), targets, batch_size=batch_size, shuffle=shuffle
        )
        record = evaluate(_posterior(sigma_noise=0.1), loader)
        assert record.nll == pytest.approx(reference.nll, rel=RTOL)
        assert record.ence == pytest.approx(reference.ence, rel=RTOL)
    scaled = evaluate((10 * mean, 100 * std**2), 10 * targets)
    assert scaled.nll == pytest.approx(reference.nll + 2 * math.log(10), rel=RTOL)
    assert scaled.rmse == pytest.approx(10 * reference.rmse, rel=RTOL)
    assert scaled.ence == pytest.approx(reference.ence, rel=RTOL)
    assert scaled.interval_coverage == reference.interval_coverage


def test_calibrated_intervals_hold_95_percent_and_narrow_ones_fewer():
    # Seed 0, 40000 targets: the standard error of the coverage is 0.0011; four of them.
    mean, std, targets = calibrated_gaussians(n=20000)
    record = evaluate((mean, std**2), targets)
    assert record.interval_coverage == pytest.approx(0.95, abs=0.0044)
    assert record.curve is not None
    np.testing.assert_allclose(record.curve.observed, record.curve.nominal, atol=0.01)
    assert evaluate((mean, (0.5 * std) ** 2), targets).interval_coverage < 0.7


def test_vector_targets_stand_for_one_output_only():
    mean, std, targets = calibrated_gaussians(n=30, n_outputs=1)
    column = evaluate((mean, std**2), targets)
    assert evaluate((mean, std**2), targets[:, 0]) == column
    assert evaluate((mean[:, 0], std[:, 0] ** 2), targets) == column
    with pytest.raises(ValueError, match=r"\(30, 3\), got \(30, 1\).*not broadcast"):
        evaluate((np.tile(mean, 3), np.tile(std, 3)), targets)


@pytest.mark.parametrize(
    ("mean", "variance", "targets", "message"),
    [
        ([0.0, math.nan], [1.0, 1.0], [0.0, 0.0], "mean must be finite.*row 1"),
        ([0.0, 0.0], [1.0, math.inf], [0.0, 0.0], "variance must be finite.*row 1"),
        ([0.0, 0.0], [1.0, 1.0], [math.nan, 0.0], "targets must be finite.*row 0"),
        ([0.0, 0.0], [1.0, -1.0], [0.0, 0.0], "variance must be positive.*row 1"),
        ([0.0, 0.0], [1.0, 0.0], [0.0, 0.0], "variance must be positive.*row 1"),
        ([0.0, 0.0], [1.0], [0.0, 0.0], "variance must have the shape of mean"),
        ([0.0, 0.0], [1.0, 1.0], [0.0], "got 1 for 2 predictions"),
    ],
)
def test_invalid_moments_and_targets_are_named(mean, variance, targets, message):
    with pytest.raises(ValueError, match=message):
        evaluate((np.array(mean), np.array(variance)), np.array(targets))


def test_indefinite_covariance_is_an_error():
    covariance = np.array([[[1.0, 2.0], [2.0, 1.0]]])
    with pytest.raises(ValueError, match="positive definite"):
        evaluate((np.zeros((1, 2)), covariance), np.zeros((1, 2)))


def test_arguments_that_do_not_apply_are_errors():
    mean, std, targets = calibrated_gaussians(n=8)
    loader = loader_of(_inputs(mean, std**2), targets)
    with pytest.raises(ValueError, match="apply to classification"):
        evaluate(_posterior(1.0), loader, ood_loader=loader)
    with pytest.raises(ValueError, match="link_approx applies to classification"):
        evaluate(_posterior(1.0), loader, link_approx="mc")
    with pytest.raises(ValueError, match=r"sigma_noise must have one entry"):
        evaluate(_posterior(torch.ones(3)), loader)
    with pytest.raises(TypeError, match=r"\(mean, variance\)"):
        evaluate((mean, std, std), loader)
    with pytest.raises(ValueError, match="RandomSampler"):
        evaluate((mean, std), loader_of(mean, targets, shuffle=True))
