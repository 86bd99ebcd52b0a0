"""The Gaussian likelihood of regression."""

from __future__ import annotations

import math

import torch
from torch import Tensor


class UnitGaussian:
    """Gaussian likelihood of unit noise: ℓ = ½ ‖f − y‖². The noise enters as a factor later."""

    def check_targets(self, outputs: Tensor, targets: Tensor) -> None:
        """Raise ValueError unless ``targets`` are real numbers of the outputs' shape."""
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

    def label_mask(self, targets: Tensor) -> Tensor | None:
        """None: every label counts."""
        return None

    def losses(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Half the squared error of every sample [m]."""
        return 0.5 * (outputs - targets.to(outputs.dtype)).square().sum(-1)

    def n_labels(self, targets: Tensor) -> Tensor:
        """One for every sample [m]."""
        return torch.ones(len(targets), device=targets.device)

    def hessian_root(self, outputs: Tensor) -> Tensor:
        """The identity [m, C, C]."""
        m, n_outputs = outputs.shape
        eye = torch.eye(n_outputs, dtype=outputs.dtype, device=outputs.device)
        return eye.expand(m, -1, -1)

    def root_product(self, outputs: Tensor, z: Tensor) -> Tensor:
        """Z itself [m, C, n]."""
        return z

    def hessian_trace(self, outputs: Tensor, targets: Tensor | None = None) -> Tensor:
        """C for every sample [m]."""
        return outputs.new_full((len(outputs),), float(outputs.shape[-1]))

    def output_gradient(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Residuals f − y [m, C]."""
        return outputs - targets.to(outputs.dtype)

    def label_noise(self, shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
        """Standard normal numbers [m, C, draws]."""
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    def sampled_output_gradients(self, outputs: Tensor, noise: Tensor) -> Tensor:
        """Residuals f − ŷ [m, C, draws] with ŷ ~ N(f, I)."""
        return noise.to(outputs.device, outputs.dtype)


def residual_noise(mean_loss: float, n_outputs: int) -> float:
    """σ from training residuals: √(2ℓ/C), their root mean square over samples and outputs.

    It is the maximum-likelihood estimate of one σ for all outputs at the network's weights, with
    no correction for the degrees of freedom that training has used up: a network that interpolates
    its data makes it too small.

    Args:
        mean_loss: mean over samples of ℓ = ½ ‖f − y‖².
        n_outputs: C.

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
