"""What a posterior was asked for."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from types import MappingProxyType
from typing import Any

from laplace.curvature.curvature import CurvatureInterface

from laplace_debiased.estimation.request import FitRequest, resolve_scheme
from laplace_debiased.likelihoods import LikelihoodName, LossModel, loss_model
from laplace_debiased.options import CurvatureOptions, Scheme


@dataclass(frozen=True, eq=False)
class Backend:
    """A laplace-torch curvature backend with its arguments.

    Attributes:
        kind: the backend class.
        kwargs: its keyword arguments.
        kron_kwargs: arguments of every call of its ``kron``.
    """

    kind: type[CurvatureInterface]
    kwargs: Mapping[str, Any] = field(default_factory=lambda: MappingProxyType({}))
    kron_kwargs: Mapping[str, Any] = field(default_factory=lambda: MappingProxyType({}))


@dataclass(frozen=True, eq=False)
class Arguments:
    """A posterior's arguments, checked; what a fit or a tuning changes is not among them.

    Attributes:
        likelihood: a :class:`LikelihoodName`'s value, as a plain string (an enum would make saved
            states unsafe to load).
        scheme: as given; None leaves it to the fit.
        options: the rest, with defaults.
        strict: whether a trainable parameter without a posterior is an error.
        backend: laplace-torch backend, or None for our own pass.
        rank: number of directions of a low-rank posterior; None for all.
        ignore_index: class label that does not count, or None.
        residual_noise: whether every fit sets σ to the root mean square of its residuals.
        allow_probabilities: whether class outputs that all sum to one are taken for logits.
        dict_key_x: key of the inputs in mapping batches.
        dict_key_y: key of the labels in mapping batches.
        n_outputs: of how many outputs of each sample predictions need moments; None for all,
            "auto" for what the number of classes suggests.
    """

    likelihood: str
    scheme: Scheme | None
    options: CurvatureOptions
    strict: bool = False
    backend: Backend | None = None
    rank: int | None = None
    ignore_index: int | None = None
    residual_noise: bool = False
    allow_probabilities: bool = False
    dict_key_x: str = "input_ids"
    dict_key_y: str = "labels"
    n_outputs: int | str | None = "auto"

    @property
    def host_likelihood(self) -> str:
        """What laplace-torch is told: it does not know the Bernoulli likelihood."""
        if self.likelihood == LikelihoodName.BERNOULLI:
            return LikelihoodName.CLASSIFICATION.value
        return self.likelihood

    def loss(self, *, positions: bool) -> LossModel:
        """The loss model.

        Args:
            positions: whether "classification" may have outputs at several positions per sample.
        """
        return loss_model(
            self.likelihood,
            ignore_index=self.ignore_index,
            positions=positions,
            allow_probabilities=self.allow_probabilities,
        )

    def options_for(self, request: FitRequest) -> CurvatureOptions:
        """The options of one fit: its scheme resolved, its folds those of the loaders.

        Raises:
            ValueError: if the loaders contradict them.
        """
        scheme = resolve_scheme(self.scheme, self.options.scheme, request)
        folds = self.options.folds if request.magnitude_loader is None else 2
        return replace(self.options, scheme=scheme, folds=folds)
