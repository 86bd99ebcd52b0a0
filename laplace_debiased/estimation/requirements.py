"""Checks of a posterior's hyper-parameters and inputs, with messages that say what to do."""

from __future__ import annotations

import torch
from torch import Tensor

from laplace_debiased.likelihoods import LossModel, SoftmaxCrossEntropy


def require_labels(n_labelled: int, n_samples: int) -> None:
    """Check that some label counts.

    Args:
        n_labelled: samples with a label that counts.
        n_samples: all of them.

    Raises:
        ValueError: if there is none.
    """
    if not n_labelled:
        raise ValueError(
            f"none of the {n_samples} samples has a label that counts: every target is "
            "ignore_index. Check the labels, or ignore_index."
        )


def rows_sum_to_one(outputs: Tensor) -> Tensor:
    """Whether all outputs [m, C] ([m, T, C]) of a sample are non-negative and sum to one [m]."""
    rows = outputs.detach()
    resolution = max(1e-5, 4 * torch.finfo(rows.dtype).eps)
    sums_to_one = (rows >= 0).all(-1) & ((rows.sum(-1) - 1).abs() <= resolution)
    return sums_to_one.reshape(len(rows), -1).all(-1)


def require_logits(loss: LossModel, n_summing_to_one: int, n_samples: int) -> None:
    """Check that class outputs are not probabilities already.

    Softmax of a softmax is a silent error: all that the loss sees are logits between 0 and 1. That
    every row of many sums to one by chance is out of the question.

    Args:
        loss: the loss model.
        n_summing_to_one: samples of a walk whose outputs do, see :func:`rows_sum_to_one`.
        n_samples: all of them.

    Raises:
        ValueError: if all do.
    """
    if not isinstance(loss, SoftmaxCrossEntropy) or loss.allow_probabilities:
        return
    if n_samples > 1 and n_summing_to_one == n_samples:
        raise ValueError(
            f"the model's outputs are probabilities: those of all {n_samples} samples sum "
            "to one. likelihood='classification' takes logits; remove the softmax at the model's "
            "end. If these are logits nevertheless, pass allow_probabilities=True."
        )
