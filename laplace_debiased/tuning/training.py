"""Whether a prior that was chosen without validation data does harm."""

from __future__ import annotations

import warnings
from typing import Any

from laplace.utils.enums import LinkApprox
from torch import Tensor

from laplace_debiased.checks import shortened
from laplace_debiased.predictive.predictor import OutputCovariance
from laplace_debiased.tuning.validation import Link, Validation

N_SAMPLES = 128
"""Training samples that are looked at."""

_HARM = 0.1
"""Nats per sample by which the posterior may fall behind the MAP model on training data.

A posterior is less certain than a network of its own training data, and should be. On 128 images of
a public CIFAR-10 ResNet-20 the prior tuned on validation data costs 0.01 to 0.03 nats; that of the
marginal likelihood, which makes predictions on other data useless, 0.5.
"""


def warn_if_harmful(validation: Validation, prior: Tensor, precision: Any) -> None:
    """Compare posterior and MAP model on training samples; warn if the posterior is far behind.

    Args:
        validation: training samples, and no loss of the user's own.
        prior: prior precision that the marginal likelihood chose.
        precision: the posterior precision under it, as the predictor prepares it.
    """
    subject = validation.subject
    link: Link = None if validation.regression else LinkApprox.MC
    covariance = validation.reads_covariance(link)
    kind = OutputCovariance.PER_SAMPLE if covariance else OutputCovariance.DIAGONAL
    posterior, network, n_samples = validation.fresh_scorer(), validation.fresh_scorer(), 0
    for inputs, targets in validation.batches(progress_bar=False):
        found = subject.predictor.moments(inputs, precision, kind, subject.selection)
        mean, spread, targets, picked = validation.counted(
            found.mean, found.covariance.unsqueeze(0), targets, found.chosen
        )
        posterior.update(validation.predict(mean, spread[0], link, None, picked), targets)
        network.update(validation.map_prediction(mean), targets)
        n_samples += len(targets)
    loss, map_loss = posterior.value(), network.value()
    if n_samples and loss > map_loss + _HARM:
        chosen = shortened(prior.detach(), digits=3)
        warnings.warn(
            f"the prior precision {chosen} that maximises the marginal likelihood "
            f"predicts training samples far worse than the MAP model: NLL {loss:.3g} "
            f"against {map_loss:.3g} on {n_samples} of them. Where a network fits its training "
            "data closely, the marginal likelihood asks for too small a prior. Choose it on "
            "validation data: optimize_prior_precision(val_loader=...).",
            UserWarning,
            stacklevel=5,
        )
