"""How good and how calibrated are predictions."""

import warnings
from collections.abc import Iterable
from dataclasses import MISSING, dataclass, field, fields
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from laplace_debiased.calibration import metrics
from laplace_debiased.calibration.asking import (
    Options,
    Unlabelled,
    described,
    predict,
    predict_unlabelled,
    ranks_for,
)
from laplace_debiased.calibration.batches import FloatArray, Targets
from laplace_debiased.calibration.predictions import (
    ClassPredictions,
    GaussianPredictions,
    count,
    rows_of,
)
from laplace_debiased.calibration.reliability import (
    IntervalCurve,
    ReliabilityBins,
    interval_curve,
    plot_interval_curve,
    plot_reliability_bins,
    reliability_bins,
)
from laplace_debiased.network.modes import public_call
from laplace_debiased.options import Positions, parse_choice

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


def _score(meaning: str, default: Any = None) -> Any:
    return field(default=default, metadata={"meaning": meaning})


@dataclass(frozen=True, repr=False)
class Evaluation:
    """Scores of predictions; None where a metric does not apply. ``repr`` says what each one is.

    Shares and calibration errors lie in [0, 1] and are not in percent. Of sequences every position
    whose label counts is a sample. In regression `nll` is that of the whole target vector [K] under
    the total predictive covariance. With K binary labels `nll` and `entropy` are summed over them;
    `ece`, `mce`, `brier`, `accuracy` and `aurc` are then over all labels, two classes each.
    `mutual_information` is what a label would tell about the weights, of a posterior of this
    library with `pred_type` "glm". `curve` is what `plot_reliability` draws.
    """

    nll: float = _score("negative log-likelihood, nats, mean over samples", MISSING)
    n_samples: int = _score("samples", MISSING)
    n_bins: int = _score("bins of ECE and MCE, or of ENCE", MISSING)
    ece: float | None = _score("expected calibration error of the top label")
    adaptive_ece: float | None = _score("the same, bins of equally many samples")
    mce: float | None = _score("maximum calibration error over bins")
    brier: float | None = _score("squared error summed over classes, mean over samples")
    accuracy: float | None = _score("share of correct predictions")
    aurc: float | None = _score("area under the risk-coverage curve")
    entropy: float | None = _score("predictive entropy, nats, mean over samples")
    mutual_information: float | None = _score(
        "epistemic part of the entropy, nats, mean over samples"
    )
    auroc: float | None = _score("entropy separates in from out of distribution")
    fpr95: float | None = _score("out-of-distribution share kept at 95 % true positives")
    auroc_information: float | None = _score(
        "mutual information separates in from out of distribution"
    )
    fpr95_information: float | None = _score(
        "out-of-distribution share kept, by mutual information"
    )
    rmse: float | None = _score("root of the squared error's mean over samples and outputs")
    ence: float | None = _score("expected normalized calibration error, mean over outputs")
    interval_coverage: float | None = _score("targets within their central 95 % interval")
    epistemic_std: float | None = _score(
        "predictive std without noise, mean over samples and outputs"
    )
    total_std: float | None = _score("predictive std with noise, mean over samples and outputs")
    n_ood_samples: int | None = _score("out-of-distribution samples")
    curve: ReliabilityBins | IntervalCurve | None = field(default=None, compare=False)

    def to_dict(self) -> dict[str, float | int | None]:
        """Every number by name, None where a metric does not apply."""
        return {f.name: getattr(self, f.name) for f in fields(self) if f.name != "curve"}

    def plot_reliability(self, ax: "Axes | None" = None) -> "Figure":
        """Accuracy against confidence, or coverage against nominal level in regression.

        Args:
            ax: Axes to draw into; a new figure without one. No pyplot state is touched.

        Returns:
            The figure drawn into; save it with `savefig`.

        Raises:
            ValueError: If the record was built without a curve.
        """
        if isinstance(self.curve, ReliabilityBins):
            return plot_reliability_bins(self.curve, ax)
        if isinstance(self.curve, IntervalCurve):
            return plot_interval_curve(self.curve, ax)
        raise ValueError("this record has no curve to plot; get one from evaluate().")

    def __repr__(self) -> str:
        lines, numbers = [type(self).__name__], self.to_dict()
        # Counts come last.
        for f in sorted(fields(self), key=lambda f: f.name.startswith("n_")):
            value = numbers.get(f.name)
            if value is not None:
                shown = f"{value:d}" if isinstance(value, int) else f"{value:.4f}"
                lines.append(f"  {f.name:<18} {shown:>9}  {f.metadata['meaning']}")
        return "\n".join(lines)


