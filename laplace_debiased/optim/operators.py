"""Curvature-vector products out of one recorded forward pass.

The pass is recorded once and differentiated again at each product, so a product calls no model
code and costs at most two gradients. The price is memory: the record of the batch is kept for as
long as the operator lives. `curvature.lowrank.ggn_product` is another algorithm: it walks the data
anew for each product, at the price of two forward passes more, and keeps nothing. It takes a square
root of the loss Hessian; here the loss is the user's own, and is differentiated as it comes.
"""

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from laplace_debiased.optim.matvec import Matvec


def flatten(tensors: Iterable[Tensor]) -> Tensor:
    """One vector [P] out of tensors, without history."""
    return torch.cat([tensor.detach().reshape(-1) for tensor in tensors])


def unflatten(vector: Tensor, like: Sequence[Tensor]) -> list[Tensor]:
    """Split a vector [P] into tensors shaped as ``like``."""
    parts = vector.split([tensor.numel() for tensor in like])
    return [part.view(tensor.shape) for part, tensor in zip(parts, like, strict=True)]


def gradient(
    values: Tensor | Sequence[Tensor],
    params: Sequence[Tensor],
    cotangents: Tensor | Sequence[Tensor] | None = None,
    create_graph: bool = False,
) -> list[Tensor]:
    """Derivatives of Σ values · cotangents by each of ``params``; 0 where there is none."""
    return list(
        torch.autograd.grad(
            values,
            params,
            cotangents,
            retain_graph=True,
            create_graph=create_graph,
            allow_unused=True,
            materialize_grads=True,
        )
    )


def recorded_ggn(outputs: Tensor, loss: Tensor, params: Sequence[Tensor]) -> Matvec:
    """Products with G = Jᵀ (∇²_f ℓ) J, J the Jacobian of ``outputs`` f by ``params`` [P].

    Jv comes from differentiating uᵀJ, which is linear in u, by u. ∇²_f ℓ is that of ``loss`` as it
    is, so a mean loss gives a mean GGN (Schraudolph 2002).
    """
    u = torch.zeros_like(outputs, requires_grad=True)
    rows = _differentiable(
        torch.autograd.grad(outputs, params, u, create_graph=True, allow_unused=True)
    )
    (slope,) = gradient(loss, [outputs], create_graph=True)

    def product(vector: Tensor) -> Tensor:
        image = _pull(slope, outputs, _push(rows, u, unflatten(vector, params)))
        return flatten(gradient(outputs, params, image))

    return product


def recorded_hessian(loss: Tensor, params: Sequence[Tensor]) -> Matvec:
    """Products with the Hessian of ``loss`` by ``params`` [P] (Pearlmutter 1994)."""
    rows = _differentiable(gradient(loss, params, create_graph=True))

    def product(vector: Tensor) -> Tensor:
        if not rows:
            return torch.zeros_like(vector)
        tangents = unflatten(vector, params)
        return flatten(gradient(list(rows.values()), params, [tangents[index] for index in rows]))

    return product


def _differentiable(tensors: Sequence[Tensor | None]) -> dict[int, Tensor]:
    """The entries that can be differentiated again, by index; the others are constant."""
    return {i: t for i, t in enumerate(tensors) if t is not None and t.requires_grad}


def _push(rows: dict[int, Tensor], u: Tensor, tangents: Sequence[Tensor]) -> Tensor:
    if not rows:
        return torch.zeros_like(u)
    chosen = [tangents[index] for index in rows]
    (image,) = torch.autograd.grad(list(rows.values()), u, chosen, retain_graph=True)
    return image


def _pull(slope: Tensor, outputs: Tensor, tangent: Tensor) -> Tensor:
    if not slope.requires_grad:  # a loss that is linear in the outputs
        return torch.zeros_like(outputs)
    return gradient(slope, [outputs], tangent)[0]
