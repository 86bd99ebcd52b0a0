"""Losses of sampled networks: one pass over the validation set for every prior precision."""

from __future__ import annotations

from typing import Any

import torch
from tqdm import tqdm

from laplace_debiased.likelihoods import LikelihoodName
from laplace_debiased.network.inputs import invoke, to_device
from laplace_debiased.network.modes import evaluation_mode
from laplace_debiased.tuning.validation import Validation

_COMPARABLE = (
    LikelihoodName.CLASSIFICATION,
    LikelihoodName.BERNOULLI,
    LikelihoodName.REGRESSION,
)


def sampled_losses(
    validation: Validation, priors: list[float], n_samples: int, seed: int, progress_bar: bool
) -> list[float]:
    """Losses at all prior precisions, with the same random numbers."""
    return [
        _sampled_loss(validation, prior, n_samples, seed)
        for prior in tqdm(priors, disable=not progress_bar, desc="[Grid search]")
    ]


def _sampled_loss(validation: Validation, prior: float, n_samples: int, seed: int) -> float:
    subject, scorer = validation.subject, validation.fresh_scorer()
    generator = torch.Generator(subject.device).manual_seed(seed)
    for inputs, targets in validation.batches(progress_bar=False):
        prediction: Any = subject.sampled(prior, inputs, n_samples, generator)
        outputs = prediction[0] if isinstance(prediction, tuple) else prediction
        subject.loss.check_targets(outputs, targets)
        if not isinstance(prediction, tuple):
            probs, _, targets, _ = validation.counted(prediction, prediction.unsqueeze(0), targets)
            prediction = (probs,)
        scorer.update(prediction, targets)
    return validation.losses([scorer])[0]


def network_map_loss(validation: Validation) -> float | None:
    """The MAP model's loss, by a walk of its own: sampled networks do not pass its outputs.

    None with a loss of the user's own, or for a likelihood that predicts something else.
    """
    subject = validation.subject
    if validation.loss is not None or subject.likelihood not in _COMPARABLE:
        return None
    scorer = validation.fresh_scorer()
    with evaluation_mode(subject.network), torch.no_grad():
        for inputs, targets in validation.batches(progress_bar=False):
            outputs = invoke(subject.network, to_device(inputs, subject.device))
            outputs, _, targets, _ = validation.counted(outputs, outputs.unsqueeze(0), targets)
            scorer.update(validation.map_prediction(outputs), targets)
    return validation.losses([scorer])[0]
