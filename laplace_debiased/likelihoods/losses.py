r"""Loss models: negative log likelihoods, and square roots of their Hessians in the outputs.

For a sample with outputs f [C], a *root* of its loss Hessian is S [C, R] with
S Sᵀ = ∇²_f ℓ(f, y). The curvature passes pull its columns back through the network. Where a sample
has outputs at T positions, f is [T, C], its loss is the sum over positions, and a column [T, C].
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass
from enum import Enum

import torch
from torch import Tensor

_CERTAIN = 7.0
"""Nats by which labels must be more probable under outputs taken for probabilities than under
outputs taken for logits; if they are logits, that happens in fewer than e⁻⁷ of all data sets."""


class LikelihoodName(str, Enum):
    """The likelihoods, by the names that a user gives them: laplace-torch's and one more."""

    CLASSIFICATION = "classification"
    """Softmax cross-entropy."""

    REGRESSION = "regression"
    """Gaussian of one noise level."""

    BERNOULLI = "bernoulli"
    """Independent binary labels, from logits."""

    REWARD_MODELING = "reward_modeling"
    """Bradley-Terry: fitted on pairs as a classification, predicts rewards as a regression."""


class LossModel(ABC):
    """A negative log likelihood ℓ(f, y), per sample, and its curvature in the outputs f."""

    @abstractmethod
    def check_targets(self, outputs: Tensor, targets: Tensor) -> None:
        """Raise ValueError if ``targets`` do not fit ``outputs`` [m, C] (or [m, T, C])."""

    def n_labels(self, targets: Tensor) -> Tensor:
        """How many labels of every sample count [m]."""
        return torch.ones(len(targets), device=targets.device)

    def label_mask(self, targets: Tensor) -> Tensor | None:
        """Which labels count [m] (or [m, T]), or None if all do."""
        return None

    @abstractmethod
    def losses(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Loss of every sample [m], in nats, without normalising constants."""

    def hessian_root(self, outputs: Tensor) -> Tensor:
        """S [m, C, R] with S Sᵀ = ∇²_f ℓ of every sample; at each position of its own."""
        eye = torch.eye(outputs.shape[-1], dtype=outputs.dtype, device=outputs.device)
        return self.root_product(outputs, eye.expand(*outputs.shape, -1))

    @abstractmethod
    def root_product(self, outputs: Tensor, z: Tensor) -> Tensor:
        """S z [m, C, n] of vectors z [m, C, n] without forming S; more entries than R are not read.

        At each position of its own, [m, T, C, n].
        """

    @abstractmethod
    def hessian_trace(self, outputs: Tensor, targets: Tensor | None = None) -> Tensor:
        """Tr ∇²_f ℓ of every sample [m], at the labels that count (all, without ``targets``)."""

    @abstractmethod
    def output_gradient(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """∇_f ℓ of every sample [m, C]."""

    @abstractmethod
    def label_noise(self, shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
        """Randomness for the label draws of a batch; ``shape`` is (m, C, draws per sample)."""

    @abstractmethod
    def sampled_output_gradients(self, outputs: Tensor, noise: Tensor) -> Tensor:
        """∇_f ℓ [m, C, draws] at labels drawn from the model itself."""


class UnitGaussian(LossModel):
    """Gaussian likelihood of unit noise: ℓ = ½ ‖f − y‖². The noise enters as a factor later."""

    def check_targets(self, outputs: Tensor, targets: Tensor) -> None:
        if outputs.ndim != 2:
            raise ValueError(
                f"regression needs model outputs of shape (batch, outputs); got "
                f"{tuple(outputs.shape)}."
            )
        if targets.shape != outputs.shape:
            raise ValueError(
                f"regression targets have shape {tuple(targets.shape)} but the model's outputs "
                f"have shape {tuple(outputs.shape)}. Give both the same shape, e.g. with "
                "`targets.unsqueeze(-1)`."
            )
        if not targets.is_floating_point():
            raise ValueError(
                f"regression needs floating-point targets; got {targets.dtype}. "
                "Use `targets.float()`."
            )
        if not bool(torch.isfinite(targets).all()):
            raise ValueError("regression targets contain NaN or infinite values.")

    def losses(self, outputs: Tensor, targets: Tensor) -> Tensor:
        return 0.5 * (outputs - targets.to(outputs.dtype)).square().sum(-1)

    def root_product(self, outputs: Tensor, z: Tensor) -> Tensor:
        return z

    def hessian_trace(self, outputs: Tensor, targets: Tensor | None = None) -> Tensor:
        return outputs.new_full((len(outputs),), float(outputs.shape[-1]))

    def output_gradient(self, outputs: Tensor, targets: Tensor) -> Tensor:
        return outputs - targets.to(outputs.dtype)

    def label_noise(self, shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    def sampled_output_gradients(self, outputs: Tensor, noise: Tensor) -> Tensor:
        return noise.to(outputs.device, outputs.dtype)


def residual_noise(mean_loss: float, n_outputs: int) -> float:
    """σ from training residuals, √(2ℓ/C) for a mean ℓ of ½ ‖f − y‖²: their root mean square.

    It is the maximum-likelihood estimate of one σ for all outputs at the network's weights, with
    no correction for the degrees of freedom that training has used up: a network that interpolates
    its data makes it too small.

    Raises:
        ValueError: if the residuals are zero or not finite.
    """
    variance = 2.0 * mean_loss / n_outputs
    if not (math.isfinite(variance) and variance > 0.0):
        raise ValueError(
            f"sigma_noise='residual' needs training residuals that are finite and not all zero; "
            f"their mean square is {variance}. Pass a number for sigma_noise."
        )
    return math.sqrt(variance)


@dataclass(frozen=True)
class Bernoulli(LossModel):
    """Independent binary labels with logits f: ℓ = Σ_c softplus(f_c) − y_c f_c.

    One output is binary classification; C outputs are C labels that do not exclude each other.

    Attributes:
        allow_probabilities: whether outputs that look like probabilities are taken for logits.
    """

    allow_probabilities: bool = True

    def check_targets(self, outputs: Tensor, targets: Tensor) -> None:
        if outputs.ndim != 2:
            raise ValueError(
                f"bernoulli needs model outputs (logits) of shape (batch, labels); got "
                f"{tuple(outputs.shape)}."
            )
        flat_binary = targets.ndim == 1 and outputs.shape[1] == 1
        if targets.shape != outputs.shape and not (flat_binary and len(targets) == len(outputs)):
            raise ValueError(
                f"bernoulli targets have shape {tuple(targets.shape)} but the model's outputs have "
                f"shape {tuple(outputs.shape)}: give one label per logit. Class indices need "
                "likelihood='classification', or torch.nn.functional.one_hot."
            )
        if targets.is_complex():
            raise ValueError(f"bernoulli targets must be real labels; got {targets.dtype}.")
        if len(targets) and not bool(((targets >= 0) & (targets <= 1)).all()):
            raise ValueError(
                "bernoulli targets must be labels between 0 and 1 and no NaN; got values from "
                f"{float(targets.min())} to {float(targets.max())}."
            )

    def probability_evidence(self, outputs: Tensor, targets: Tensor) -> float:
        """Nats by which outputs explain their labels better as probabilities than as logits.

        Summed over a batch, to be added up over a walk; −inf where one lies outside of [0, 1].
        """
        p, labels = outputs.detach().double(), _like(outputs, targets).double()
        if not bool(((p >= 0) & (p <= 1)).all()):
            return -math.inf
        as_probabilities = torch.xlogy(labels, p) + torch.xlogy(1 - labels, 1 - p)
        return float(self.losses(p, labels).sum() + as_probabilities.sum())

    def require_logits(self, evidence: float) -> None:
        """Refuse outputs that a walk has shown to be probabilities.

        Raises:
            ValueError: if the evidence of :meth:`probability_evidence` leaves no doubt.
        """
        if evidence > _CERTAIN and not self.allow_probabilities:
            raise ValueError(
                "the model's outputs are probabilities: all lie between 0 and 1, and taken for "
                f"logits they explain the labels worse by {evidence:.0f} nats. "
                "likelihood='bernoulli' takes logits; remove the sigmoid at the model's end. If "
                "these are logits nevertheless, pass allow_probabilities=True."
            )

    def losses(self, outputs: Tensor, targets: Tensor) -> Tensor:
        labels = _like(outputs, targets)
        return torch.nn.functional.binary_cross_entropy_with_logits(
            outputs, labels, reduction="none"
        ).sum(-1)

    def root_product(self, outputs: Tensor, z: Tensor) -> Tensor:
        return _label_variances(outputs).sqrt().unsqueeze(-1) * z

    def hessian_trace(self, outputs: Tensor, targets: Tensor | None = None) -> Tensor:
        return _label_variances(outputs).sum(-1)

    def output_gradient(self, outputs: Tensor, targets: Tensor) -> Tensor:
        return torch.sigmoid(outputs) - _like(outputs, targets)

    def label_noise(self, shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
        return torch.rand(shape, generator=generator, dtype=torch.float64)

    def sampled_output_gradients(self, outputs: Tensor, noise: Tensor) -> Tensor:
        p = torch.sigmoid(outputs).unsqueeze(-1)
        return p - (noise.to(p.device) < p.double()).to(p.dtype)


def _like(outputs: Tensor, targets: Tensor) -> Tensor:
    return targets.reshape(outputs.shape).to(outputs.dtype)


def _label_variances(outputs: Tensor) -> Tensor:
    """P (1 − p) [m, C] from both tails, so that no digit is lost."""
    return torch.sigmoid(outputs) * torch.sigmoid(-outputs)
