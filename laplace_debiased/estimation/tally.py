"""What the first walk of a fit adds up beside the curvature: losses, and what outputs look like."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from laplace_debiased.data.sources import Batch
from laplace_debiased.likelihoods import LossModel, SoftmaxCrossEntropy
from laplace_debiased.likelihoods.losses import Bernoulli
from laplace_debiased.parallel.ranks import Ranks


@dataclass
class Tally:
    """Sums over samples.

    Attributes:
        total_loss: weighted loss over the draws so far.
        share: Σ over draws of weight times trace of the loss Hessian.
        squared_share: Σ of its square.
        n_draws: draws.
        n_samples: samples; one that was drawn twice counts once.
        n_labelled: samples with a label that counts.
        n_summing_to_one: samples whose outputs look like probabilities.
        probability_evidence: of binary labels, that their outputs are probabilities, in nats.
        n_outputs: C.
    """

    total_loss: float = 0.0
    share: float = 0.0
    squared_share: float = 0.0
    n_draws: int = 0
    n_samples: int = 0
    n_labelled: int = 0
    n_summing_to_one: int = 0
    probability_evidence: float = 0.0
    n_outputs: int = 0

    def state(self) -> dict[str, Any]:
        """The sums so far, to be given to :meth:`restore`."""
        return asdict(self)

    def restore(self, state: Mapping[str, Any]) -> None:
        """Add what another's :meth:`state` holds."""
        for name, value in state.items():
            before = getattr(self, name)
            setattr(self, name, max(before, value) if name == "n_outputs" else before + value)

    def over_ranks(self, ranks: Ranks) -> Tally:
        """That of all ranks."""
        total = Tally()
        for state in ranks.gathered("the loss", self.state()):
            total.restore(state)
        return total

    def add(self, loss: LossModel, outputs: Tensor, part: Batch) -> None:
        """Add the outputs of some samples."""
        losses = loss.losses(outputs, part.targets).double()
        counts, weights = part.counts.to(losses.device), part.weights.to(losses)
        shares = loss.hessian_trace(outputs, part.targets).double() * weights
        self.total_loss += float((losses * weights * counts).sum())
        self.share += float((shares * counts).sum())
        self.squared_share += float((shares.square() * counts).sum())
        self.n_draws += int(counts.sum())
        self.n_samples += len(outputs)
        self.n_labelled += int((loss.n_labels(part.targets) > 0).sum())
        self.n_summing_to_one += int(_rows_sum_to_one(outputs).sum())
        if isinstance(loss, Bernoulli):
            self.probability_evidence += loss.probability_evidence(outputs, part.targets)
        self.n_outputs = outputs.shape[-1]

    def require_usable(self, loss: LossModel) -> None:
        """Check labels and outputs of a whole walk.

        Raises:
            ValueError: if no label counts, or the outputs are probabilities already.
        """
        if not self.n_labelled:
            raise ValueError(
                f"none of the {self.n_samples} samples has a label that counts: every target is "
                "ignore_index. Check the labels, or ignore_index."
            )
        if isinstance(loss, Bernoulli):
            loss.require_logits(self.probability_evidence)
        # Softmax of a softmax is a silent error: all that the loss sees are logits between 0 and 1.
        # That every row of many sums to one by chance is out of the question.
        logits = not isinstance(loss, SoftmaxCrossEntropy) or loss.allow_probabilities
        if not logits and self.n_samples > 1 and self.n_summing_to_one == self.n_samples:
            raise ValueError(
                f"the model's outputs are probabilities: those of all {self.n_samples} samples sum "
                "to one. likelihood='classification' takes logits; remove the softmax at the "
                "model's end. If these are logits nevertheless, pass allow_probabilities=True."
            )

    @property
    def mean_loss(self) -> float:
        """Mean loss over the draws, weighted like the curvature, in nats."""
        return self.total_loss / self.n_draws

    @property
    def effective_samples(self) -> float | None:
        """(Σ w h)² / Σ (w h)² over draws, h the trace of each sample's loss Hessian."""
        return self.share**2 / self.squared_share if self.squared_share > 0 else self.n_draws


def _rows_sum_to_one(outputs: Tensor) -> Tensor:
    """Whether all outputs [m, C] ([m, T, C]) of a sample are non-negative and sum to one [m]."""
    rows = outputs.detach()
    resolution = max(1e-5, 4 * torch.finfo(rows.dtype).eps)
    sums_to_one = (rows >= 0).all(-1) & ((rows.sum(-1) - 1).abs() <= resolution)
    return sums_to_one.reshape(len(rows), -1).all(-1)
