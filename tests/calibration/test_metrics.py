"""Each metric against a loop that follows its definition."""

import itertools
import math

import numpy as np
import pytest

from laplace_debiased.calibration import metrics
from laplace_debiased.calibration.reliability import interval_curve, reliability_bins
from tests.calibration.helpers import RTOL, calibrated_classes, calibrated_gaussians, softmax


@pytest.fixture(scope="module")
def classes():
    logits, labels = calibrated_classes()
    return softmax(1.7 * logits), labels


def _loop_bins(confidence, correct, n_bins):
    """(count, |accuracy − confidence|) of each non-empty bin, by its definition."""
    bins = []
    for b in range(n_bins):
        upper = (b + 1) / n_bins if b + 1 < n_bins else math.inf
        inside = [i for i, c in enumerate(confidence) if b / n_bins <= c < upper]
        if inside:
            accuracy = sum(correct[i] for i in inside) / len(inside)
            bins.append((len(inside), abs(accuracy - sum(confidence[inside]) / len(inside))))
    return bins


@pytest.mark.parametrize("n_bins", [1, 10, 15])
def test_calibration_errors_follow_their_definition(classes, n_bins):
    probs, labels = classes
    confidence, correct = probs.max(1), probs.argmax(1) == labels
    bins = _loop_bins(confidence, correct, n_bins)
    ece, mce = metrics.calibration_errors(confidence, correct, n_bins)
    assert ece == pytest.approx(sum(n * gap for n, gap in bins) / len(labels), rel=RTOL)
    assert mce == pytest.approx(max(gap for _, gap in bins), rel=RTOL)
    assert reliability_bins(confidence, correct, n_bins).expected_error == pytest.approx(
        ece, rel=RTOL
    )


def test_calibration_errors_score_the_top_label_when_two_labels_are_left():
    probs = np.array([[0.9, 0.1], [0.8, 0.2], [0.3, 0.7]])
    correct = probs.argmax(1) == np.array([0, 0, 1])
    ece, mce = metrics.calibration_errors(probs.max(1), correct, 15)
    assert ece == pytest.approx((0.1 + 0.2 + 0.3) / 3, rel=RTOL)
    assert mce == pytest.approx(0.3, rel=RTOL)


def test_a_confidence_above_one_by_round_off_is_in_the_last_bin():
    confidence, correct = (
        np.array([1.0005, 1.0 + 1e-7, 0.95, 0.2]),
        np.array([True, True, 0, 0], bool),
    )
    bins = reliability_bins(confidence, correct, 10)
    assert (bins.counts[2], bins.counts[9], sum(bins.counts)) == (1, 3, 4)
    expected = (sum(_loop_bins(confidence, correct, 10)[1]) - 3) * 3 / 4 + 0.2 / 4
    assert bins.expected_error == pytest.approx(expected, rel=RTOL)


def test_confidence_on_an_edge_falls_in_the_bin_above_it():
    confidence, correct = np.array([0.5, 0.6, 0.4, 1.0]), np.array([False, True, True, True])
    bins = reliability_bins(confidence, correct, 2)
    assert bins.counts == (1, 3)
    assert bins.expected_error == pytest.approx(
        metrics.calibration_errors(confidence, correct, 2)[0], rel=RTOL
    )


def test_certain_and_right_has_no_calibration_error():
    ece, mce = metrics.calibration_errors(np.ones(5), np.ones(5, dtype=bool), 15)
    assert ece == pytest.approx(0.0, abs=1e-12)
    assert mce == pytest.approx(0.0, abs=1e-12)


def test_metrics_do_not_write_into_their_input():
    confidence, correct = np.array([1.0, 0.0, 0.5]), np.array([True, False, True])
    metrics.calibration_errors(confidence, correct, 15)
    assert confidence.tolist() == [1.0, 0.0, 0.5]
    assert correct.tolist() == [True, False, True]


