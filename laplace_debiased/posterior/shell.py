"""What the parts of a posterior (fitting, predicting, priors, saving) see of the whole."""

from __future__ import annotations

from typing import Any, ClassVar, Protocol

import torch
from laplace.utils.enums import LinkApprox
from torch import Tensor, nn

from laplace_debiased.curvature import Coverage
from laplace_debiased.data.keys import Keys
from laplace_debiased.estimation.arguments import Arguments, FitRequest
from laplace_debiased.estimation.structure import Fit, Structure
from laplace_debiased.estimation.target import Target
from laplace_debiased.network.watch import ModelWatch
from laplace_debiased.predictive import Predictor
from laplace_debiased.tuning import TuningResult


class Shell(Protocol):
    """A posterior for the functions that are its methods; ``DebiasedPosterior`` says the rest."""

    model: nn.Module
    likelihood: str
    params: list[Tensor]
    n_params: int
    mean: Tensor
    prior_precision: Any
    prior_mean: Any
    sigma_noise: Any
    temperature: float
    enable_backprop: bool
    tuning_result: TuningResult | None
    tuned_link_approx: LinkApprox | None
    _arguments: Arguments
    _keys: Keys
    _structure: Structure
    _target: Target
    _chosen: Coverage | None
    _coverage: Coverage | None
    _fit: Fit | None
    _predictor: Predictor | None
    _watch: ModelWatch | None
    _fitted_on: FitRequest | None
    _prior_precision: Tensor
    _prior_mean: Any
    _sigma_noise: Tensor
    _warned_about_link: bool
    _settled: frozenset[str]
    _takes_diagonal_prior: ClassVar[bool]

    # What DebiasedPosterior documents: read, checked, written.
    @property
    def coverage(self) -> Coverage: ...  # noqa: D102
    @property
    def fitted(self) -> Fit: ...  # noqa: D102
    @property
    def predictor(self) -> Predictor: ...  # noqa: D102
    @property
    def prior_precision_diag(self) -> Tensor: ...  # noqa: D102
    @property
    def _device(self) -> torch.device: ...
    @property
    def _dtype(self) -> torch.dtype: ...
    @property
    def _H_factor(self) -> Tensor: ...  # noqa: N802
    def _check_H_init(self) -> None: ...  # noqa: N802
    def _check_model(self) -> None: ...
    def _set_target(self, target: Target, coverage: Coverage | None) -> None: ...
    def _checked_prior(self) -> Tensor: ...
    def _precision(self, *, differentiable: bool) -> Any: ...
    def _adopt(self, fit: Fit) -> None: ...
    def sample(self, n_samples: int, generator: torch.Generator | None) -> Tensor: ...  # noqa: D102
    def _decorrelated(self, noise: Tensor) -> Tensor: ...
    def state_dict(self) -> dict[str, Any]: ...  # noqa: D102
    def log_marginal_likelihood(self) -> Tensor: ...  # noqa: D102
    def __call__(self, x: Any, **kwargs: Any) -> Any: ...  # noqa: D102