@public_call
def evaluate(
    la_or_probs: Any,
    loader: Targets,
    *,
    ood_loader: Iterable[Any] | None = None,
    n_bins: int = 15,
    link_approx: str | None = None,
    pred_type: str | None = None,
    progress_bar: bool = False,
    ood_probs: torch.Tensor | np.ndarray | None = None,
    likelihood: str | None = None,
    positions: Positions | str = Positions.ALL,
) -> Evaluation:
    """Score a posterior, or predictions, on labelled data.

    A posterior predicts in eval mode; its model, the global random number generators and gradients
    are left as they were. A label whose probability underflows to zero counts as the smallest
    positive number of the dtype (87 nats in float32), with a warning.

    Args:
        la_or_probs: A fitted posterior; probabilities ([n, C], of sequences [n, T, C], of binary
            labels [n, K]); or for regression a pair of means [n, K] and *total* predictive
            variances ([n, K], or covariances [n, K, K]). A posterior's own regression variance is
            epistemic: σ² is added to it here.
        loader: Gives (x, y), or mappings with the posterior's `dict_key_y`. With precomputed
            predictions it must not shuffle; the targets themselves will do as well.
        ood_loader: Out-of-distribution inputs for a classifier, with or without targets.
        n_bins: Equal-width bins of `ece` and `mce` (of confidence), or of `ence` (of std).
        link_approx: Classification link; None means the posterior's `tuned_link_approx` if it has
            one, else its default.
        pred_type: Type of predictive; None means the posterior's default.
        progress_bar: Whether to show progress over the loaders.
        ood_probs: Probabilities [m, C] on out-of-distribution data, in place of `ood_loader`.
        likelihood: "bernoulli" says that precomputed probabilities are of binary labels.
        positions: Of sequences "all", or "last": a posterior predicts only the last position of
            each (the last that an `attention_mask` attends to), and its label [n, T], or the one
            label of the sample [n], is scored.

    Returns:
        A record of floats, None where a metric does not apply.

    Raises:
        TypeError: If `la_or_probs`, `n_bins` or a batch has the wrong type.
        ValueError: If predictions are not finite or no probabilities, if targets are invalid or do
            not match them, if a loader is empty, or if the out-of-distribution data do not apply.
    """
    ranks = ranks_for(la_or_probs)
    with ranks.together("evaluate"):
        n_bins = count(n_bins, "n_bins")
        options = Options(
            link_approx,
            pred_type,
            progress_bar if ranks.is_first else False,
            likelihood,
            parse_choice(Positions, positions, "positions"),
        )
        if ood_loader is not None and ood_probs is not None:
            raise ValueError("got both ood_loader and ood_probs; pass one of them.")
        if ood_loader is not None and isinstance(la_or_probs, torch.Tensor | np.ndarray):
            raise ValueError(
                "ood_loader needs a posterior to predict with; beside precomputed probabilities "
                "pass ood_probs, the probabilities on the out-of-distribution data."
            )
        ranks.agree("evaluate", {**described(la_or_probs, options), "n_bins": n_bins})
        predictions = predict(la_or_probs, loader, options, ranks)
        if isinstance(predictions, GaussianPredictions):
            if ood_loader is not None or ood_probs is not None:
                raise ValueError(
                    "ood_loader and ood_probs apply to classification; leave them out."
                )
            return _score_regression(predictions, n_bins)
        outside = None if ood_probs is None else Unlabelled(ood_probs)
        if ood_loader is not None:
            outside = predict_unlabelled(la_or_probs, ood_loader, options, ranks)
        return score_classification(predictions, outside, n_bins)


