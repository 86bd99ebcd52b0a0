"""Dense counterparts of the core's kernels by functorch, sharing no code with the library."""

from __future__ import annotations

import copy
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.func import functional_call, hessian, jacrev, vmap

from laplace_debiased.curvature.factors import BlockBasis
from laplace_debiased.operators import EigenBlock, EigenKron
from tests.zoo import Problem


def loss_of(likelihood: str, outputs: Tensor, target: Tensor) -> Tensor:
    """Negative log likelihood [...] without constants; classes are given as one-hot rows."""
    if likelihood == "classification":
        return torch.logsumexp(outputs, -1) - (outputs * target).sum(-1)
    return 0.5 * (outputs - target).square().sum(-1)


def as_rows(likelihood: str, outputs: Tensor, y: Tensor) -> Tensor:
    """Targets as rows like the outputs: one-hot for classes."""
    if likelihood == "classification":
        return torch.eye(outputs.shape[-1], dtype=outputs.dtype)[y]
    return y


def jacobian(model: nn.Module, x: Tensor, names: Sequence[str]) -> Tensor:
    """Jacobian of the flattened outputs in the named parameters [m, C, P], in evaluation mode."""
    model = copy.deepcopy(model).eval()
    values = {name: p.detach() for name, p in model.named_parameters()}
    chosen = {name: values.pop(name) for name in names}

    def outputs(theta: dict[str, Tensor]) -> Tensor:
        return functional_call(model, {**values, **theta}, (x,)).flatten(1)

    blocks = jacrev(outputs)(chosen)
    return torch.cat([blocks[n].reshape(*blocks[n].shape[:2], -1) for n in names], dim=-1)


def loss_hessians(likelihood: str, outputs: Tensor, y: Tensor) -> Tensor:
    """∇²_f ℓ of every sample [m, C, C], by automatic differentiation."""
    targets = as_rows(likelihood, outputs, y)
    return vmap(hessian(lambda f, t: loss_of(likelihood, f, t)))(outputs, targets)


def _evaluated(model: nn.Module, x: Tensor) -> Tensor:
    with torch.no_grad():
        return copy.deepcopy(model).eval()(x.clone())


def sample_ggns(p: Problem, names: Sequence[str], fisher: str = "type2") -> Tensor:
    """Curvature of every sample [m, P, P]: GGN, or the outer product of its gradient."""
    jac = jacobian(p.model, p.x, names)
    outputs = _evaluated(p.model, p.x)
    if fisher == "type2":
        middle = loss_hessians(p.likelihood, outputs, p.y)
    else:
        leaf = outputs.clone().requires_grad_()
        total = loss_of(p.likelihood, leaf, as_rows(p.likelihood, outputs, p.y)).sum()
        (gradient,) = torch.autograd.grad(total, leaf)
        middle = torch.einsum("mc,md->mcd", gradient, gradient)
    return torch.einsum("mcp,mcd,mdq->mpq", jac, middle, jac)


def ggn(
    p: Problem, names: Sequence[str], index: slice = slice(None), fisher: str = "type2"
) -> Tensor:
    """Per-sample mean curvature [P, P] over some samples."""
    part = Problem(p.model, p.x[index], p.y[index], p.likelihood)
    return sample_ggns(part, names, fisher).mean(0)


def whole(basis: Tensor | None, size: int, groups: int) -> Tensor:
    """Bases [groups, D, D] of a side, the given directions first.

    Behind them stands any basis of the complement; it also takes the place of zero columns.
    """
    if basis is None:
        return torch.eye(size, dtype=torch.float64).expand(groups, -1, -1)
    filled = []
    for part in basis.flatten(0, -3) if basis.ndim > 2 else basis.unsqueeze(0):
        missing = part.square().sum(0) == 0
        known = part[:, ~missing]
        others = torch.linalg.qr(known.double(), mode="complete").Q[:, known.shape[1] :]
        full = torch.zeros(len(part), len(part), dtype=torch.float64)
        place = torch.cat([~missing, torch.zeros(len(part) - part.shape[1], dtype=torch.bool)])
        full[:, place], full[:, ~place] = known.double(), others
        filled.append(full)
    return torch.stack(filled).expand(groups, -1, -1)


