r"""Leading eigenpairs without rows: Lanczos on products with the generalized Gauss-Newton matrix.

For data or models whose rows do not fit in memory. The eigen-solver is ARPACK. A float32 product
carries relative errors of 1e-7, so the tolerance is 1e-6 there: below it ARPACK would iterate on
rounding noise.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import numpy as np
import torch
from scipy.sparse.linalg import ArpackError, ArpackNoConvergence, LinearOperator, eigsh
from torch import Tensor
from tqdm import tqdm

from laplace_debiased.curvature.lowrank.over_ranks import solved_over_ranks
from laplace_debiased.curvature.lowrank.span import Eigenpairs
from laplace_debiased.errors import NumericalError
from laplace_debiased.network.functional import FunctionalNetwork
from laplace_debiased.network.modes import differentiable_kernels
from laplace_debiased.network.transforms import directional_outputs, vjp, vmap
from laplace_debiased.parallel.ranks import ALONE, Ranks

Product = Callable[[Tensor], Tensor]
"""X [P, j] ↦ C X [P, j] for a symmetric C [P, P]."""

_TOLERANCE = {torch.float32: 1e-6, torch.float64: 1e-12}
"""Relative, of eigenvalues."""


def ggn_product(
    network: FunctionalNetwork,
    walk: Callable[[], Iterable[tuple[Any, Tensor]]],
    columns_at: Callable[[Tensor], Tensor],
) -> Product:
    """Products with G = Σ_n J_nᵀ S_n S_nᵀ J_n: forward mode, then a backward pass.

    The data are walked once per product, so that nothing of a batch stays in memory. With the
    columns S_n given, one product serves every Fisher type and every weighting of samples
    (Schraudolph 2002).

    Args:
        network: the network and its covered parameters.
        walk: gives (inputs, positions) of all samples that count, the same in every walk.
        columns_at: positions [n] to columns S [n, C, R], scaled so that the sum is what is meant.
    """

    def product(directions: Tensor) -> Tensor:
        total = torch.zeros_like(directions)
        with differentiable_kernels(network.model):
            parameters, tangents = network.parameters(), network.split(directions)
            for inputs, positions in walk():
                call = network.function_of(network.prepare(inputs))
                along = directional_outputs(call, parameters, tangents)
                columns = columns_at(positions).to(along)
                cotangents = torch.einsum("ncr,ndr,jnd->jnc", columns, columns, along)
                pull = vjp(call, parameters)[1]
                images = vmap(lambda cotangent, pull=pull: pull(cotangent)[0])(cotangents)
                total += torch.cat([images[name].flatten(1) for name in parameters], 1).T
        return total

    return product


def lanczos_eigenpairs(
    network: FunctionalNetwork,
    walk: Callable[[], Iterable[tuple[Any, Tensor]]],
    columns_at: Callable[[Tensor], Tensor],
    rank: int,
    *,
    seed: int = 0,
    progress_bar: bool = False,
    ranks: Ranks = ALONE,
) -> Eigenpairs:
    """The ``rank`` < P largest eigenpairs of `ggn_product`'s G, whose samples ranks share.

    Fewer where the rest is rounding noise, see `product_cutoff`.

    Raises:
        ValueError: if ``rank`` is not below P.
        NumericalError: if Lanczos does not converge, or the curvature is not finite or vanishes.
    """
    size = network.n_params
    if rank >= size:
        raise ValueError(
            f"Lanczos finds fewer than all {size} eigenpairs; got rank={rank}. Use a smaller rank."
        )
    product = ggn_product(network, walk, columns_at)

    def solve(product: Product) -> Eigenpairs:
        pairs = arpack_eigenpairs(product, network, rank, seed=seed, progress_bar=progress_bar)
        return significant_pairs(pairs, product_cutoff(network.dtype))

    return solved_over_ranks(ranks, product, solve)


def arpack_eigenpairs(
    product: Product,
    network: FunctionalNetwork,
    k: int,
    *,
    seed: int = 0,
    progress_bar: bool = False,
) -> Eigenpairs:
    """The k < P algebraically largest eigenvalues of a symmetric matrix, descending; eigenvectors.

    Args:
        product: with the matrix [P, P], in the network's dtype: the tolerance follows from it.
        network: whose parameters are the matrix's rows and columns.
        k: number of eigenpairs.
        seed: of the starting vector.
        progress_bar: count products.

    Raises:
        NumericalError: if the iteration limit is reached, or a product vanishes or is not finite.
    """
    size, dtype = network.n_params, network.dtype
    # Numpy takes no negative seed; torch takes one for its remainder.
    start = np.random.default_rng(seed % 2**64).standard_normal(size)

    def multiply(vector: np.ndarray) -> np.ndarray:
        bar.update()
        given = torch.from_numpy(vector.reshape(-1, 1)).to(network.device, dtype)
        return product(given).double().cpu().numpy()

    operator = LinearOperator((size, size), matvec=multiply, dtype=np.float64)
    try:
        with tqdm(desc="[curvature products]", disable=not progress_bar) as bar:
            values, vectors = eigsh(operator, k=k, which="LA", v0=start, tol=_TOLERANCE[dtype])
    except ArpackNoConvergence as error:
        raise NumericalError(
            f"Lanczos found {len(error.eigenvalues)} of {k} eigenpairs before its iteration "
            "limit; ask for fewer (eigenvalues far down are close together)."
        ) from error
    except ArpackError as error:
        raise NumericalError(
            "Lanczos cannot start: the curvature of the data is not finite, or it vanishes "
            "(saturated predictions, or outputs that do not depend on the covered parameters)."
        ) from error
    basis = torch.from_numpy(vectors[:, ::-1].copy()).to(network.device, dtype)
    return Eigenpairs(basis, torch.from_numpy(values[::-1].copy()).to(network.device))


def product_cutoff(dtype: torch.dtype) -> float:
    """Eigenvalues below this share of the largest are noise: a product knows 100 eps of that."""
    return max(100 * torch.finfo(dtype).eps, 1e-13)


def significant_pairs(pairs: Eigenpairs, cutoff: float) -> Eigenpairs:
    """Those whose eigenvalue is above a share of the largest.

    Raises:
        NumericalError: if the largest is not positive and finite.
    """
    values = pairs.eigenvalues
    if not bool(torch.isfinite(values).all()) or not bool(values[0] > 0):
        raise NumericalError(
            "the curvature of the batch vanishes, or is not finite: the leading eigenvalue is "
            f"{float(values[0]):.3g}. The outputs may not depend on the covered parameters, or the "
            "predictions are saturated (softmax at 0/1)."
        )
    kept = int((values > cutoff * values[0]).sum())
    return Eigenpairs(pairs.basis[:, :kept], values[:kept])