def test_nll_brier_and_entropy_follow_their_definitions(classes):
    probs, labels = classes
    nll = [-math.log(p[y]) for p, y in zip(probs, labels, strict=True)]
    brier = [
        sum((p[c] - (c == y)) ** 2 for c in range(len(p)))
        for p, y in zip(probs, labels, strict=True)
    ]
    entropy = [-sum(q * math.log(q) for q in p) for p in probs]
    np.testing.assert_allclose(metrics.label_nll(probs, labels, 1e-300), nll, rtol=RTOL)
    assert metrics.brier_score(probs, labels) == pytest.approx(np.mean(brier), rel=RTOL)
    np.testing.assert_allclose(metrics.predictive_entropy(probs), entropy, rtol=RTOL)


def test_entropy_is_zero_when_certain_and_log_classes_when_uniform():
    probs = np.array([[1.0, 0.0, 0.0], [1 / 3, 1 / 3, 1 / 3]])
    np.testing.assert_allclose(metrics.predictive_entropy(probs), [0, math.log(3)], rtol=RTOL)


def test_brier_score_is_at_worst_two():
    assert metrics.brier_score(np.array([[1.0, 0.0]]), np.array([1])) == 2.0


def test_auroc_counts_pairs_and_fpr95_keeps_95_percent_of_the_inside():
    rng = np.random.default_rng(0)
    inside, outside = rng.normal(size=60), rng.normal(1.0, size=50)
    auroc, fpr95 = metrics.ood_detection(inside, outside)
    pairs = [(o > i) + 0.5 * (o == i) for i in inside for o in outside]
    assert auroc == pytest.approx(np.mean(pairs), rel=RTOL)
    threshold = np.sort(inside)[56]  # the 57 lowest of 60 are 95 %
    assert fpr95 == pytest.approx(np.mean(outside <= threshold), rel=RTOL)
    assert 0.1 < fpr95 < 0.9


def test_ood_detection_of_separated_and_of_swapped_sets():
    low, high = np.array([0.1, 0.2, 0.3]), np.array([1.0, 1.1])
    assert metrics.ood_detection(low, high) == (1.0, 0.0)
    assert metrics.ood_detection(high, low) == (0.0, 1.0)


@pytest.mark.parametrize("n_bins", [1, 15])
def test_ence_follows_its_definition(n_bins):
    mean, std, targets = calibrated_gaussians(n=120)
    wrong = 0.6 * std
    per_output = []
    for k in range(mean.shape[1]):
        edges = np.linspace(wrong[:, k].min(), wrong[:, k].max(), n_bins + 1)
        edges[-1] = np.inf
        terms = []
        for low, high in itertools.pairwise(edges):
            inside = (wrong[:, k] >= low) & (wrong[:, k] < high)
            if inside.any():
                rmse = np.sqrt(np.mean((mean - targets)[inside, k] ** 2))
                rmv = np.sqrt(np.mean(wrong[inside, k] ** 2))
                terms.append(abs(rmse - rmv) / rmv)
        per_output.append(np.mean(terms))
    got = metrics.expected_normalized_error(mean, wrong, targets, n_bins)
    assert got == pytest.approx(np.mean(per_output), rel=RTOL)


@pytest.mark.parametrize("n_bins", [1, 2, 15])
@pytest.mark.parametrize("jitter", [0.0, 1e-16, 1e-12])
def test_ence_of_a_constant_std_is_one_bin(n_bins, jitter):
    mean, _, targets = calibrated_gaussians(n=50, n_outputs=1)
    std = 0.7 * (1.0 + jitter * np.arange(50)[:, None])
    rmse = np.sqrt(np.mean((mean - targets) ** 2))
    got = metrics.expected_normalized_error(mean, std, targets, n_bins)
    assert got == pytest.approx(abs(rmse - 0.7) / 0.7, rel=RTOL)


