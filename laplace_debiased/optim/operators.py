"""Curvature-vector products out of one recorded forward pass.

The pass is recorded once and differentiated again at each product, so a product calls no model
code and costs at most two gradients. The price is memory: the record of the batch is kept for as
long as the operator lives.
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


def gradient(loss: Tensor, params: Sequence[Tensor], create_graph: bool = False) -> list[Tensor]:
    """Derivatives of ``loss`` by each of ``params``; 0 where it does not depend on one."""
    return list(
        torch.autograd.grad(
            loss,
            params,
            retain_graph=True,
            create_graph=create_graph,
            allow_unused=True,
            materialize_grads=True,
        )
    )


def ggn_product(outputs: Tensor, loss: Tensor, params: Sequence[Tensor]) -> Matvec:
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
        tangents = unflatten(vector, params)
        image = _pull(slope, outputs, _push(rows, u, tangents))
        return flatten(
            torch.autograd.grad(
                outputs,
                params,
                image,
                retain_graph=True,
                allow_unused=True,
                materialize_grads=True,
            )
        )

    return product


def hessian_product(loss: Tensor, params: Sequence[Tensor]) -> Matvec:
    """Products with the Hessian of ``loss`` by ``params`` [P] (Pearlmutter 1994)."""
    rows = _differentiable(gradient(loss, params, create_graph=True))

    def product(vector: Tensor) -> Tensor:
        tangents = unflatten(vector, params)
        chosen = [tangents[index] for index in rows]
        if not rows:
            return torch.zeros_like(vector)
        return flatten(
            torch.autograd.grad(
                list(rows.values()),
                params,
                chosen,
                retain_graph=True,
                allow_unused=True,
                materialize_grads=True,
            )
        )

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
    (image,) = torch.autograd.grad(
        slope, outputs, tangent, retain_graph=True, allow_unused=True, materialize_grads=True
    )
    return image
