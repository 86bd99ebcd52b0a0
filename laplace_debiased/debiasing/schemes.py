"""Which folds give the directions of which eigenbasis, and how tables along them are joined."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import reduce

import torch
from torch import Tensor

from laplace_debiased.curvature.factors import BlockBasis
from laplace_debiased.curvature.lowrank.span import relative_cutoff
from laplace_debiased.curvature.rows.sides import is_thin, mean_energies, multiplicities
from laplace_debiased.options import Scheme


@dataclass(frozen=True)
class Measurement:
    """One eigenbasis that is measured.

    Attributes:
        direction_folds: folds whose factors give the eigenbasis.
        magnitude_folds: folds along which curvature is measured.
        share: weight of this measurement in the joined magnitudes; the shares sum to 1.
    """

    direction_folds: tuple[int, ...]
    magnitude_folds: tuple[int, ...]
    share: float


@dataclass(frozen=True)
class SchemePlan:
    """What a scheme does with its folds.

    Attributes:
        measurements: the eigenbases that are measured, and on what.
        posterior_folds: folds whose factors give the posterior's own eigenbasis.
    """

    measurements: tuple[Measurement, ...]
    posterior_folds: tuple[int, ...]


def scheme_plan(scheme: Scheme, fold_sizes: tuple[int, ...]) -> SchemePlan:
    """The measurements of a scheme.

    * ``single``: one fold gives directions and magnitudes.
    * ``two_batch``: fold 0 gives the directions, fold 1 the magnitudes.
    * ``cross_fit``: each fold is measured along the directions of all others, once per sample;
      its share is its share of the samples; the posterior's directions come from all folds.
    """
    folds = tuple(range(len(fold_sizes)))
    match scheme:
        case Scheme.SINGLE:
            return SchemePlan((Measurement(folds, folds, 1.0),), folds)
        case Scheme.TWO_BATCH:
            return SchemePlan((Measurement((0,), (1,), 1.0),), (0,))
        case Scheme.CROSS_FIT:
            total = sum(fold_sizes)
            return SchemePlan(
                tuple(
                    Measurement(tuple(j for j in folds if j != k), (k,), fold_sizes[k] / total)
                    for k in folds
                ),
                folds,
            )


def join_by_rank(
    tables: Sequence[Sequence[Tensor]],
    shares: Sequence[float],
    bases: Sequence[Sequence[BlockBasis]],
    target: Sequence[BlockBasis],
) -> tuple[Tensor, ...]:
    """Average eigenvalue tables of several eigenbases entry by entry, for the basis ``target``.

    Bases list their factor eigenvectors by ascending eigenvalue, so that equal indices, counted
    from the last, are equal ranks: the average is taken over ranks, not over directions (Lam 2016;
    Bartz 2016). Where a factor is a diagonal all bases are the identity, and equal indices are
    equal directions.

    Sides may be thin, of any rank. Leading directions meet leading ones; where a table knows fewer
    than the target, its complement's value stands for the others, and where it knows more, these
    enter the mean over the target's complement. Directions of a target in which its own factor is
    zero cannot be told apart, and share their mean. The trace is kept throughout.

    Per fold there are one table per block, a share (they sum to 1), and the tables' eigenbasis.
    """
    joined = []
    for index, block in enumerate(target):
        parts = [
            share * _for_block(_levelled(table[index], basis[index]), basis[index], block)
            for table, basis, share in zip(tables, bases, shares, strict=True)
        ]
        joined.append(_levelled(reduce(torch.add, parts), block))
    return tuple(joined)


def _for_block(table: Tensor, basis: BlockBasis, target: BlockBasis) -> Tensor:
    if basis.input_eigenvalues is None:
        return _at_ranks(table, basis.output_basis, target.output_basis)
    table = _at_ranks(table, basis.input_basis, target.input_basis)
    return _at_ranks(table.mT, basis.output_basis, target.output_basis).mT


def _at_ranks(table: Tensor, basis: Tensor | None, target: Tensor | None) -> Tensor:
    """A table's last axis, of one side, at the ranks of another basis of that side."""
    if basis is None or target is None or not (is_thin(basis) or is_thin(target)):
        return table
    side, rank, wanted = basis.shape[-2], basis.shape[-1], target.shape[-1]
    known, rest = table[..., :rank], table[..., rank:]
    if wanted >= rank:
        # Only a thin side can know fewer; a whole one has no rest.
        known = torch.cat([rest.expand(*rest.shape[:-1], wanted - rank), known], dim=-1)
        return known if wanted == side else _merged(torch.cat([known, rest], dim=-1), target)
    extra, known = known.split([rank - wanted, wanted], dim=-1)
    total = extra.sum(-1, keepdim=True)
    if rank < side:
        total = total + (side - rank) * rest
    return _merged(torch.cat([known, total / (side - wanted)], dim=-1), target)


def _merged(table: Tensor, target: Tensor) -> Tensor:
    """Entries of directions that a group of lower rank does not have enter its complement."""
    counts = multiplicities(target)[..., :-1]
    if bool((counts > 0).all()):
        return table
    ones = torch.ones_like(counts)
    whole = torch.cat([ones, (target.shape[-2] - ones.sum(-1, keepdim=True))], dim=-1)
    whole, counts = (c.unsqueeze(-2) if c.ndim < table.ndim else c for c in (whole, counts))
    sums = table * whole
    missing = (sums[..., :-1] * (1 - counts)).sum(-1, keepdim=True)
    sums = torch.cat([sums[..., :-1], sums[..., -1:] + missing], dim=-1)
    return mean_energies(sums, target)


def _levelled(table: Tensor, block: BlockBasis) -> Tensor:
    """One value for all directions of a whole side in which its factor is zero."""
    if block.input_eigenvalues is None:
        return _levelled_side(table, block.output_basis, block.output_eigenvalues)
    table = _levelled_side(table, block.input_basis, block.input_eigenvalues)
    return _levelled_side(table.mT, block.output_basis, block.output_eigenvalues).mT


def _levelled_side(table: Tensor, basis: Tensor | None, eigenvalues: Tensor) -> Tensor:
    if basis is None or is_thin(basis):
        return table
    largest = eigenvalues.amax(-1, keepdim=True)
    null = (eigenvalues <= relative_cutoff(eigenvalues.dtype) * largest).to(table)
    if bool((null.sum(-1) < 2).all()):
        return table
    null = null.unsqueeze(-2) if null.ndim < table.ndim else null
    mean = (table * null).sum(-1, keepdim=True) / null.sum(-1, keepdim=True).clamp_min(1.0)
    return torch.where(null > 0, mean, table)
