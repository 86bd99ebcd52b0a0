"""Low-rank algebra whose rows or samples are spread over ranks.

What is decomposed is decomposed on rank 0: eigenvectors are unique up to their signs, and up to
rotations where eigenvalues agree, so that machines would differ.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from laplace_debiased.curvature.lowrank.span import (
    Eigenpairs,
    SpanDirections,
    combined_rows,
    gram_matrix,
    orthonormal_pairs,
    orthonormalised,
    products_of_rows,
)
from laplace_debiased.parallel.ranks import Ranks
from laplace_debiased.parallel.sums import summed

_STEP = "a product with the curvature"


def gram_over_ranks(ranks: Ranks, rows: Tensor) -> Tensor:
    """K = Z Zᵀ [q, q] in float64 of all ranks' rows, one rank's after the other's.

    Every rank's rows [q_r, P] visit all others once; no rank holds more than its own and those.
    """
    if ranks.world == 1:
        return gram_matrix(rows)
    lengths = ranks.gathered("numbers of rows", len(rows))
    gram = rows.new_zeros((sum(lengths), sum(lengths)), dtype=torch.float64)
    start = sum(lengths[: ranks.rank])
    own = gram[start : start + len(rows)]
    ranks.meet("rows")
    for source, columns in enumerate(gram.new_empty(len(gram)).split(lengths)):
        [theirs] = ranks.broadcast([rows], source)
        first = sum(lengths[:source])
        own[:, first : first + len(columns)] = products_of_rows(rows, theirs)
    return summed(ranks, "the Gram matrix", [gram])[0]


def pairs_over_ranks(ranks: Ranks, rows: Tensor, directions: SpanDirections) -> Eigenpairs:
    """:func:`orthonormal_pairs` of all ranks' rows, in the order of :func:`gram_over_ranks`."""
    if ranks.world == 1:
        return orthonormal_pairs(rows, directions)
    lengths = ranks.gathered("numbers of rows", len(rows))
    own = directions.coefficients.split(lengths)[ranks.rank]
    basis = summed(ranks, "the basis", [combined_rows(rows, own)])[0]
    return pairs_of_first(ranks, lambda: orthonormalised(basis, directions.eigenvalues))


def pairs_of_first(ranks: Ranks, make: Callable[[], Eigenpairs]) -> Eigenpairs:
    """Eigenpairs that rank 0 makes."""

    def made() -> tuple[Tensor, Tensor]:
        pairs = make()
        return pairs.basis, pairs.eigenvalues

    basis, eigenvalues = ranks.from_first("eigenpairs", made)
    return Eigenpairs(basis, eigenvalues)


def solved_over_ranks(
    ranks: Ranks,
    product: Callable[[Tensor], Tensor],
    solve: Callable[[Callable[[Tensor], Tensor]], Eigenpairs],
) -> Eigenpairs:
    """Eigenpairs of a sum over ranks of matrices that can be multiplied with only.

    Rank 0 runs the iteration, the others multiply along until it says that it has ended: so it
    cannot matter whether their machines would take as many steps.

    Args:
        ranks: all ranks.
        product: with this rank's matrix.
        solve: finds the eigenpairs of the sum from products with it.
    """
    if ranks.world == 1:
        return solve(product)

    def step(directions: Tensor | None) -> Tensor | None:
        [given] = ranks.from_first(_STEP, lambda: [directions])
        return None if given is None else summed(ranks, "products", [product(given)])[0]

    def along(directions: Tensor) -> Tensor:
        found = step(directions)
        assert found is not None
        return found

    found: list[Eigenpairs] = []
    if ranks.is_first:
        found.append(solve(along))
        step(None)
    else:
        while step(None) is not None:
            pass
    return pairs_of_first(ranks, lambda: found[0])
