"""Loss models by name, and the columns of their curvature in the outputs."""

from __future__ import annotations

import torch
from torch import Tensor

from laplace_debiased.likelihoods.categorical import BradleyTerry, SoftmaxCrossEntropy
from laplace_debiased.likelihoods.losses import Bernoulli, LikelihoodName, LossModel, UnitGaussian
from laplace_debiased.options import Fisher


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
            root = masked(model, targets, model.hessian_root(outputs))
            if root.ndim == 3:
                return root
            # Roots [m, T, C, R] of every position as columns [m, T, C, T·R] of the whole sample.
            eye = torch.eye(root.shape[1], dtype=root.dtype, device=root.device)
            return torch.einsum("mtcr,ts->mtcsr", root, eye).flatten(-2)
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


def sketched_columns(
    model: LossModel, outputs: Tensor, targets: Tensor, seeds: Tensor, n_columns: int
) -> Tensor:
    """Columns [m, C, R] ([m, T, C, R] of sequences) whose outer products have S Sᵀ as their mean.

    S z with independent signs z has E[S z zᵀ Sᵀ] = S Sᵀ, for any root S; R of them, over √R,
    estimate the loss Hessian of a sample without bias. Along one direction, where all of a sample
    has the curvature x, the estimate of R columns has a variance below 2 x²/R; with samples whose
    curvatures spread as κ (variance over squared mean), m of them estimate the mean with a relative
    variance of (κ + 2(1 + κ)/R)/m at a cost of m (1 + 2R) forward passes: least at R = √(1 + 1/κ),
    one or two columns. So the default is two, with more samples in return. Every sample has a seed
    of its own [m], so that no result depends on how a batch is chunked.
    """
    z = signs(seeds, (*outputs.shape[1:], n_columns)).to(outputs)
    return masked(model, targets, model.root_product(outputs, z) / n_columns**0.5)


def signs(seeds: Tensor, shape: tuple[int, ...]) -> Tensor:
    """Independent ±1 [m, *shape] of every sample, as small integers on the CPU."""
    drawn = []
    for seed in seeds.tolist():
        generator = torch.Generator().manual_seed(seed)
        drawn.append(torch.randint(2, shape, generator=generator, dtype=torch.int8))
    return 2 * torch.stack(drawn) - 1
