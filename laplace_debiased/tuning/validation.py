"""What validation data say of predictions: batches, predictions and losses under any link."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeAlias

import torch
import torchmetrics
from laplace.utils.enums import LinkApprox
from torch import Tensor, nn
from tqdm import tqdm

from laplace_debiased.data.block import Block
from laplace_debiased.data.keys import Keys
from laplace_debiased.likelihoods import InverseLink, LikelihoodName, LossModel
from laplace_debiased.parallel.ranks import ALONE, Ranks
from laplace_debiased.predictive import OutputSelection, Predictor
from laplace_debiased.predictive.call import inverse_link_of
from laplace_debiased.predictive.probabilities import class_probabilities, needs_covariance
from laplace_debiased.tuning.scores import Prediction, Scorer, scorer_factory


@dataclass(frozen=True, eq=False)
class Subject:
    """A fitted predictor, and what its losses depend on beside the prior.

    Attributes:
        predictor: the fitted curvature.
        likelihood: a :class:`LikelihoodName`'s value.
        loss: the loss model.
        h: likelihood factor 1/(σ²·temperature).
        noise_variance: σ².
        device: the network's.
        dtype: of the posterior.
        keys: which entries of mapping batches are read.
        network: the network, for the MAP model's loss beside sampled networks'.
        sampled: (prior precision, inputs, n_samples, generator) to the prediction of sampled
            networks.
        selection: of which outputs predictions need moments.
        n_outputs: C.
        byte_budget: what moments of a whole grid may take at a time.
    """

    predictor: Predictor
    likelihood: str
    loss: LossModel
    h: Tensor
    noise_variance: float
    device: torch.device
    dtype: torch.dtype
    keys: Keys
    network: nn.Module
    sampled: Callable[..., Tensor | tuple[Tensor, Tensor]]
    selection: OutputSelection
    n_outputs: int
    byte_budget: int

    @property
    def inverse_link(self) -> InverseLink:
        """From outputs to probabilities."""
        return inverse_link_of(self.likelihood)


Link: TypeAlias = LinkApprox | None
"""How probabilities are approximated; None where predictions are moments."""


@dataclass(frozen=True, eq=False)
class Validation:
    """A validation set and the loss of predictions on it.

    Attributes:
        subject: what is tuned.
        loader: gives labelled batches.
        loss: the user's own, or None for the negative log likelihood.
        ranks: all ranks, each of which walks a part.
        fresh_scorer: makes an empty running loss.
        block: what this rank walks.
    """

    subject: Subject
    loader: Any
    loss: torchmetrics.Metric | Callable[..., Tensor | float] | None
    ranks: Ranks = ALONE
    fresh_scorer: Callable[[], Scorer] = field(init=False, repr=False)
    block: Block = field(init=False, repr=False)

    def __post_init__(self) -> None:
        noise, likelihood = self.subject.noise_variance, self.subject.likelihood
        factory = scorer_factory(
            self.loss, likelihood, noise_variance=noise, is_part=self.ranks.world > 1
        )
        object.__setattr__(self, "fresh_scorer", factory)
        object.__setattr__(self, "block", Block(self.loader, self.ranks, "val_loader"))

    @property
    def regression(self) -> bool:
        """Whether predictions are moments."""
        return self.subject.likelihood == LikelihoodName.REGRESSION

    def reads_covariance(self, link: Link) -> bool:
        """Whether predictions need more than variances."""
        if link is None:
            return self.loss is not None
        return needs_covariance(link, False, self.subject.inverse_link)

    def batches(self, progress_bar: bool) -> Iterator[tuple[Any, Tensor]]:
        """Inputs, and targets on the network's device.

        Raises:
            ValueError: if the loader is empty.
        """
        device, n_batches = self.subject.device, 0
        for batch in tqdm(self.block, disable=not progress_bar, desc="[Validation set]"):
            n_batches += 1
            inputs, targets = self.subject.keys.split(batch)
            yield inputs, targets.to(device)
        if not sum(self.block.everyones("validation batches", n_batches)):
            raise ValueError("val_loader is empty.")

    def losses(self, scorers: Sequence[Scorer]) -> list[float]:
        """What running losses say of the whole validation set, in one exchange for all."""
        if self.ranks.world == 1:
            return [scorer.value() for scorer in scorers]
        states = self.block.everyones("losses", [scorer.state() for scorer in scorers])
        totals = [self.fresh_scorer() for _ in scorers]
        for theirs in states:
            for total, state in zip(totals, theirs, strict=True):
                total.add(state)
        return [total.value() for total in totals]

    def counted(
        self,
        mean: Tensor,
        targets: Tensor,
        covariances: Tensor | None = None,
        chosen: Tensor | None = None,
    ) -> tuple[Tensor, Tensor, Any, Tensor | None]:
        """Only what has a label that counts; the positions of sequences as samples.

        Class indices come out in int64, which lookups need and a user's loss may rely on.

        Args:
            mean: [m, ...] or [m, T, ...].
            targets: [m, ...] or [m, T].
            covariances: [G, m, ...] or [G, m, T, ...].
            chosen: which outputs the covariances are of [m, K] or [m, T, K], where not all.
        """
        mask = self.subject.loss.label_mask(targets)
        if self.subject.likelihood == LikelihoodName.CLASSIFICATION and not (
            targets.is_floating_point() or targets.is_complex()
        ):
            targets = targets.long()
        if mean.ndim == 3 and targets.ndim == 2:
            mean, targets = mean.flatten(0, 1), targets.flatten()
            mask = None if mask is None else mask.flatten()
            covariances = None if covariances is None else covariances.flatten(1, 2)
            chosen = None if chosen is None else chosen.flatten(0, 1)
        if mask is not None:
            mean, targets = mean[mask], targets[mask]
            covariances = None if covariances is None else covariances[:, mask]
            chosen = None if chosen is None else chosen[mask]
        return mean, targets, covariances, chosen

    def predict(
        self,
        mean: Tensor,
        covariance: Tensor,
        link: Link,
        n_points: int | None,
        chosen: Tensor | None = None,
    ) -> Prediction:
        """Predictions from moments: probabilities under a link, or the moments themselves."""
        if link is None:
            return mean, covariance
        inverse = self.subject.inverse_link
        return (class_probabilities(mean, covariance, link, n_points, None, inverse, chosen),)

    def map_prediction(self, outputs: Tensor) -> Prediction:
        """What the MAP model predicts by its outputs alone: no epistemic variance."""
        if self.regression:
            return outputs, torch.zeros_like(outputs)
        return (self.subject.inverse_link(outputs.double()),)
