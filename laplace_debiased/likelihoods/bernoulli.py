"""The Bernoulli likelihood: one binary label, or several independent ones, from logits."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

_CERTAIN = 7.0
"""Nats by which labels must be more probable under outputs taken for probabilities than under
outputs taken for logits; if they are logits, that happens in fewer than e⁻⁷ of all batches."""


@dataclass(frozen=True)
class Bernoulli:
    """Independent binary labels with logits f: ℓ = Σ_c softplus(f_c) − y_c f_c.

    One output is binary classification; C outputs are C labels that do not exclude each other.

    Attributes:
        allow_probabilities: whether outputs that look like probabilities are taken for logits.
    """

    allow_probabilities: bool = True

    def check_targets(self, outputs: Tensor, targets: Tensor) -> None:
        """Raise ValueError unless ``targets`` are labels in [0, 1] of the outputs' shape [m, C]."""
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
        if not self.allow_probabilities:
            self._require_logits(outputs.detach(), targets)

    def _require_logits(self, outputs: Tensor, targets: Tensor) -> None:
        """Refuse outputs that all lie in [0, 1] and explain the labels as probabilities only."""
        if not bool(((outputs >= 0) & (outputs <= 1)).all()):
            return
        p, labels = outputs.double(), _like(outputs, targets).double()
        as_logits = float(self.losses(p, labels).sum())
        as_probabilities = -float((torch.xlogy(labels, p) + torch.xlogy(1 - labels, 1 - p)).sum())
        if as_logits - as_probabilities > _CERTAIN:
            raise ValueError(
                "the model's outputs are probabilities: all lie between 0 and 1, and taken for "
                f"logits they explain the labels worse by {as_logits - as_probabilities:.0f} nats. "
                "likelihood='bernoulli' takes logits; remove the sigmoid at the model's end. If "
                "these are logits nevertheless, pass allow_probabilities=True."
            )

    def n_labels(self, targets: Tensor) -> Tensor:
        """One for every sample [m]."""
        return torch.ones(len(targets), device=targets.device)

    def label_mask(self, targets: Tensor) -> Tensor | None:
        """None: every label counts."""
        return None

    def losses(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Binary cross-entropy, summed over labels [m]."""
        labels = _like(outputs, targets)
        return torch.nn.functional.binary_cross_entropy_with_logits(
            outputs, labels, reduction="none"
        ).sum(-1)

    def hessian_root(self, outputs: Tensor) -> Tensor:
        """Diag √(p (1 − p)) [m, C, C]; formed from both tails, so that no digit is lost."""
        return torch.diag_embed((torch.sigmoid(outputs) * torch.sigmoid(-outputs)).sqrt())

    def root_product(self, outputs: Tensor, z: Tensor) -> Tensor:
        """√(p (1 − p)) z [m, C, n]."""
        root = (torch.sigmoid(outputs) * torch.sigmoid(-outputs)).sqrt()
        return root.unsqueeze(-1) * z

    def hessian_trace(self, outputs: Tensor, targets: Tensor | None = None) -> Tensor:
        """Σ_c p_c (1 − p_c) [m]."""
        return (torch.sigmoid(outputs) * torch.sigmoid(-outputs)).sum(-1)

    def output_gradient(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """P − y [m, C]."""
        return torch.sigmoid(outputs) - _like(outputs, targets)

    def label_noise(self, shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
        """Uniform numbers [m, C, draws], one per label."""
        return torch.rand(shape, generator=generator, dtype=torch.float64)

    def sampled_output_gradients(self, outputs: Tensor, noise: Tensor) -> Tensor:
        """P − ŷ [m, C, draws] with ŷ_c ~ Bernoulli(p_c)."""
        p = torch.sigmoid(outputs).unsqueeze(-1)
        return p - (noise.to(p.device) < p.double()).to(p.dtype)


def _like(outputs: Tensor, targets: Tensor) -> Tensor:
    return targets.reshape(outputs.shape).to(outputs.dtype)