def score_classification(
    predictions: ClassPredictions, outside: Unlabelled | None, n_bins: int
) -> Evaluation:
    """Scores of a classifier's predictions, and of its detection of out-of-distribution inputs."""
    probs, labels = predictions.probs, predictions.labels
    confidence, correct = probs.max(axis=1), probs.argmax(axis=1) == labels
    ece, mce = metrics.calibration_errors(confidence, correct, n_bins)
    entropy, information = predictions.entropy, predictions.information
    unknown: tuple[float | None, float | None] = (None, None)
    detected, by_information, n_outside = unknown, unknown, None
    if outside is not None:
        entropy_outside = _entropy_outside(predictions, outside.probs)
        detected, n_outside = metrics.ood_detection(entropy, entropy_outside), len(entropy_outside)
        if information is not None and outside.information is not None:
            by_information = metrics.ood_detection(information, outside.information)
    return Evaluation(
        nll=_mean_nll(predictions),
        n_samples=len(entropy),
        n_bins=n_bins,
        ece=ece,
        adaptive_ece=metrics.adaptive_calibration_error(confidence, correct, n_bins),
        mce=mce,
        brier=metrics.brier_score(probs, labels),
        accuracy=float(correct.mean()),
        aurc=float(metrics.risk_coverage(confidence, correct).mean()),
        entropy=float(entropy.mean()),
        mutual_information=None if information is None else float(information.mean()),
        auroc=detected[0],
        fpr95=detected[1],
        auroc_information=by_information[0],
        fpr95_information=by_information[1],
        n_ood_samples=n_outside,
        curve=reliability_bins(confidence, correct, n_bins),
    )


def _entropy_outside(
    predictions: ClassPredictions, outside: torch.Tensor | np.ndarray
) -> FloatArray:
    """Entropies of out-of-distribution samples [m], comparable to those of the predictions."""
    rows = rows_of(outside, predictions.binary, "ood_probs")
    expected = predictions.labels_per_sample if predictions.binary else predictions.probs.shape[1]
    got = len(rows) // len(outside) if predictions.binary else rows.shape[1]
    if got != expected:
        raise ValueError(
            f"ood_probs must have the classes of the predictions ({expected}), got {got}; "
            "entropies of different numbers of classes do not compare."
        )
    return predictions.summed(metrics.predictive_entropy(rows))


def _score_regression(predictions: GaussianPredictions, n_bins: int) -> Evaluation:
    mean, targets = predictions.mean, predictions.targets
    error, std = targets - mean, np.sqrt(predictions.total_variance)
    curve = interval_curve(metrics.interval_level(error, std), metrics.COVERAGE_LEVEL)
    epistemic = predictions.epistemic_variance
    return Evaluation(
        nll=float(predictions.nll.mean()),
        n_samples=len(targets),
        n_bins=n_bins,
        rmse=float(np.sqrt(np.square(error).mean())),
        ence=metrics.expected_normalized_error(mean, std, targets, n_bins),
        interval_coverage=curve.interval_coverage,
        epistemic_std=None if epistemic is None else float(np.sqrt(epistemic).mean()),
        total_std=float(std.mean()),
        curve=curve,
    )


def _mean_nll(predictions: ClassPredictions) -> float:
    given = metrics.label_probability(predictions.probs, predictions.labels)
    zeros = given < predictions.floor
    if zeros.any():
        warnings.warn(
            f"{int(zeros.sum())} of {len(given)} labels have probability zero; each counts as "
            f"{-np.log(predictions.floor):.1f} nats in the NLL. Predict in a wider dtype.",
            stacklevel=5,
        )
    return float(predictions.nll.mean())
