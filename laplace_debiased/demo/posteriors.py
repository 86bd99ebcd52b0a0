"""The posteriors that the demo compares, each behind the same three calls."""

from __future__ import annotations

import warnings
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
import torch
from laplace.baselaplace import FullLaplace, KronLaplace
from laplace.curvature import GGNInterface
from torch import Tensor, nn
from torch.nn import functional

from laplace_debiased.demo.data import Split
from laplace_debiased.factory import DebiasedLaplace
from laplace_debiased.likelihoods import probit

LOG10_PRIOR_MIN, LOG10_PRIOR_MAX, N_PRIORS = -4, 4, 21
"""The grid from which every posterior's prior precision is chosen."""

HOST_BATCH = 16
"""laplace-torch differentiates a whole batch per output: its cost grows with the batch squared."""


class Posterior(Protocol):
    """A fitted posterior, ours or laplace-torch's. Predictions use the probit link."""

    def tuned_prior(self, validation: Split) -> float:
        """Prior precision of the grid with the lowest mean validation NLL."""

    def predict(self, split: Split, prior_precision: float) -> Tensor:
        """Probabilities [n, C], the way a user gets them."""

    def repredict(self, split: Split, prior_precision: float) -> Tensor:
        """The same, from what earlier calls have left behind where that is faster."""


def prior_grid() -> Tensor:
    """Prior precisions to choose from, ascending, [21]."""
    return torch.logspace(LOG10_PRIOR_MIN, LOG10_PRIOR_MAX, N_PRIORS)


@dataclass(frozen=True, eq=False)
class OurPosterior:
    """A posterior of this library."""

    la: Any

    @classmethod
    def fit(
        cls, model: nn.Module, train: Split, n_samples: int | None, seed: int, **options: Any
    ) -> OurPosterior:
        """Fit on ``n_samples`` of the training split (None: all); ``options`` as for the class."""
        la = DebiasedLaplace(model, **options)
        la.fit(train.loader(), n_samples=n_samples, seed=seed)
        return cls(la)

    def tuned_prior(self, validation: Split) -> float:
        """By the library's own grid search: one pass over the validation split."""
        with warnings.catch_warnings():
            # An optimum on the grid's edge is reported beside the table.
            warnings.filterwarnings("ignore", message=".*end of the grid", category=UserWarning)
            self.la.optimize_prior_precision(
                val_loader=validation.loader(),
                log_prior_prec_min=LOG10_PRIOR_MIN,
                log_prior_prec_max=LOG10_PRIOR_MAX,
                grid_size=N_PRIORS,
                refine=False,
            )
        return float(self.la.tuning_result.prior_precision)

    def predict(self, split: Split, prior_precision: float) -> Tensor:
        """By calling the posterior."""
        self.la.prior_precision = prior_precision
        return torch.cat([self.la(inputs) for inputs, _ in split.loader()])

    repredict = predict


@dataclass(frozen=True, eq=False)
class Jacobians:
    """Jacobians [n, C, P] and outputs [n, C] of one network per split, computed once."""

    backend: GGNInterface
    _known: dict[int, tuple[Split, Tensor, Tensor]] = field(default_factory=dict)

    @classmethod
    def of(cls, model: nn.Module) -> Jacobians:
        """Nothing computed yet."""
        return cls(GGNInterface(model, "classification"))

    def compute(self, split: Split) -> tuple[Tensor, Tensor]:
        """Jacobians [n, C, P] and outputs [n, C], with laplace-torch's own code."""
        parts = [self.backend.jacobians(inputs) for inputs, _ in split.loader(HOST_BATCH)]
        jacobians, outputs = zip(*parts, strict=True)
        return torch.cat(jacobians).detach(), torch.cat(outputs).detach()

    def __call__(self, split: Split) -> tuple[Tensor, Tensor]:
        """What :meth:`compute` gives, remembered."""
        if id(split) not in self._known:
            # The split is kept beside its Jacobians: its id is then not given to another one.
            self._known[id(split)] = (split, *self.compute(split))
        return self._known[id(split)][1:]


@dataclass(frozen=True, eq=False)
class HostPosterior:
    """A posterior of laplace-torch.

    Its own grid search averages the losses of the points before into each point's loss and
    differentiates the network anew for each, so a correct search with one differentiation stands
    in for it.
    """

    la: KronLaplace | FullLaplace
    jacobians: Jacobians

    @classmethod
    def fit_kron(cls, model: nn.Module, data: Split, jacobians: Jacobians) -> HostPosterior:
        """``KronLaplace`` of ``data``, scaled to ``data``'s size as laplace-torch does it."""
        la = KronLaplace(model, "classification")
        la.fit(data.loader())
        return cls(la, jacobians)

    @classmethod
    def fit_dense(cls, model: nn.Module, data: Split, jacobians: Jacobians) -> HostPosterior:
        """``FullLaplace``: the dense generalized Gauss-Newton matrix, no structure assumed."""
        la = FullLaplace(model, "classification", backend=GGNInterface)
        la.fit(data.loader(HOST_BATCH))
        return cls(la, jacobians)

    def rescaled(self, n_data: int) -> HostPosterior:
        """A Kronecker posterior with its curvature scaled from its own data to ``n_data``."""
        la = KronLaplace(self.la.model, "classification")
        factor = n_data / self.la.n_data
        la.H_facs = self.la.H_facs * factor
        la.H = la.H_facs.decompose(damping=la.damping)
        la.mean, la.loss = self.la.mean, self.la.loss * factor
        la.n_data, la.n_outputs = n_data, self.la.n_outputs
        return HostPosterior(la, self.jacobians)

    def tuned_prior(self, validation: Split) -> float:
        """By trying every prior precision of the grid; where it fails it is no candidate."""
        jacobians, outputs = self.jacobians.compute(validation)
        losses = []
        for prior in prior_grid().tolist():
            try:
                probs = self._probabilities(jacobians, outputs, prior)
            except torch.linalg.LinAlgError:  # the dense one, at priors below float32's resolution
                losses.append(float("inf"))
                continue
            losses.append(float(functional.nll_loss(probs.log(), validation.labels)))
        return float(prior_grid()[int(np.nanargmin(losses))])

    def predict(self, split: Split, prior_precision: float) -> Tensor:
        """By calling the posterior."""
        self.la.prior_precision = prior_precision
        return torch.cat([self.la(inputs) for inputs, _ in split.loader(HOST_BATCH)]).detach()

    def repredict(self, split: Split, prior_precision: float) -> Tensor:
        """With Jacobians that all of laplace-torch's posteriors share."""
        return self._probabilities(*self.jacobians(split), prior_precision)

    def _probabilities(self, jacobians: Tensor, outputs: Tensor, prior: float) -> Tensor:
        self.la.prior_precision = prior
        variance = self.la.functional_variance(jacobians).diagonal(dim1=-2, dim2=-1)
        return probit(outputs, variance).detach()
