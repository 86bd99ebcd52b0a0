r"""Leading eigenpairs without rows: Lanczos on products with the generalized Gauss-Newton matrix.

For data or models whose rows do not fit in memory. The products are curvlinops', the eigen-solver
is ARPACK. The GGN only, never the Hessian: its negative curvature is no precision of a posterior.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from curvlinops import GGNLinearOperator
from scipy.sparse.linalg import ArpackError, ArpackNoConvergence, LinearOperator, eigsh
from torch import Tensor, nn
from tqdm import tqdm

from laplace_debiased.curvature.lowrank.span import Eigenpairs
from laplace_debiased.errors import NumericalError
from laplace_debiased.network.functional import FunctionalNetwork
from laplace_debiased.network.inputs import batch_length
from laplace_debiased.network.modes import differentiable_kernels
from laplace_debiased.network.precision import full_precision

_TOLERANCE = {torch.float32: 1e-6, torch.float64: 1e-12}
"""Relative, of eigenvalues. A float32 product is off by 1e-7: below it ARPACK iterates on noise."""


class _RootLoss(nn.Module):
    """½ Σ_n ‖S_nᵀ f_n‖²: a loss whose Hessian in the outputs is S_n S_nᵀ, with S_n looked up.

    It makes one product serve every Fisher type and every weighting of samples. "Targets" are
    positions of samples in the walk.
    """

    reduction = "sum"

    def __init__(self, columns_at: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self._columns_at = columns_at

    def forward(self, outputs: Tensor, positions: Tensor) -> Tensor:
        """Sum over the batch."""
        outputs = full_precision(outputs)
        columns = self._columns_at(positions).to(outputs)
        return 0.5 * torch.einsum("ncr,nc->nr", columns, outputs).square().sum()


@dataclass(frozen=True, eq=False)
class _Batches:
    """A data source that can be walked again and again, as curvlinops expects it."""

    walk: Callable[[], Iterable[tuple[Any, Tensor]]]
    prepare: Callable[[Any], Any]

    def __iter__(self) -> Iterator[tuple[Any, Tensor]]:
        for inputs, positions in self.walk():
            yield self.prepare(inputs), positions


def lanczos_eigenpairs(
    network: FunctionalNetwork,
    walk: Callable[[], Iterable[tuple[Any, Tensor]]],
    columns_at: Callable[[Tensor], Tensor],
    rank: int,
    *,
    seed: int = 0,
    progress_bar: bool = False,
) -> Eigenpairs:
    """The ``rank`` largest eigenvalues of G = Σ_n J_nᵀ S_n S_nᵀ J_n, and their eigenvectors.

    Fewer where the rest is rounding noise: a product knows an eigenvalue to about 100 eps of the
    largest.

    Args:
        network: the network and its covered parameters, in float32 or float64.
        walk: gives (inputs, positions) of all samples that count, the same in every walk.
        columns_at: positions [n] to columns S [n, C, R], scaled so that the sum is what is meant.
        rank: number of eigenpairs, below P.
        seed: seed of the starting vector.
        progress_bar: count products.

    Raises:
        ValueError: for a model in half precision, or ``rank`` not below P.
        NumericalError: if Lanczos does not converge, or the curvature is not finite or vanishes.
    """
    product = _product(network, walk, columns_at)
    dtype, size = network.dtype, network.n_params
    if rank >= size:
        raise ValueError(
            f"Lanczos finds fewer than all {size} eigenpairs; got rank={rank}. Use a smaller rank."
        )

    def multiply(vector: np.ndarray) -> np.ndarray:
        given = torch.from_numpy(vector).to(network.device, dtype)
        return product(given).double().cpu().numpy()

    try:
        with tqdm(desc="[GGN products]", disable=not progress_bar) as bar:
            values, vectors = arpack_eigenpairs(multiply, size, rank, dtype, seed, bar)
    except ArpackNoConvergence as error:
        raise NumericalError(
            f"Lanczos found {len(error.eigenvalues)} of {rank} eigenpairs before its iteration "
            "limit; ask for a smaller rank (eigenvalues far down are close together)."
        ) from error
    except ArpackError as error:
        raise NumericalError(
            "Lanczos cannot start: the curvature of the data is not finite, or it vanishes "
            "(saturated predictions, or outputs that do not depend on the covered parameters)."
        ) from error
    return _above_noise(values, vectors, network)


def arpack_eigenpairs(
    product: Callable[[np.ndarray], np.ndarray],
    size: int,
    k: int,
    dtype: torch.dtype,
    seed: int,
    bar: tqdm,
) -> tuple[np.ndarray, np.ndarray]:
    """The k algebraically largest eigenvalues of a symmetric matrix, descending; eigenvectors.

    Args:
        product: from a vector [P] to its product with the matrix [P], in float64.
        size: P.
        k: number of eigenpairs, below P.
        dtype: what the product is computed in; the tolerance follows from it.
        seed: seed of the starting vector.
        bar: counts products.

    Raises:
        ArpackError: as scipy says; ArpackNoConvergence if the iteration limit is reached.
    """

    def counted(vector: np.ndarray) -> np.ndarray:
        bar.update()
        return product(vector.ravel())

    operator = LinearOperator((size, size), matvec=counted, dtype=np.float64)
    # Numpy takes no negative seed; torch takes one for its remainder.
    start = np.random.default_rng(seed % 2**64).standard_normal(size)
    values, vectors = eigsh(operator, k=k, which="LA", v0=start, tol=_TOLERANCE[dtype])
    return values[::-1].copy(), vectors[:, ::-1].copy()


def _above_noise(values: np.ndarray, vectors: np.ndarray, network: FunctionalNetwork) -> Eigenpairs:
    if not np.isfinite(values).all() or not values[0] > 0:
        raise NumericalError(
            "the curvature of the data is not finite, or vanishes: the leading eigenvalue is "
            f"{values[0]:.3g}. The predictions may be saturated."
        )
    noise = max(100 * torch.finfo(network.dtype).eps, 1e-13)
    kept = int((values > noise * values[0]).sum())
    basis = torch.from_numpy(vectors[:, :kept]).to(network.device, network.dtype)
    return Eigenpairs(basis, torch.from_numpy(values[:kept]).to(network.device))


def _product(
    network: FunctionalNetwork,
    walk: Callable[[], Iterable[tuple[Any, Tensor]]],
    columns_at: Callable[[Tensor], Tensor],
) -> Callable[[Tensor], Tensor]:
    named = dict(network.model.named_parameters())
    parameters = [named[name] for name in network.names]
    if any(p.dtype not in _TOLERANCE for p in network.model.parameters()):
        raise ValueError(
            "GGN-vector products need a model in float32 or float64: call model.float(), or use a "
            "budget n_samples whose rows fit in memory."
        )
    with differentiable_kernels(network.model):
        operator = GGNLinearOperator(
            network.model,
            _RootLoss(columns_at),
            parameters,
            _Batches(walk, network.prepare),
            # Its check of determinism would draw from the global generator.
            check_deterministic=False,
            num_data=1,  # read for a mean reduction only
            batch_size_fn=batch_length,
        )

    def multiply(vector: Tensor) -> Tensor:
        with differentiable_kernels(network.model):
            return operator @ vector

    return multiply