def test_gaussian_nll_of_variances_and_of_covariances():
    rng = np.random.default_rng(1)
    error, root = rng.normal(size=(6, 3)), rng.normal(size=(6, 3, 3))
    covariance = root @ root.transpose(0, 2, 1) + np.eye(3)
    variance = np.diagonal(covariance, axis1=1, axis2=2)
    marginal = [
        sum(0.5 * (math.log(2 * math.pi * v) + e * e / v) for e, v in zip(es, vs, strict=True))
        for es, vs in zip(error, variance, strict=True)
    ]
    joint = [
        0.5 * (3 * math.log(2 * math.pi) + np.linalg.slogdet(c)[1] + e @ np.linalg.inv(c) @ e)
        for e, c in zip(error, covariance, strict=True)
    ]
    np.testing.assert_allclose(metrics.gaussian_nll(error, variance), marginal, rtol=RTOL)
    np.testing.assert_allclose(metrics.gaussian_nll(error, covariance), joint, rtol=RTOL)
    diagonal = variance[:, :, None] * np.eye(3)
    np.testing.assert_allclose(metrics.gaussian_nll(error, diagonal), marginal, rtol=RTOL)


def test_interval_levels_at_known_quantiles():
    levels = metrics.interval_level(np.array([1.959963984540054, -0.6744897501960817]), np.ones(2))
    np.testing.assert_allclose(levels, [0.95, 0.5], rtol=RTOL)


def test_interval_curve_counts_targets_within_each_level():
    levels = np.array([[0.05, 0.3], [0.3, 0.96]])
    curve = interval_curve(levels, 0.95)
    assert curve.interval_coverage == 0.75
    for nominal, observed in zip(curve.nominal, curve.observed, strict=True):
        assert observed == np.mean(levels <= nominal)
    assert curve.observed[-1] == 1.0
    assert len(curve.nominal) == 21


def random_predictions(n: int, digits: int = 9) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(3)
    confidence = np.clip(rng.beta(5, 1, n), 0.1, 1.0).round(digits)
    return confidence, rng.random(n) < confidence


@pytest.mark.parametrize("n", [15, 100, 7])
def test_adaptive_error_is_that_of_bins_of_equally_many_samples(n: int) -> None:
    confidence, correct = random_predictions(n)
    ranked = sorted(zip(confidence, correct, strict=True))
    sizes = [n // 15 + (k < n % 15) for k in range(15)]
    expected, start = 0.0, 0
    for size in sizes:
        part = ranked[start : start + size]
        start += size
        if part:
            gap = np.mean([c for _, c in part]) - np.mean([p for p, _ in part])
            expected += size / n * abs(gap)
    actual = metrics.adaptive_calibration_error(confidence, correct, 15)
    assert actual == pytest.approx(expected, rel=1e-12)


def test_area_under_risk_coverage_is_the_mean_error_of_the_most_confident() -> None:
    confidence, correct = random_predictions(60)
    order = np.argsort(-confidence)
    expected = [1 - correct[order[:k]].mean() for k in range(1, 61)]
    assert metrics.risk_coverage(confidence, correct) == pytest.approx(expected)
    ranked = np.linspace(1.0, 0.5, 10)
    last_wrong = np.arange(10) < 9
    assert metrics.risk_coverage(ranked, last_wrong).mean() == pytest.approx(0.01)
    assert metrics.risk_coverage(ranked, last_wrong[::-1]).mean() == pytest.approx(
        np.mean(1 / np.arange(1, 11))
    )


@pytest.mark.parametrize("score", ["adaptive", "risk"])
def test_the_order_of_samples_of_equal_confidence_does_not_matter(score: str) -> None:
    confidence, correct = random_predictions(200, digits=1)

    def value(order: np.ndarray) -> float:
        if score == "risk":
            return float(metrics.risk_coverage(confidence[order], correct[order]).mean())
        return metrics.adaptive_calibration_error(confidence[order], correct[order], 15)

    rng = np.random.default_rng(0)
    values = [value(rng.permutation(200)) for _ in range(5)]
    assert values == pytest.approx([values[0]] * 5, rel=1e-12)
    # With all confidences equal nothing is ranked: the risk is the error rate at every coverage.
    flat = metrics.risk_coverage(np.full(200, 0.7), correct)
    assert flat == pytest.approx(np.full(200, 1 - correct.mean()))
