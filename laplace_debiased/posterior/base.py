"""What all debiased posteriors share: checked hyper-parameters, coverage, prediction."""

from __future__ import annotations

import warnings
from abc import abstractmethod
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any

import torch
from laplace.utils.enums import LinkApprox, PredType
from torch import Tensor, nn

from laplace_debiased.checks import checked_integer, positive_value
from laplace_debiased.curvature import Coverage
from laplace_debiased.errors import NotFittedError
from laplace_debiased.likelihoods import (
    InverseLink,
    LikelihoodName,
    LossModel,
    gaussian_samples,
    loss_model,
    residual_noise,
    softmax,
)
from laplace_debiased.network.precision import HALF_DTYPES, exact_arithmetic
from laplace_debiased.network.samples import network_samples
from laplace_debiased.options import parse_choice
from laplace_debiased.posterior.configure import Settings
from laplace_debiased.posterior.stored import StoredPosterior
from laplace_debiased.predictive import OutputCovariance
from laplace_debiased.predictive.probabilities import class_probabilities, needs_covariance
from laplace_debiased.tuning.grid import TuningResult

Inputs = Tensor | Sequence[Tensor] | Mapping[str, Any]
"""What a model takes: a tensor, several, or a mapping that holds tensors."""


class DebiasedPosterior(StoredPosterior):
    """Mixin over a laplace-torch posterior: prediction without Jacobians.

    A concrete posterior gives its output moments (``_moments``), the same for a grid of priors
    (``_sweep``), and its fit.
    """

    model: nn.Module
    likelihood: str
    _settings: Settings
    _takes_positions: bool = False
    mean: Tensor
    params: list[Tensor]
    enable_backprop: bool
    coverage: Coverage
    tuned_link_approx: LinkApprox | None = None
    tuning_result: TuningResult | None = None
    _warned_about_link: bool = False

    @abstractmethod
    def _moments(self, inputs: Inputs, covariance: OutputCovariance) -> tuple[Tensor, Tensor]:
        """Outputs [m, C] and their covariance under the posterior."""

    @abstractmethod
    def _sweep(self, inputs: Inputs, priors: Tensor, diagonal: bool) -> tuple[Tensor, Tensor]:
        """Outputs [m, C] and their covariance under each of G scalar prior precisions."""

    # -- hyper-parameters ------------------------------------------------------------------

    @property
    def _dtype(self) -> torch.dtype:
        """Dtype of the posterior: the model's, but float32 for half precision."""
        dtype = next(self.model.parameters()).dtype
        return torch.float32 if dtype in HALF_DTYPES else dtype

    @property
    def temperature(self) -> float:
        """Temperature of the likelihood, positive."""
        return self._temperature

    @temperature.setter
    def temperature(self, temperature: float) -> None:
        value = positive_value("temperature", temperature)
        self._temperature = float(torch.as_tensor(value, dtype=torch.float64))

    @property
    def ignore_index(self) -> int | None:
        """Class label that does not count; None if all do."""
        return self._settings.ignore_index

    @property
    def _loss_model(self) -> LossModel:
        return loss_model(
            self.likelihood,
            ignore_index=self._settings.ignore_index,
            positions=self._takes_positions,
            allow_probabilities=self._settings.allow_probabilities,
        )

    def _residual_noise(self, mean_loss: float, n_outputs: int) -> float | None:
        """σ of a fit's residuals, where the posterior was asked to follow them."""
        if not self._settings.residual_noise:
            return None
        return residual_noise(mean_loss, n_outputs)

    @property
    def _inverse_link(self) -> InverseLink:
        """From outputs to probabilities."""
        return torch.sigmoid if self.likelihood == LikelihoodName.BERNOULLI else softmax

    @property
    def _predicts_outputs(self) -> bool:
        """Whether predictions are moments of the outputs: in regression, and of rewards."""
        return self.likelihood in (LikelihoodName.REGRESSION, LikelihoodName.REWARD_MODELING)

    def _tensors_of(self, coverage: Coverage) -> list[Tensor]:
        """The covered parameters, in order."""
        named = dict(self._covered_model.named_parameters())
        return [named[name] for name in coverage.covered]

    def _set_coverage(self, coverage: Coverage) -> None:
        """Restrict the posterior to the covered parameters."""
        self.coverage = coverage
        self.params = self._tensors_of(coverage)
        self.n_params = sum(parameter.numel() for parameter in self.params)
        self.n_layers = len(self.params)
        self.is_subset_params = bool(coverage.excluded)

    def _coverage_from_names(self, names: tuple[str, ...], excluded: Mapping[str, str]) -> Coverage:
        """The coverage that a saved state describes."""
        sizes = {name: p.numel() for name, p in self._covered_model.named_parameters()}
        return Coverage(names, MappingProxyType(dict(excluded)), MappingProxyType(sizes))

    def _map_estimate(self, coverage: Coverage) -> Tensor:
        """The covered parameters as one vector [P], of any memory format."""
        parameters = [p.detach().reshape(-1).to(self._dtype) for p in self._tensors_of(coverage)]
        return torch.cat(parameters) if parameters else torch.empty(0, dtype=self._dtype)

    # -- prediction ------------------------------------------------------------------------

    def __call__(
        self,
        x: Inputs,
        pred_type: PredType | str = PredType.GLM,
        joint: bool = False,
        link_approx: LinkApprox | str | None = None,
        n_samples: int | None = None,
        diagonal_output: bool = False,
        generator: torch.Generator | None = None,
        fitting: bool = False,
        **model_kwargs: Any,
    ) -> Tensor | tuple[Tensor, Tensor]:
        """Posterior predictive on ``x``.

        Args:
            x: model inputs, m samples.
            pred_type: "glm", the linearised network, or "nn", sampled networks.
            joint: regression with "glm": covariance over all samples [m·C, m·C].
            link_approx: "probit", "mc", "bridge" or "bridge_norm". By default the one that the
                prior precision was tuned with, else "mc".
            n_samples: networks for "nn" (100 by default); fixed quasi-random points for "mc" (by
                default as many as are accurate: 256, more for very uncertain outputs).
            diagonal_output: regression: variances in place of covariances; "mc": independent
                outputs.
            generator: source of all draws. Without one, "nn" draws from torch's global generator
                and "mc" is deterministic.
            fitting: reward modelling: probabilities of a pair, as while fitting, in place of
                rewards.
            model_kwargs: further arguments of the model, for "nn".

        Returns:
            Classification: probabilities [m, C] ([m, T, C] for outputs at T positions). Bernoulli:
            the probability of every label [m, C]. Regression and rewards: the mean [m, C] and the
            *epistemic* covariance [m, C, C], [m, C] with ``diagonal_output`` or "nn"; with
            ``joint`` the mean [m·C] and covariance [m·C, m·C].

        Raises:
            NotFittedError: before ``fit``.
            ModelChangedError: if the model's weights or running statistics are no longer those of
                the fit.
            ValueError: for an unknown or impossible combination.
        """
        self._check_H_init()
        pred = parse_choice(PredType, pred_type, "pred_type")
        link = self._link(link_approx, pred)
        self._check_generator(generator)
        moments = self._predicts_outputs and not (
            fitting and self.likelihood == LikelihoodName.REWARD_MODELING
        )
        if pred is PredType.GLM:
            if moments:
                return self._glm_predictive_distribution(x, joint, diagonal_output)
            return self._glm_probabilities(x, link, n_samples, diagonal_output, generator)
        if pred is not PredType.NN:
            raise ValueError("pred_type must be 'glm' or 'nn'.")
        if moments and n_samples == 1:
            raise ValueError("the variance of sampled networks needs n_samples of at least 2.")
        self._check_model()
        with exact_arithmetic(self._device):
            samples = self._nn_functional_samples(
                x, 100 if n_samples is None else n_samples, generator, **model_kwargs
            )
        if moments:
            return samples.mean(0), samples.var(0)
        return self._inverse_link(samples).mean(0)

    def _glm_probabilities(
        self,
        x: Inputs,
        link: LinkApprox,
        n_samples: int | None,
        diagonal_output: bool,
        generator: torch.Generator | None,
    ) -> Tensor:
        diagonal = not needs_covariance(link, diagonal_output, self._inverse_link)
        mean, covariance = self._glm_predictive_distribution(x, diagonal_output=diagonal)
        return class_probabilities(mean, covariance, link, n_samples, generator, self._inverse_link)

    def _glm_predictive_distribution(
        self, X: Inputs, joint: bool = False, diagonal_output: bool = False
    ) -> tuple[Tensor, Tensor]:
        """Mean and covariance of the linearised outputs, as laplace-torch's method of the name."""
        self._check_H_init()
        self._check_model()
        with exact_arithmetic(self._device):
            if joint:
                mean, covariance = self._moments(X, OutputCovariance.JOINT)
                return mean.flatten(), covariance
            kind = OutputCovariance.DIAGONAL if diagonal_output else OutputCovariance.PER_SAMPLE
            return self._moments(X, kind)

    def _glm_functional_samples(
        self,
        f_mu: Tensor,
        f_var: Tensor,
        n_samples: int,
        diagonal_output: bool = False,
        generator: torch.Generator | None = None,
    ) -> Tensor:
        if diagonal_output and f_var.shape != f_mu.shape:
            f_var = f_var.diagonal(dim1=-2, dim2=-1)
        return gaussian_samples(f_mu, f_var, n_samples, generator)

    def functional_samples(
        self,
        x: Inputs,
        pred_type: PredType | str = PredType.GLM,
        n_samples: int = 100,
        diagonal_output: bool = False,
        generator: torch.Generator | None = None,
    ) -> Tensor:
        """Samples of the outputs [n_samples, m, C]; arguments as in ``__call__``."""
        self._check_H_init()
        self._check_generator(generator)
        if parse_choice(PredType, pred_type, "pred_type") is PredType.GLM:
            moments = self._glm_predictive_distribution(x, diagonal_output=diagonal_output)
            return self._glm_functional_samples(*moments, n_samples, diagonal_output, generator)
        self._check_model()
        with exact_arithmetic(self._device):
            return self._nn_functional_samples(x, n_samples, generator)

    def predictive_samples(
        self,
        x: Inputs,
        pred_type: PredType | str = PredType.GLM,
        n_samples: int = 100,
        diagonal_output: bool = False,
        generator: torch.Generator | None = None,
    ) -> Tensor:
        """Samples after the inverse link [n_samples, m, C]; arguments as in ``__call__``."""
        samples = self.functional_samples(x, pred_type, n_samples, diagonal_output, generator)
        return samples if self._predicts_outputs else self._inverse_link(samples)

    def _nn_functional_samples(
        self,
        X: Inputs,
        n_samples: int = 100,
        generator: torch.Generator | None = None,
        **model_kwargs: Any,
    ) -> Tensor:
        named = [
            (name, p.detach()) for name, p in zip(self.coverage.covered, self.params, strict=True)
        ]
        weights = self.sample(checked_integer("n_samples", n_samples), generator)
        outputs = network_samples(
            self.model, named, weights, X, differentiable=self.enable_backprop, **model_kwargs
        )
        return torch.stack(list(outputs))

    def _link(self, link_approx: LinkApprox | str | None, pred: PredType) -> LinkApprox:
        if link_approx is None:
            tuned = self.tuned_link_approx if pred is PredType.GLM else None
            return tuned or LinkApprox.MC
        link = self._checked_link(link_approx)
        if pred is PredType.NN and link is not LinkApprox.MC:
            raise ValueError("pred_type='nn' averages sampled networks: use link_approx='mc'.")
        tuned = self.tuned_link_approx
        if pred is PredType.GLM and tuned not in (None, link) and not self._warned_about_link:
            self._warned_about_link = True
            warnings.warn(
                f"the prior precision was tuned for link_approx={tuned.value!r}, but this "
                f"prediction uses {link.value!r}.",
                UserWarning,
                stacklevel=3,
            )
        return link

    def _checked_link(self, link_approx: LinkApprox | str) -> LinkApprox:
        link = parse_choice(LinkApprox, link_approx, "link_approx")
        bridges = (LinkApprox.BRIDGE, LinkApprox.BRIDGE_NORM)
        if link in bridges and self.likelihood == LikelihoodName.BERNOULLI:
            raise ValueError(
                f"link_approx={link.value!r} is for classes that exclude each other; with "
                "likelihood='bernoulli' use 'probit' or 'mc'."
            )
        return link

    def _check_generator(self, generator: torch.Generator | None) -> None:
        if generator is None:
            return
        if not isinstance(generator, torch.Generator) or generator.device.type != self._device.type:
            raise ValueError(
                f"generator must be a torch.Generator on the model's device {self._device}."
            )

    def _check_H_init(self) -> None:  # noqa: N802
        if getattr(self, "H", None) is None:
            raise NotFittedError("this posterior is not fitted: call fit(train_loader) first.")
