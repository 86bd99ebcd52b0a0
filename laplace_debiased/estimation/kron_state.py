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
from laplace_debiased.estimation.structure import KronCurvature
from laplace_debiased.network.inputs import map_tensors, to_device
from laplace_debiased.parallel.sums import from_triangle, triangle_of

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
    names = [field.name for field in fields(BlockBasis)][1:]
    bases = [{name: getattr(block, name) for name in names} for block in curvature.basis]
    return {
        "H": map_tensors(_copied, bases),
        "tables": map_tensors(_copied, list(curvature.tables)),
        "folds": [
            {
                "n_samples": fold.n_samples,
                "blocks": [
                    {
                        "output": _factor_to_state(block.output),
                        "input": _factor_to_state(block.input),
                    }
                    for block in fold.blocks
                ],
            }
            for fold in curvature.folds
        ],
    }


def curvature_from_state(
    names: Sequence[str], state: Mapping[str, Any], device: torch.device
) -> KronCurvature:
    """Curvature of :func:`curvature_to_state`, or of earlier versions, of the covered parameters.

    Raises:
        ValueError: if a table or a factor does not fit its eigenbasis, or one is not finite.
    """
    bases, tables, folds = to_device((state["H"], state["tables"], state["folds"]), device)
    basis = tuple(
        BlockBasis(name, **_fields_of(BlockBasis, entry))
        for name, entry in zip(names, bases, strict=True)
    )
    for block, table in zip(basis, tables, strict=True):
        fits = _fits(block.output_basis, block.output_eigenvalues)
        fits = fits and _fits(block.input_basis, block.input_eigenvalues)
        if tuple(table.shape) != block.table_shape or not fits:
            raise ValueError(f"the state's table of {block.name!r} does not fit its eigenbasis.")
        numbers = [table, *(v for v in vars(block).values() if isinstance(v, Tensor))]
        if not all(bool(torch.isfinite(one).all()) for one in numbers):
            raise ValueError(f"the state's eigenbasis or table of {block.name!r} is not finite.")
        bases_and_table = (block.output_basis, block.input_basis, table)
        if len({one.dtype for one in bases_and_table if one is not None}) > 1:
            raise ValueError(f"the state's table and eigenbasis of {block.name!r} differ in dtype.")
    factors = []
    for fold in folds:
        blocks = []
        for along, entry in zip(basis, fold["blocks"], strict=True):
            values: dict[str, Any] = {
                side: _factor_from_state(value, getattr(along, f"{side}_basis"))
                for side, value in _fields_of(BlockFactors, entry).items()
            }
            for side, factor in values.items():
                _check_side(along, side, factor)
            blocks.append(BlockFactors(along.name, **values))
        factors.append(KroneckerFactors(tuple(blocks), fold["n_samples"]))
    return KronCurvature(basis, tuple(tables), tuple(factors))


def _fits(basis: Tensor | None, eigenvalues: Tensor | None) -> bool:
    if basis is None or eigenvalues is None:
        return basis is None
    return (*basis.shape[:-2], basis.shape[-1] + is_thin(basis)) == tuple(eigenvalues.shape)


def _check_side(block: BlockBasis, side: str, factor: Factor | None) -> None:
    """Check that a factor is of tensors, and that no eigenbasis is missing but a diagonal's."""
    entries = factor.rows if isinstance(factor, RowsFactor) else factor
    if not isinstance(entries, Tensor | None):
        raise ValueError(f"the state's {side} factor of {block.name!r} is no tensor.")
    if getattr(block, f"{side}_basis") is None and entries is not None and entries.ndim > 1:
        raise ValueError(f"the state has no {side}_basis of {block.name!r}.")


def _copied(tensor: Tensor) -> Tensor:
    return tensor.detach().clone()


def _factor_to_state(factor: Factor | None) -> Tensor | dict[str, Tensor] | None:
    """Factors of few rows as these, matrices as upper triangles, diagonals as copies."""
    match factor:
        case SpannedRows():
            return {"coordinates": _copied(factor.coordinates)}
        case RowsFactor():
            return {"rows": _copied(factor.rows)}
        case None:
            return None
    return _copied(factor) if factor.ndim == 1 else {"triangle": triangle_of(factor.detach())}


def _factor_from_state(value: Any, basis: Tensor | None) -> Factor | None:
    if not isinstance(value, Mapping):
        return None if value is None else _mirrored(value)
    if "rows" in value:
        return RowsFactor(value["rows"])
    if "triangle" in value:
        triangle = value["triangle"]
        return from_triangle(triangle, (math.isqrt(8 * triangle.shape[-1] + 1) - 1) // 2)
    assert basis is not None
    return SpannedRows.along(value["coordinates"], basis)


def _fields_of(kind: type[Block], entry: Mapping[str, Any] | Sequence[Tensor]) -> dict[str, Any]:
    """A block's fields by name; version 1 held tensors in their order."""
    if isinstance(entry, Mapping):
        return dict(entry)
    return dict(zip([field.name for field in fields(kind)][1:], entry, strict=False))
