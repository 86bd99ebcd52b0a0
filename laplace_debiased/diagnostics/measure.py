r"""Slopes and curvatures along given directions, per sample, on any data.

With t_n = J_n u the derivative of sample n's outputs along u and S_n S_nᵀ = ∇²_f ℓ_n,

    uᵀ∇ℓ_n = (∇_f ℓ_n)ᵀ t_n,      uᵀG_n u = ‖S_nᵀ t_n‖²,
    uᵀ∇²ℓ_n u = d/dt uᵀ∇ℓ_n(θ + t u) at t = 0.

Two algorithms give the first two, and a test makes them agree. *Forward*: t_n by forward-mode
derivatives, about two forward passes per direction. *Reverse*: the rows J_nᵀ[S_n, ∇_f ℓ_n] by
backward passes, R + 1 of them whatever the number of directions, then one matrix product. Forward
is cheaper for few directions or large models, reverse for many directions.
"""

from __future__ import annotations

from collections.abc import Iterable
from enum import StrEnum
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import grad, jvp
from tqdm import tqdm

from laplace_debiased.checks import checked_flag
from laplace_debiased.data.loaders import loader_generators
from laplace_debiased.diagnostics.estimates import DirectionalQuadratic, QuadraticSums
from laplace_debiased.diagnostics.network import LossBatch, LossNetwork
from laplace_debiased.errors import ArgumentTypeError
from laplace_debiased.network.inputs import row_slices, select_rows
from laplace_debiased.network.memory import is_out_of_memory
from laplace_debiased.network.modes import differentiable_kernels, public_call, undisturbed
from laplace_debiased.network.outputs import checked_model
from laplace_debiased.network.transforms import (
    Parameters,
    directional_outputs,
    over_samples,
    vmap,
)
from laplace_debiased.options import Curvature, parse_choice

_FORWARD_CHUNK_SAMPLES = 2048
_HESSIAN_CHUNK_SAMPLES = 16


class Derivatives(StrEnum):
    """How derivatives along directions are taken."""

    AUTO = "auto"
    """Reverse where it costs less and the matrix allows it, else forward."""

    FORWARD = "forward"
    """Forward mode, vectorised over directions."""

    REVERSE = "reverse"
    """Backward passes for every sample, vectorised over samples; GGN only."""


@public_call
def directional_quadratic(
    model: nn.Module,
    likelihood: str,
    batches: Iterable[object],
    directions: Tensor,
    *,
    matrix: str = "ggn",
    derivatives: str = "auto",
    dict_key_y: str = "labels",
    progress_bar: bool = False,
) -> DirectionalQuadratic:
    """Slopes and curvatures of the mean loss over some data, along any directions.

    For `DirectionalProfile.of`, and for many sets of directions in one walk through the data:
    stack them, and take each set's part with `DirectionalQuadratic.select`.

    Args:
        model: trained network; evaluation mode inside, everything restored after.
        likelihood: "classification" or "regression".
        batches: (inputs, targets) or mappings; walked once.
        directions: unit columns [P, k] in the space of the trainable parameters.
        matrix: "ggn" or "hessian".
        derivatives: "auto", "forward" or "reverse", see `Derivatives`.
        dict_key_y: key of the targets where a batch is a mapping.
        progress_bar: show one.

    Returns:
        Per-sample means [k] with the covariance of these means.

    Raises:
        TypeError: for an argument of the wrong kind.
        ValueError: for a bad option, no batches, targets that do not fit, directions of the wrong
            shape, or a choice of derivatives with the Hessian.
        NumericalError: for outputs that are not finite.
        RuntimeError: if the model cannot be vectorised.
    """
    which = parse_choice(Curvature, matrix, "matrix")
    how = parse_choice(Derivatives, derivatives, "derivatives")
    if which is Curvature.HESSIAN and how is not Derivatives.AUTO:
        raise ValueError(
            "the Hessian is measured by forward over reverse mode only; leave derivatives='auto'."
        )
    checked_model(model)
    checked_flag("progress_bar", progress_bar)
    if isinstance(batches, Tensor) or not isinstance(batches, Iterable):
        raise ArgumentTypeError(f"batches must give batches; got {type(batches).__name__}.")
    if not isinstance(directions, Tensor):
        kind = type(directions).__name__
        raise ArgumentTypeError(f"directions must be a tensor [P, k]; got {kind}.")
    if directions.is_meta:
        raise ValueError("directions are on the meta device and hold no data.")
    if not bool(torch.isfinite(directions).all()):
        raise ValueError("directions contain NaN or infinite values.")
    sums = QuadraticSums()
    with undisturbed(model, generators=loader_generators(batches)), differentiable_kernels(model):
        network = LossNetwork.of(model, likelihood, dict_key_y)
        if directions.ndim != 2 or len(directions) != network.functional.n_params:
            raise ValueError(
                f"directions must have shape [P, k] with P = {network.functional.n_params} "
                f"trainable parameters; got {tuple(directions.shape)}."
            )
        for batch in tqdm(batches, desc="directions", disable=not progress_bar):
            data = network.batch(batch)
            along = _forward
            if which is Curvature.HESSIAN:
                along = _hessian
            elif _is_reverse(how, network, directions.shape[1], data.outputs.shape[1]):
                along = _reverse
            sums.add(*along(network, data, directions))
    return sums.estimate()