def dense_bases(operator: EigenKron) -> list[Tensor]:
    """U of every block as a dense matrix, columns in the order of :func:`tables`."""
    bases = []
    for block in operator.blocks:
        shape = block.eigenvalues.shape
        rows, columns = (shape[0], 1) if len(shape) == 1 else tuple(shape[-2:])
        groups = shape[0] if len(shape) == 3 else 1
        left = whole(block.output_basis, rows, groups).to(block.eigenvalues)
        right = whole(block.input_basis, columns, groups).to(block.eigenvalues)
        pairs = zip(left, right, strict=True)
        bases.append(
            torch.block_diag(*(torch.kron(u.contiguous(), v.contiguous()) for u, v in pairs))
        )
    return bases


def sides(block: EigenBlock) -> tuple[tuple[Tensor | None, int], tuple[Tensor | None, int]]:
    """A block's bases, with their axes in its table."""
    outputs = -1 if block.eigenvalues.ndim == 1 else -2
    return (block.output_basis, outputs), (block.input_basis, -1)


def tables(operator: EigenKron) -> list[Tensor]:
    """Eigenvalues of every block without prior, once for every direction of a complement."""
    spread = []
    for block in operator.blocks:
        full = block.eigenvalues
        for basis, axis in sides(block):
            if basis is not None and basis.shape[-1] < basis.shape[-2]:
                index = torch.arange(basis.shape[-2]).clamp_max(basis.shape[-1])
                full = full.index_select(axis % full.ndim, index)
        spread.append(full)
    return spread


def dense_basis(operator: EigenKron) -> Tensor:
    return torch.block_diag(*dense_bases(operator))


def table(operator: EigenKron) -> Tensor:
    """All eigenvalues without prior, flattened [P]."""
    return torch.cat([full.flatten() for full in tables(operator)])


def directional(
    operator: EigenKron, matrix: Tensor, bases: Sequence[BlockBasis | None] | None = None
) -> Tensor:
    """diag(Uᵀ M U) [P] along the operator's own directions, the mean over a complement.

    Args:
        operator: whose directions.
        matrix: M [P, P].
        bases: with the factors' eigenvalues, to take the mean where a factor vanishes as well.
    """
    basis = dense_basis(operator)
    values = (basis * (matrix @ basis)).sum(0)
    fulls = tables(operator)
    averaged = [
        averaged_over_complements(part.reshape(full.shape), block, known).flatten()
        for part, full, block, known in zip(
            values.split([full.numel() for full in fulls]),
            fulls,
            operator.blocks,
            bases or [None] * len(fulls),
            strict=True,
        )
    ]
    return torch.cat(averaged)


def averaged_over_complements(
    full: Tensor, block: EigenBlock, known: BlockBasis | None = None
) -> Tensor:
    """A table with an entry per direction, those of a complement replaced by their mean."""
    for basis, axis in sides(block):
        if basis is None:
            continue
        missing = (basis.square().sum(-2) == 0).to(full)
        if known is not None and basis.shape[-1] == basis.shape[-2]:
            is_input = basis is block.input_basis
            values = known.input_eigenvalues if is_input else known.output_eigenvalues
            missing = (values <= 1e-13 * values.amax(-1, keepdim=True)).to(full)
        beyond = full.new_ones(*missing.shape[:-1], basis.shape[-2] - basis.shape[-1])
        outside = torch.cat([missing, beyond], dim=-1)
        if bool(outside.any()):
            outside = outside.unsqueeze(-1 if axis == -2 else -2) if full.ndim > 1 else outside
            counts = outside.sum(axis, keepdim=True).clamp_min(1.0)
            mean = (full * outside).sum(axis, keepdim=True) / counts
            full = torch.where(outside > 0, mean, full)
    return full


def dense_precision(operator: EigenKron, deltas: Tensor, scale: float = 1.0) -> Tensor:
    """U diag(scale·λ) Uᵀ + δ [P, P]; ``deltas`` are scalar or one per block."""
    basis = dense_basis(operator)
    sizes = torch.tensor([block.n_params for block in operator.blocks])
    prior = deltas.expand(len(sizes)).repeat_interleave(sizes)
    return (basis * (scale * table(operator))) @ basis.T + torch.diag(prior)
