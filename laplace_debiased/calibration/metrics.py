"""Scores of predictions, as pure functions of float64 arrays. Entropies and NLLs are in nats."""

import numpy as np
import torch
from scipy.special import entr, erf
from torch.distributions import Independent, MultivariateNormal, Normal

from laplace_debiased.calibration.batches import FloatArray, IntArray
from laplace_debiased.network.rng import preserved_rng

COVERAGE_LEVEL = 0.95
TRUE_POSITIVE_RATE = 0.95
_RELATIVE_SPREAD = 1e-9


def label_nll(probs: FloatArray, labels: IntArray, floor: float) -> FloatArray:
    """Negative log probability of each label [n], in nats, of probabilities [n, C].

    A probability below `floor` counts as `floor`: one underflow must not make a mean infinite.
    """
    return -np.log(np.maximum(label_probability(probs, labels), floor))


def label_probability(probs: FloatArray, labels: IntArray) -> FloatArray:
    """Probability that each sample's label was given [n]."""
    return np.take_along_axis(probs, labels[:, None], axis=1)[:, 0]


def paired_interval(first: FloatArray, second: FloatArray, seed: int) -> tuple[float, float]:
    """95 % bootstrap interval of the mean difference of two scores of the same samples [n]."""
    from scipy.stats import bootstrap

    differences = first - second
    if np.ptp(differences) == 0.0:
        return float(differences[0]), float(differences[0])
    found = bootstrap(
        (differences,),
        np.mean,
        n_resamples=2_000,
        batch=100,
        method="percentile",
        random_state=np.random.default_rng(seed),
    )
    return float(found.confidence_interval.low), float(found.confidence_interval.high)


def brier_score(probs: FloatArray, labels: IntArray) -> float:
    """Mean over samples of the squared error summed over classes, in [0, 2] (Brier, 1950)."""
    per_sample = np.square(probs).sum(axis=1) - 2.0 * label_probability(probs, labels) + 1.0
    return float(per_sample.mean())


def predictive_entropy(probs: FloatArray) -> FloatArray:
    """Shannon entropy of each row [n], in nats."""
    return entr(probs).sum(axis=1)


def calibration_errors(
    confidence: FloatArray, correct: np.ndarray, n_bins: int
) -> tuple[float, float]:
    """Expected and maximum calibration error of the top label [n], equal-width bins of [0, 1].

    ECE is the |accuracy − confidence| per bin averaged over samples, and MCE the largest one
    (Naeini, Cooper, Hauskrecht, 2015; Guo et al., 2017, eqs. 3 and 5); a bin is closed on its left.
    """
    from netcal.metrics import ECE, MCE

    # Given class probabilities, netcal scores the positive class instead of the top label as soon
    # as two distinct labels are left; given confidence and correctness it cannot.
    hits = correct.astype(np.int64)
    ece, mce = (
        metric(bins=n_bins).measure(confidence.copy(), hits.copy()) for metric in (ECE, MCE)
    )
    return float(ece), float(mce)


def adaptive_calibration_error(confidence: FloatArray, correct: np.ndarray, n_bins: int) -> float:
    """Expected calibration error of the top label, bins of equally many samples.

    |accuracy − confidence| per bin of the sorted confidences, averaged over samples (Nguyen and
    O'Connor, 2015). netcal's bins of equal mass refuse confidences that coincide, as those of
    certain networks do; here samples of equal confidence share their accuracy, so that their order
    does not matter. Where there are fewer samples than bins, there are fewer bins.
    """
    order = np.argsort(confidence, kind="stable")
    gaps = (_shared(confidence, correct) - confidence)[order]
    return float(sum(abs(part.sum()) for part in np.array_split(gaps, n_bins)) / len(gaps))


def risk_coverage(confidence: FloatArray, correct: np.ndarray) -> FloatArray:
    """Share of errors among the k most confident predictions, for k = 1 to n.

    Predictions of equal confidence share their errors. The mean of it is the area under the
    risk-coverage curve (Geifman and El-Yaniv, 2017), which neither netcal nor torchmetrics have.
    """
    errors = (1.0 - _shared(confidence, correct))[np.argsort(-confidence, kind="stable")]
    return np.cumsum(errors) / np.arange(1, len(errors) + 1)


def _shared(confidence: FloatArray, correct: np.ndarray) -> FloatArray:
    """Accuracy among the samples of each sample's own confidence [n]."""
    _, group = np.unique(confidence, return_inverse=True)
    return (np.bincount(group, weights=correct) / np.bincount(group))[group]


def ood_detection(inside: FloatArray, outside: FloatArray) -> tuple[float, float]:
    """AUROC and FPR95 of an uncertainty [n] and [m] as a detector of out-of-distribution inputs.

    AUROC is the probability that an out-of-distribution sample is the less certain; FPR95 the share
    of out-of-distribution samples that pass as in-distribution at the threshold where at least 95 %
    of the in-distribution samples do (Liang, Li, Srikant, 2018).
    """
    with preserved_rng():  # importing scikit-learn draws from ``random``
        from sklearn.metrics import roc_auc_score, roc_curve

    is_inside = np.concatenate([np.ones(len(inside)), np.zeros(len(outside))])
    score = -np.concatenate([inside, outside])
    false_positive, true_positive, _ = roc_curve(is_inside, score, drop_intermediate=False)
    at_95 = int(np.argmax(true_positive >= TRUE_POSITIVE_RATE))
    return float(roc_auc_score(is_inside, score)), float(false_positive[at_95])


def gaussian_nll(error: FloatArray, covariance: FloatArray) -> FloatArray:
    """Negative log density [n], in nats, of errors [n, K] under variances [n, K] or [n, K, K].

    Raises:
        torch.linalg.LinAlgError: If a covariance is not positive definite.
    """
    values, scale = torch.from_numpy(error), torch.from_numpy(covariance)
    density: torch.distributions.Distribution
    if covariance.ndim == 2:
        density = Independent(Normal(torch.zeros_like(values), scale.sqrt()), 1)
    else:
        density = MultivariateNormal(torch.zeros_like(values), scale, validate_args=False)
    return -density.log_prob(values).numpy()


def interval_level(error: FloatArray, std: FloatArray) -> FloatArray:
    """Level of the smallest central Gaussian interval that holds each target [n, K], in [0, 1]."""
    return erf(np.abs(error) / (std * np.sqrt(2.0)))


def expected_normalized_error(
    mean: FloatArray, std: FloatArray, targets: FloatArray, n_bins: int
) -> float:
    """ENCE: mean over bins of |RMSE − RMV| / RMV, bins of equal width in the predicted std [n, K].

    The mean over the K outputs; bins between the smallest and the largest std, empty ones do not
    count (Levi et al., 2019, eq. 8).
    """
    from netcal.metrics.regression import ENCE

    metric = ENCE(bins=n_bins)
    errors = [
        metric.measure((mu.copy(), sigma.copy()), y.copy(), range_=_std_range(sigma, n_bins))
        for mu, sigma, y in zip(mean.T, std.T, targets.T, strict=True)
    ]
    return float(np.mean(errors))


def _std_range(std: FloatArray, n_bins: int) -> list[tuple[float, float]] | None:
    """Range of netcal's bins for one output, None for its own choice."""
    low, high = float(std.min()), float(std.max())
    if high - low > _RELATIVE_SPREAD * high:
        return None
    # A constant noise level leaves netcal bins without width, which raises: centre it in the first.
    return [(0.5 * high, (n_bins + 0.5) * high)]
