"""Dense float64 counterparts of the operators, written without them, and random problems."""

import torch
from torch import Tensor

from laplace_debiased.operators import EigenBlock, EigenKron

RTOL = 1e-8
# Entries that are zero in exact arithmetic have no relative error.
ATOL = 1e-10
EXPONENTS = (-2.0, -1.0, -0.5, 0.0, 0.3, 0.5, 1.0, 2.0, 3.0)


def assert_close(actual: Tensor, expected: Tensor, rtol: float = RTOL, atol: float = ATOL) -> None:
    torch.testing.assert_close(actual, expected, rtol=rtol, atol=atol)


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def normal(*shape: int, seed: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*shape, generator=generator(seed), dtype=torch.float64).to(dtype)


def orthogonal(size: int, seed: int) -> Tensor:
    return torch.linalg.qr(normal(size, size, seed=seed)).Q


def matrix_power(matrix: Tensor, exponent: float) -> Tensor:
    values, vectors = torch.linalg.eigh(matrix)
    return vectors @ torch.diag(values.pow(exponent)) @ vectors.T


def table(*shape: int, seed: int) -> Tensor:
    """Random eigenvalues; one of them is zero if there is more than one."""
    values = torch.rand(*shape, generator=generator(seed), dtype=torch.float64) * 3
    if values.numel() > 1:
        values.view(-1)[0] = 0.0
    return values


def blocks(seed: int = 0) -> tuple[EigenBlock, ...]:
    """One block of each kind: weight, bias, identity on either side, diagonal, one parameter."""
    return (
        EigenBlock(orthogonal(3, seed), orthogonal(4, seed + 1), table(3, 4, seed=seed + 2)),
        EigenBlock(orthogonal(3, seed + 3), None, table(3, seed=seed + 4)),
        EigenBlock(orthogonal(2, seed + 5), None, table(2, 3, seed=seed + 6)),
        EigenBlock(None, orthogonal(2, seed + 7), table(3, 2, seed=seed + 8)),
        EigenBlock(None, None, table(2, seed=seed + 9)),
        EigenBlock(orthogonal(1, seed + 10), orthogonal(1, seed + 11), table(1, 1, seed=seed + 12)),
        EigenBlock(orthogonal(1, seed + 13), None, table(1, seed=seed + 14)),
    )


def kron_operator(seed: int = 0) -> EigenKron:
    members = blocks(seed)
    deltas = torch.linspace(0.5, 2.0, len(members), dtype=torch.float64)
    return EigenKron(members, deltas)


def dense_block(block: EigenBlock) -> Tensor:
    rows, *columns = block.eigenvalues.shape
    left = (
        torch.eye(rows, dtype=torch.float64) if block.output_basis is None else block.output_basis
    )
    right = torch.eye(columns[0] if columns else 1, dtype=torch.float64)
    if block.input_basis is not None:
        right = block.input_basis
    basis = torch.kron(left.contiguous(), right.contiguous())
    return basis @ torch.diag(block.eigenvalues.reshape(-1)) @ basis.T


def dense_kron(members: tuple[EigenBlock, ...], deltas: Tensor, scale: float = 1.0) -> Tensor:
    return torch.block_diag(
        *(
            scale * dense_block(block) + delta * torch.eye(block.n_params, dtype=torch.float64)
            for block, delta in zip(members, deltas, strict=True)
        )
    )
