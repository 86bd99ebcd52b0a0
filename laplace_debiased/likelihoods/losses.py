r"""Loss models: negative log likelihoods, and square roots of their Hessians in the outputs.

For a sample with outputs f [C], a *root* of its loss Hessian is S [C, R] with
S Sᵀ = ∇²_f ℓ(f, y). The curvature passes pull its columns back through the network. Where a sample
has outputs at T positions, f is [T, C], its loss is the sum over positions, and a column [T, C].
"""

from __future__ import annotations

from enum import Enum
from typing import Protocol

import torch
from torch import Tensor

from laplace_debiased.likelihoods.bernoulli import Bernoulli
from laplace_debiased.likelihoods.categorical import BradleyTerry, SoftmaxCrossEntropy
from laplace_debiased.likelihoods.gaussian import UnitGaussian
from laplace_debiased.options import Fisher


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


class LossModel(Protocol):
    """A negative log likelihood ℓ(f, y), per sample, and its curvature in the outputs f."""

    def check_targets(self, outputs: Tensor, targets: Tensor) -> None:
        """Raise ValueError if ``targets`` do not fit ``outputs`` [m, C] (or [m, T, C])."""

    def n_labels(self, targets: Tensor) -> Tensor:
        """How many labels of every sample count [m]."""

    def label_mask(self, targets: Tensor) -> Tensor | None:
        """Which labels count [m] (or [m, T]), or None if all do."""

    def losses(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Loss of every sample [m], in nats, without normalising constants."""

    def hessian_root(self, outputs: Tensor) -> Tensor:
        """S [m, C, R] with S Sᵀ = ∇²_f ℓ of every sample; at each position of its own."""

    def root_product(self, outputs: Tensor, z: Tensor) -> Tensor:
        """S z [m, C, n] of vectors z [m, C, n] without forming S; more entries than R are not read.

        At each position of its own, [m, T, C, n].
        """

    def hessian_trace(self, outputs: Tensor, targets: Tensor | None = None) -> Tensor:
        """Tr ∇²_f ℓ of every sample [m], at the labels that count (all, without ``targets``)."""

    def output_gradient(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """∇_f ℓ of every sample [m, C]."""

    def label_noise(self, shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
        """Randomness for the label draws of a batch; ``shape`` is (m, C, draws per sample)."""

    def sampled_output_gradients(self, outputs: Tensor, noise: Tensor) -> Tensor:
        """∇_f ℓ [m, C, draws] at labels drawn from the model itself."""


def loss_model(
    likelihood: str,
    *,
    ignore_index: int | None = None,
    positions: bool = False,
    allow_probabilities: bool = True,
) -> LossModel:
    """The loss model of a likelihood's name.

    Args:
        likelihood: one of :class:`LikelihoodName`.
        ignore_index: label that does not count, for "classification".
        allow_probabilities: whether outputs that look like probabilities are taken for logits.
        positions: whether "classification" may have outputs at several positions per sample.

    Raises:
        ValueError: for any other name.
    """
    match str(getattr(likelihood, "value", likelihood)):
        case "classification":
            return SoftmaxCrossEntropy(ignore_index, positions, allow_probabilities)
        case "reward_modeling":
            return BradleyTerry()
        case "regression":
            return UnitGaussian()
        case "bernoulli":
            return Bernoulli(allow_probabilities)
        case other:
            names = ", ".join(repr(name.value) for name in LikelihoodName)
            raise ValueError(f"likelihood must be one of {names}; got {other!r}.")


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
        outputs: network outputs f [m, C], or [m, T, C] at T positions; columns are then
            [m, T, C, R].
        targets: labels or regression targets of the batch.
        fisher: ``TYPE2`` gives a root of the loss Hessian, ``MC`` an unbiased estimate of it from
            labels drawn from the model, ``EMPIRICAL`` the gradient at the true label (R = 1; of a
            sequence, that of all its positions together).
        noise: for ``MC``, the rows of ``model.label_noise`` that belong to these samples. Drawn
            ahead for a whole batch, so that no result depends on how the batch is chunked.

    Raises:
        ValueError: if ``fisher`` is ``MC`` and no noise is given.
    """
    match fisher:
        case Fisher.TYPE2:
            return _expanded(masked(model, targets, model.hessian_root(outputs)))
        case Fisher.EMPIRICAL:
            return model.output_gradient(outputs, targets).unsqueeze(-1)
        case Fisher.MC:
            if noise is None:
                raise ValueError("fisher='mc' needs the noise of its label draws.")
            draws = model.sampled_output_gradients(outputs, noise)
            return masked(model, targets, draws / draws.shape[-1] ** 0.5)


def masked(model: LossModel, targets: Tensor, columns: Tensor) -> Tensor:
    """Columns [m, (T,) C, R], zero where a label does not count."""
    mask = model.label_mask(targets)
    return columns if mask is None else columns * mask.unsqueeze(-1).unsqueeze(-1)


def _expanded(root: Tensor) -> Tensor:
    """Roots [m, T, C, R] of every position as columns [m, T, C, T·R] of the whole sample."""
    if root.ndim == 3:
        return root
    eye = torch.eye(root.shape[1], dtype=root.dtype, device=root.device)
    return torch.einsum("mtcr,ts->mtcsr", root, eye).flatten(-2)