def _is_reverse(
    derivatives: Derivatives, network: LossNetwork, n_directions: int, n_outputs: int
) -> bool:
    if derivatives is not Derivatives.AUTO:
        return derivatives is Derivatives.REVERSE
    # A direction costs two forward passes, a column one backward pass (about two): equal near
    # k = C, and the vectorised backward pass with its matrix product is the dearer of the two.
    fits = network.rows_bytes(n_outputs + 1) <= network.row_pass.byte_budget
    return n_directions > 2 * n_outputs and fits


def _reverse(network: LossNetwork, batch: LossBatch, directions: Tensor) -> tuple[Tensor, Tensor]:
    """Per-sample slopes and GGN curvatures [m, k] from rows J_nᵀ[S_n, ∇_f ℓ_n]."""
    inputs, targets, outputs = batch
    gradient = network.loss.output_gradient(outputs, targets).unsqueeze(-1)
    columns = torch.cat([network.loss.hessian_root(outputs), gradient], dim=-1)
    m, _, n_columns = columns.shape
    directions = directions.to(outputs)
    slopes = directions.new_zeros(m, directions.shape[1])
    curvatures = torch.zeros_like(slopes)
    for tile, rows in network.row_pass.walk(inputs, columns):
        along = rows.to(directions.dtype) @ directions
        if tile.columns.stop == n_columns:
            slopes[tile.samples] = along[:, -1]
            along = along[:, :-1]
        curvatures[tile.samples] += along.square().sum(1)
    return slopes, curvatures


def _forward(network: LossNetwork, batch: LossBatch, directions: Tensor) -> tuple[Tensor, Tensor]:
    """Per-sample slopes and GGN curvatures [m, k] from derivatives of the outputs."""
    functional, (inputs, targets, outputs) = network.functional, batch
    call, parameters = functional.function_of(inputs), functional.parameters()
    gradient = network.loss.output_gradient(outputs, targets)
    root = network.loss.hessian_root(outputs)
    size = max(1, _FORWARD_CHUNK_SAMPLES // len(outputs))
    slopes, curvatures = [], []
    for columns in directions.split(size, dim=1):
        along = directional_outputs(call, parameters, functional.split(columns))
        slopes.append(torch.einsum("mc,kmc->mk", gradient, along))
        curvatures.append(torch.einsum("mcr,kmc->mkr", root, along).square().sum(-1))
    return torch.cat(slopes, 1), torch.cat(curvatures, 1)


def _hessian(network: LossNetwork, batch: LossBatch, directions: Tensor) -> tuple[Tensor, Tensor]:
    """Per-sample slopes and Hessian curvatures [m, k], forward over reverse mode.

    Two forward modes would be cheaper and would need no vectorisation over samples, but torch's
    forward derivative of layer_norm cannot be differentiated again: it silently drops terms. The
    vmap must be outside for the same reason, see `eigen`.
    """
    directions = directions.to(network.functional.dtype)
    # A quarter of the budget: rows exist by parameter and joined, beside the passes' own memory.
    n_rows = max(1, network.row_pass.byte_budget // 4 // network.rows_bytes(1))
    size = min(_HESSIAN_CHUNK_SAMPLES, n_rows)
    wide = max(1, n_rows // size)
    slopes, curvatures = [], []
    for chosen in row_slices(len(batch.targets), size):
        parts = [
            _hessian_chunk(network, select_rows(batch.inputs, chosen), batch.targets[chosen], part)
            for part in directions.split(wide, dim=1)
        ]
        slopes.append(torch.cat([part[0] for part in parts], 1))
        curvatures.append(torch.cat([part[1] for part in parts], 1))
    return torch.cat(slopes), torch.cat(curvatures)


def _hessian_chunk(
    network: LossNetwork, inputs: Any, targets: Tensor, directions: Tensor
) -> tuple[Tensor, Tensor]:
    functional = network.functional
    parameters, constants = functional.parameters(), functional.constants()
    tangents = functional.split(directions)

    def of_sample(sample: Any, target: Tensor) -> tuple[Tensor, Tensor]:
        def loss(values: Parameters) -> Tensor:
            outputs = functional.call(values, constants, sample)
            return network.loss.losses(outputs, target[None])[0]

        def along(tangent: Parameters) -> tuple[Tensor, Tensor]:
            both = jvp(grad(loss), (parameters,), (tangent,))
            return _dot(both[0], tangent), _dot(both[1], tangent)

        return vmap(along)(tangents)

    try:
        return over_samples(of_sample, inputs, targets)
    except RuntimeError as error:
        if is_out_of_memory(error):
            raise
        raise RuntimeError(
            "the model could not be vectorised over samples (torch.func.vmap), which per-sample "
            "backward passes need. Pass matrix='ggn', solver='lanczos', derivatives='forward'."
        ) from error


def _dot(a: Parameters, b: Parameters) -> Tensor:
    return torch.stack([(a[name] * b[name]).sum() for name in a]).sum()
