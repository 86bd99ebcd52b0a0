"""Kronecker curvature as tensors and plain values, and back."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, TypeVar

import torch
from torch import Tensor

from laplace_debiased.curvature import BlockFactors, KroneckerFactors
from laplace_debiased.curvature.factors import BlockBasis
from laplace_debiased.curvature.lowrank.span import relative_cutoff
from laplace_debiased.curvature.rows.gram import Factor, RowsFactor
from laplace_debiased.curvature.rows.sides import is_thin
from laplace_debiased.estimation.values import KronCurvature
from laplace_debiased.network.inputs import to_device
from laplace_debiased.parallel import from_triangle, triangle_of

Block = TypeVar("Block", BlockBasis, BlockFactors)


@dataclass(frozen=True, eq=False)
class SpannedRows(RowsFactor):
    """Rows C Uᵀ in the span of a thin basis U [..., D, r], of which a state holds C alone.

    Attributes:
        coordinates: C [..., k, r].
    """

    coordinates: Tensor

    @classmethod
    def along(cls, coordinates: Tensor, basis: Tensor) -> SpannedRows:
        """Rows with these coordinates."""
        return cls(coordinates @ basis.mT, coordinates)


def as_kept(factors: KroneckerFactors, basis: Sequence[BlockBasis]) -> KroneckerFactors:
    """Factors of one fold as a state holds them.

    Matrices are symmetric to the bit, which products need not be: a state has one triangle of each.
    Rows that lie in the posterior's directions are known as such. A posterior's thin basis comes
    from these very rows, so that they have coordinates along it: r numbers in place of D each. Not
    so where more directions than ``max_rank`` were cut off, or where the fold gave no directions.
    """
    blocks = tuple(
        replace(
            block,
            output=_as_kept(block.output, directions.output_basis),
            input=None if block.input is None else _as_kept(block.input, directions.input_basis),
        )
        for block, directions in zip(factors.blocks, basis, strict=True)
    )
    return replace(factors, blocks=blocks)


def _as_kept(factor: Factor, basis: Tensor | None) -> Factor:
    if isinstance(factor, Tensor):
        return _mirrored(factor)
    if basis is None or not is_thin(basis):
        return factor
    found = SpannedRows.along(factor.rows @ basis, basis)
    lost = float((factor.rows - found.rows).square().sum())
    tolerated = factor.rows.shape[-2] * relative_cutoff(factor.dtype)
    return found if lost <= tolerated * float(factor.rows.square().sum()) else factor


def _mirrored(factor: Tensor) -> Tensor:
    """A matrix [..., D, D] with the upper triangle on either side; a diagonal [D] as it is."""
    return factor if factor.ndim == 1 else factor.triu() + factor.triu(1).mT


def curvature_to_state(curvature: KronCurvature) -> dict[str, Any]:
    """Eigenbases, tables and factors of the folds."""
    return {
        "H": [_basis_to_state(block) for block in curvature.basis],
        "tables": [table.detach().clone() for table in curvature.tables],
        "folds": [_factors_to_state(fold) for fold in curvature.folds],
    }


def curvature_from_state(
    names: Sequence[str], state: Mapping[str, Any], device: torch.device
) -> KronCurvature:
    """Curvature of :func:`curvature_to_state`, or of earlier versions.

    Args:
        names: the covered parameters.
        state: holds it.
        device: of the tensors.

    Raises:
        ValueError: if a table does not fit its eigenbasis.
    """
    basis = tuple(
        BlockBasis(name, **to_device(_fields_of(BlockBasis, entry), device))
        for name, entry in zip(names, state["H"], strict=True)
    )
    tables = tuple(table.to(device) for table in state["tables"])
    for block, table in zip(basis, tables, strict=True):
        if tuple(table.shape) != block.table_shape:
            raise ValueError(f"the state's table of {block.name!r} does not fit its eigenbasis.")
    folds = tuple(_factors_from_state(basis, fold, device) for fold in state["folds"])
    return KronCurvature(basis, tables, folds)


def _basis_to_state(block: BlockBasis) -> dict[str, Tensor | None]:
    """Every field but the name, tensors as copies."""
    values = {field.name: getattr(block, field.name) for field in fields(block)[1:]}
    return {n: None if value is None else value.detach().clone() for n, value in values.items()}


def _factor_to_state(factor: Factor | None) -> Tensor | dict[str, Tensor] | None:
    """Factors of few rows as these, matrices as upper triangles, diagonals as copies."""
    match factor:
        case SpannedRows():
            return {"coordinates": factor.coordinates.detach().clone()}
        case RowsFactor():
            return {"rows": factor.rows.detach().clone()}
        case None:
            return None
    if factor.ndim == 1:
        return factor.detach().clone()
    return {"triangle": triangle_of(factor.detach())}


def _fields_of(kind: type[Block], entry: Mapping[str, Any] | Sequence[Tensor]) -> dict[str, Any]:
    """A block's fields by name; version 1 held tensors in their order."""
    if isinstance(entry, Mapping):
        return dict(entry)
    return dict(zip([field.name for field in fields(kind)][1:], entry, strict=False))


def _factor_from_state(value: Any, basis: Tensor | None, device: torch.device) -> Factor | None:
    if not isinstance(value, Mapping):
        return None if value is None else _mirrored(value.to(device))
    if "rows" in value:
        return RowsFactor(value["rows"].to(device))
    if "triangle" in value:
        triangle = value["triangle"].to(device)
        return from_triangle(triangle, (math.isqrt(8 * triangle.shape[-1] + 1) - 1) // 2)
    assert basis is not None
    return SpannedRows.along(value["coordinates"].to(device), basis)


def _factors_to_state(factors: KroneckerFactors) -> dict[str, Any]:
    return {
        "n_samples": factors.n_samples,
        "blocks": [
            {"output": _factor_to_state(block.output), "input": _factor_to_state(block.input)}
            for block in factors.blocks
        ],
    }


def _factors_from_state(
    basis: Sequence[BlockBasis], state: Mapping[str, Any], device: torch.device
) -> KroneckerFactors:
    blocks = []
    for directions, entry in zip(basis, state["blocks"], strict=True):
        values: dict[str, Any] = {
            side: _factor_from_state(value, getattr(directions, f"{side}_basis"), device)
            for side, value in _fields_of(BlockFactors, entry).items()
        }
        blocks.append(BlockFactors(directions.name, **values))
    return KroneckerFactors(tuple(blocks), state["n_samples"])
