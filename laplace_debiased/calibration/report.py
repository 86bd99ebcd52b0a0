"""`predictive_report`: what was predicted for each sample, and how surely."""

from dataclasses import dataclass, fields
from typing import Any

import numpy as np

from laplace_debiased.calibration.asking import Options, described, predict, ranks_for
from laplace_debiased.calibration.batches import FloatArray, IntArray, Targets
from laplace_debiased.calibration.predictions import ClassPredictions
from laplace_debiased.network.modes import public_call


@dataclass(frozen=True, eq=False)
class PredictiveReport:
    """Predictions sample by sample, in the loader's order; None where a column does not apply.

    Attributes:
        prediction: Most probable class ([n], of K > 1 binary labels [n, K]), or predictive mean
            [n, K].
        target: Label, in the same shape.
        nll: Negative log-likelihood of each sample's target [n], in nats, summed over its labels.
        confidence: Probability of the predicted class, in the labels' shape.
        entropy: Predictive entropy [n], in nats, summed over a sample's labels.
        mutual_information: Epistemic part of it [n]: what a label would tell about the weights.
        correct: Whether the predicted class is the label, in the labels' shape.
        epistemic_std: Predictive standard deviation without noise [n, K].
        total_std: The same with noise [n, K].
    """

    prediction: IntArray | FloatArray
    target: IntArray | FloatArray
    nll: FloatArray
    confidence: FloatArray | None = None
    entropy: FloatArray | None = None
    mutual_information: FloatArray | None = None
    correct: np.ndarray | None = None
    epistemic_std: FloatArray | None = None
    total_std: FloatArray | None = None

    def __len__(self) -> int:
        return len(self.nll)

    def __repr__(self) -> str:
        columns = ", ".join(self.to_dict())
        return f"{type(self).__name__}({len(self)} samples: {columns})"

    def to_dict(self) -> dict[str, np.ndarray]:
        """The columns that apply, by name; `pandas.DataFrame` takes them for K = 1."""
        columns = {f.name: getattr(self, f.name) for f in fields(self)}
        return {name: column for name, column in columns.items() if column is not None}


@public_call
def predictive_report(
    la_or_probs: Any,
    loader: Targets,
    *,
    link_approx: str | None = None,
    pred_type: str | None = None,
    progress_bar: bool = False,
    likelihood: str | None = None,
) -> PredictiveReport:
    """Predictions and their uncertainty for each sample; arguments and errors as in `evaluate`."""
    ranks = ranks_for(la_or_probs)
    with ranks.together("predictive_report"):
        options = Options(
            link_approx, pred_type, progress_bar if ranks.is_first else False, likelihood
        )
        ranks.agree("predictive_report", described(la_or_probs, options))
        predictions = predict(la_or_probs, loader, options, ranks)
    if isinstance(predictions, ClassPredictions):
        probs, labels = predictions.probs, predictions.labels
        top = probs.argmax(axis=1)
        return PredictiveReport(
            prediction=predictions.by_sample(top),
            target=predictions.by_sample(labels),
            nll=predictions.nll,
            confidence=predictions.by_sample(probs.max(axis=1)),
            entropy=predictions.entropy,
            mutual_information=predictions.information,
            correct=predictions.by_sample(top == labels),
        )
    epistemic = predictions.epistemic_variance
    return PredictiveReport(
        prediction=predictions.mean,
        target=predictions.targets,
        nll=predictions.nll,
        epistemic_std=None if epistemic is None else np.sqrt(epistemic),
        total_std=np.sqrt(predictions.total_variance),
    )
