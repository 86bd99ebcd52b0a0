r"""Loss models: negative log likelihoods, and square roots of their Hessians in the outputs.

For a sample with outputs f [C], a *root* of its loss Hessian is S [C, R] with
S Sᵀ = ∇²_f ℓ(f, y). The curvature passes pull its columns back through the network.
"""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

from laplace_debiased.options import Fisher


class LossModel(Protocol):
    """A negative log likelihood ℓ(f, y), per sample, and its curvature in the outputs f."""

    def check_targets(self, outputs: Tensor, targets: Tensor) -> None:
        """Raise ValueError if ``targets`` do not fit ``outputs`` [m, C]."""

    def losses(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Loss of every sample [m], in nats, without normalising constants."""

    def hessian_root(self, outputs: Tensor) -> Tensor:
        """S [m, C, R] with S Sᵀ = ∇²_f ℓ of every sample."""

    def hessian_trace(self, outputs: Tensor) -> Tensor:
        """Tr ∇²_f ℓ of every sample [m]."""

    def output_gradient(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """∇_f ℓ of every sample [m, C]."""

    def label_noise(self, shape: tuple[int, int, int], generator: torch.Generator) -> Tensor:
        """Randomness for the label draws of a batch; ``shape`` is (m, C, draws per sample)."""

    def sampled_output_gradients(self, outputs: Tensor, noise: Tensor) -> Tensor:
        """∇_f ℓ [m, C, draws] at labels drawn from the model itself."""


class SoftmaxCrossEntropy:
    """Categorical likelihood with logits f: ℓ = −log softmax(f)_y."""

    def check_targets(self, outputs: Tensor, targets: Tensor) -> None:
        """Raise ValueError unless ``targets`` are class indices [m] in 0..C−1."""
        if outputs.ndim != 2:
            raise ValueError(
                "classification needs model outputs of shape (batch, classes); got "
                f"{tuple(outputs.shape)}."
            )
        n_classes = outputs.shape[1]
        if n_classes < 2:
            raise ValueError(
                "classification needs at least 2 classes (logits); the model returned "
                f"{n_classes} output. For a single-logit model, return two logits (0, f)."
            )
        if targets.ndim != 1 or targets.is_floating_point() or targets.is_complex():
            raise ValueError(
                "classification needs integer class indices of shape (batch,); got targets of "
                f"shape {tuple(targets.shape)} and dtype {targets.dtype}. Convert one-hot labels "
                "with `labels.argmax(-1)`."
            )
        if len(targets) != len(outputs):
            raise ValueError(f"{len(outputs)} model outputs for {len(targets)} targets.")
        if len(targets) and (int(targets.min()) < 0 or int(targets.max()) >= n_classes):
            raise ValueError(
                f"class indices must lie in 0..{n_classes - 1}; got values from "
                f"{int(targets.min())} to {int(targets.max())}."
            )

    def losses(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Cross-entropy of every sample [m]."""
        return torch.nn.functional.cross_entropy(outputs, targets, reduction="none")

    def hessian_root(self, outputs: Tensor) -> Tensor:
        r"""Cholesky factor of diag(p) − p pᵀ in closed form, [m, C, C−1].

        With tail sums q_j = Σ_{k>j} p_k (and q_{−1} = 1), column j is
        √(p_j q_j / q_{j−1}) at row j and −p_i √(p_j / (q_{j−1} q_j)) at rows i > j. The matrix has
        rank C − 1, so this root saves a backward pass per sample over the usual
        diag(√p) − p √pᵀ. Tail sums are summed from the end, so that no digit is lost to a
        dominating class.
        """
        p = torch.softmax(outputs, dim=-1)
        tails = p.flip(-1).cumsum(-1).flip(-1)  # tails[j] = Σ_{k≥j} p_k
        before, after = tails[:, :-1], tails[:, 1:]
        tiny = torch.finfo(p.dtype).tiny
        head = (p[:, :-1] / before.clamp_min(tiny)).sqrt()
        diagonal = head * after.sqrt()
        below = -head / after.clamp_min(tiny).sqrt()
        root = torch.tril(p.unsqueeze(-1) * below.unsqueeze(1), diagonal=-1)
        return root.diagonal_scatter(diagonal, dim1=-2, dim2=-1)

    def hessian_trace(self, outputs: Tensor) -> Tensor:
        """1 − Σ_c p_c² [m]."""
        p = torch.softmax(outputs, dim=-1)
        return (p * (1.0 - p)).sum(-1)

    def output_gradient(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """P − onehot(y) [m, C]."""
        p = torch.softmax(outputs, dim=-1)
        return p - torch.nn.functional.one_hot(targets, p.shape[-1]).to(p.dtype)

    def label_noise(self, shape: tuple[int, int, int], generator: torch.Generator) -> Tensor:
        """Uniform numbers [m, draws], one per label."""
        m, _, draws = shape
        return torch.rand(m, draws, generator=generator, dtype=torch.float64)

    def sampled_output_gradients(self, outputs: Tensor, noise: Tensor) -> Tensor:
        """P − onehot(ŷ) [m, C, draws] with ŷ ~ softmax(f), by inversion of its distribution."""
        p = torch.softmax(outputs, dim=-1)
        cumulative = p.detach().double().cumsum(-1)
        labels = torch.searchsorted(cumulative, noise.to(p.device) * cumulative[:, -1:])
        onehot = torch.nn.functional.one_hot(labels.clamp_max(p.shape[-1] - 1), p.shape[-1])
        return p.unsqueeze(-1) - onehot.to(p.dtype).transpose(1, 2)


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

    def losses(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Half the squared error of every sample [m]."""
        return 0.5 * (outputs - targets.to(outputs.dtype)).square().sum(-1)

    def hessian_root(self, outputs: Tensor) -> Tensor:
        """The identity [m, C, C]."""
        m, n_outputs = outputs.shape
        eye = torch.eye(n_outputs, dtype=outputs.dtype, device=outputs.device)
        return eye.expand(m, -1, -1)

    def hessian_trace(self, outputs: Tensor) -> Tensor:
        """C for every sample [m]."""
        return outputs.new_full((len(outputs),), float(outputs.shape[-1]))

    def output_gradient(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Residuals f − y [m, C]."""
        return outputs - targets.to(outputs.dtype)

    def label_noise(self, shape: tuple[int, int, int], generator: torch.Generator) -> Tensor:
        """Standard normal numbers [m, C, draws]."""
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    def sampled_output_gradients(self, outputs: Tensor, noise: Tensor) -> Tensor:
        """Residuals f − ŷ [m, C, draws] with ŷ ~ N(f, I)."""
        return noise.to(outputs.device, outputs.dtype)


def loss_model(likelihood: str) -> LossModel:
    """The loss model of a likelihood's name ("classification" or "regression").

    Raises:
        ValueError: for any other name.
    """
    match str(getattr(likelihood, "value", likelihood)):
        case "classification" | "reward_modeling":
            return SoftmaxCrossEntropy()
        case "regression":
            return UnitGaussian()
        case other:
            raise ValueError(f"likelihood must be 'classification' or 'regression'; got {other!r}.")


def curvature_columns(
    model: LossModel,
    outputs: Tensor,
    targets: Tensor,
    fisher: Fisher,
    *,
    noise: Tensor | None = None,
) -> Tensor:
    """Columns S [m, C, R] whose outer products sum to the chosen curvature in the outputs.

    Args:
        model: the loss.
        outputs: network outputs f [m, C].
        targets: labels or regression targets of the batch.
        fisher: ``TYPE2`` gives a root of the loss Hessian, ``MC`` an unbiased estimate of it from
            labels drawn from the model, ``EMPIRICAL`` the gradient at the true label (R = 1).
        noise: for ``MC``, the rows of ``model.label_noise`` that belong to these samples. Drawn
            ahead for a whole batch, so that no result depends on how the batch is chunked.

    Raises:
        ValueError: if ``fisher`` is ``MC`` and no noise is given.
    """
    match fisher:
        case Fisher.TYPE2:
            return model.hessian_root(outputs)
        case Fisher.EMPIRICAL:
            return model.output_gradient(outputs, targets).unsqueeze(-1)
        case Fisher.MC:
            if noise is None:
                raise ValueError("fisher='mc' needs the noise of its label draws.")
            draws = model.sampled_output_gradients(outputs, noise)
            return draws / draws.shape[-1] ** 0.5
