r"""Top eigenpairs of a mini-batch's curvature, and how far two eigenspaces coincide.

Three solvers, matched to what is small:

* **Gram**: with A [mR, P] the rows J_nᵀ S_n, G = AᵀA/m has the eigenvalues of the mR × mR matrix
  AAᵀ/m and the eigenvectors Aᵀv/√(mλ). All eigenpairs at once, at the price of R backward passes
  over the batch. The Gram matrix is formed in float64: squaring the condition number then costs no
  digit that float32 rows ever had.
* **Lanczos**: ARPACK on matrix-vector products (curvlinops' for the GGN), for batches or models
  whose rows do not fit, and for the Hessian. A float32 product carries relative errors of 1e-7, so
  the tolerance is 1e-6 there: below it ARPACK would iterate on rounding noise.
* **Dense**: the matrix itself, for models of a few hundred parameters (ARPACK cannot give all P
  eigenpairs).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from enum import StrEnum

import numpy as np
import torch
from curvlinops import GGNLinearOperator
from scipy.sparse.linalg import ArpackNoConvergence
from torch import Tensor, nn
from torch.func import grad, jvp, vmap
from tqdm import tqdm

from laplace_debiased.checks import checked_integer, generator_seed
from laplace_debiased.curvature.lowrank import combined_rows, gram_matrix
from laplace_debiased.curvature.lowrank.products import arpack_eigenpairs
from laplace_debiased.diagnostics.measure import (
    Matrix,
    root_rows,
    rows_bytes,
)
from laplace_debiased.diagnostics.network import Network, attributed, undisturbed
from laplace_debiased.likelihoods import LossModel
from laplace_debiased.network.inputs import batch_length, calling_by_signature, select_rows
from laplace_debiased.network.transforms import Parameters
from laplace_debiased.options import parse_choice

_GRAM_MAX_BYTES = 2 * 2**30
_GRAM_MAX_ROWS = 1024
_DENSE_MAX_PARAMETERS = 256
_LANCZOS_CHUNK_SAMPLES = 512


_Product = Callable[[Tensor], Tensor]


class Solver(StrEnum):
    """How the top eigenpairs are found."""

    AUTO = "auto"
    """Dense for tiny models, Gram where its rows fit, else Lanczos."""

    GRAM = "gram"
    LANCZOS = "lanczos"
    DENSE = "dense"


@dataclass(frozen=True, eq=False)
class Eigenpairs:
    """Largest eigenvalues of a per-sample mean curvature matrix, and their eigenvectors.

    Attributes:
        values: eigenvalues [k] in descending order, float64.
        vectors: orthonormal eigenvectors [P, k] as columns; P in the order of
            ``model.parameters()``, without frozen ones.
        n_samples: samples in the batch.
    """

    values: Tensor
    vectors: Tensor
    n_samples: int


def top_eigenpairs(
    model: nn.Module,
    likelihood: str,
    batch: object,
    k: int = 100,
    *,
    matrix: str = "ggn",
    solver: str = "auto",
    seed: int = 0,
    dict_key_y: str = "labels",
    progress_bar: bool = False,
) -> Eigenpairs:
    """The k largest eigenvalues of a mini-batch's GGN or Hessian (per-sample mean).

    Args:
        model: trained network; evaluation mode inside, everything restored after.
        likelihood: "classification" or "regression" (½ squared error, summed over outputs).
        batch: (inputs, targets), or a mapping with the targets at ``dict_key_y``.
        k: at most so many; fewer where the matrix has fewer eigenvalues above rounding error.
        matrix: "ggn" or "hessian" (its algebraically largest eigenvalues).
        solver: "auto", "gram" (GGN only), "lanczos" or "dense".
        seed: for Lanczos' starting vector.
        dict_key_y: key of the targets in a mapping.
        progress_bar: show one.

    Raises:
        ValueError: for a bad option, outputs that are not finite, or a curvature that vanishes.
        RuntimeError: if Lanczos does not converge.
    """
    chosen = parse_choice(Matrix, matrix, "matrix")
    how = parse_choice(Solver, solver, "solver")
    with undisturbed(model):
        network = Network.of(model, likelihood, dict_key_y)
        return network_eigenpairs(
            network, batch, k, matrix=chosen, solver=how, seed=seed, progress_bar=progress_bar
        )


def network_eigenpairs(
    network: Network,
    batch: object,
    k: int,
    *,
    matrix: Matrix,
    solver: Solver,
    seed: int,
    role: str = "batch",
    progress_bar: bool = False,
) -> Eigenpairs:
    """As `top_eigenpairs`, for a network that is already undisturbed."""
    # Numpy's generators take no negative seed.
    k, seed = checked_integer("k", k), generator_seed(seed) % 2**64
    inputs, targets = network.pair(batch, role)
    outputs = network.checked_outputs(inputs, targets)
    root = network.loss.hessian_root(outputs)
    k = min(k, network.n_parameters)
    solver = _resolve(solver, matrix, network, root, k)
    match solver:
        case Solver.GRAM:
            rows = _rows(network, inputs, root, progress_bar)
            values, vectors = _gram_eigenpairs(rows, len(outputs), k)
        case Solver.LANCZOS:
            product = _product(network, inputs, targets, matrix)
            values, vectors = _lanczos(network, product, k, seed, progress_bar)
        case _:
            product = _product(network, inputs, targets, matrix)
            values, vectors = _dense(product, network.n_parameters, k)
    kept = _above_rounding(values, network.dtype, matrix, solver)
    return Eigenpairs(
        torch.as_tensor(values[:kept].copy()),
        torch.as_tensor(vectors[:, :kept].copy()).to(network.dtype).to(network.device),
        len(outputs),
    )


def eigenspace_overlap(u: Tensor, v: Tensor) -> float:
    r"""‖UᵀV‖_F² / k: the mean squared cosine of the principal angles between two subspaces.

    1 for equal subspaces, 0 for orthogonal ones; two random ones of dimension k in P dimensions
    overlap by k/P.

    Args:
        u: orthonormal columns [P, k].
        v: orthonormal columns [P, k].

    Raises:
        ValueError: if the shapes differ, or the columns are not orthonormal (to 1e-3).
    """
    if u.ndim != 2 or u.shape != v.shape or u.shape[1] == 0:
        raise ValueError(
            "u and v must hold the same number of directions, both [P, k] with k ≥ 1; got "
            f"{tuple(u.shape)} and {tuple(v.shape)}."
        )
    u, v = u.double(), v.to(u.device).double()
    eye = torch.eye(u.shape[1], dtype=u.dtype, device=u.device)
    for name, basis in (("u", u), ("v", v)):
        defect = float((basis.T @ basis - eye).abs().max())
        if not defect < 1e-3:
            raise ValueError(
                f"the columns of {name} must be orthonormal; {name}ᵀ{name} is off the identity by "
                f"{defect:.2g}. Take torch.linalg.qr({name}).Q first."
            )
    return float((u.T @ v).square().sum() / u.shape[1])


def _resolve(solver: Solver, matrix: Matrix, network: Network, root: Tensor, k: int) -> Solver:
    if solver is Solver.GRAM and matrix is Matrix.HESSIAN:
        raise ValueError(
            "solver='gram' needs matrix='ggn': the Hessian is no Gram matrix. Use 'lanczos'."
        )
    if solver is Solver.LANCZOS and k >= network.n_parameters:
        raise ValueError(
            f"solver='lanczos' finds fewer than P = {network.n_parameters} eigenpairs; got k = {k}."
            " Use solver='dense', or a smaller k."
        )
    if solver is not Solver.AUTO:
        return solver
    if network.n_parameters <= max(_DENSE_MAX_PARAMETERS, k):
        return Solver.DENSE
    n_rows = root.shape[0] * root.shape[2]
    fits = n_rows <= _GRAM_MAX_ROWS and rows_bytes(network, n_rows) <= _GRAM_MAX_BYTES
    return Solver.GRAM if matrix is Matrix.GGN and fits else Solver.LANCZOS


def _rows(network: Network, inputs: object, root: Tensor, progress_bar: bool) -> Tensor:
    """All rows J_nᵀ S_n of a batch as one matrix [mR, P]."""
    m, _, rank = root.shape
    rows = root.new_empty((m, rank, network.n_parameters), dtype=network.dtype)
    with tqdm(desc="rows of the Gram matrix", total=m, disable=not progress_bar) as bar:
        for chosen, values in root_rows(network, inputs, root):
            rows[chosen] = values
            bar.update(len(values))
    return rows.reshape(m * rank, -1)


def _gram_eigenpairs(rows: Tensor, n_samples: int, k: int) -> tuple[np.ndarray, np.ndarray]:
    squares, left = torch.linalg.eigh(gram_matrix(rows) / n_samples)
    k = min(k, len(squares))
    squares, left = squares.flip(0)[:k], left.flip(1)[:, :k]
    scale = (squares.clamp_min(torch.finfo(torch.float64).tiny) * n_samples).rsqrt()
    vectors = combined_rows(rows, left * scale)
    return squares.cpu().numpy(), vectors.cpu().numpy()


def _lanczos(
    network: Network,
    product: Callable[[np.ndarray], np.ndarray],
    k: int,
    seed: int,
    progress_bar: bool,
) -> tuple[np.ndarray, np.ndarray]:
    def multiply(vector: np.ndarray) -> np.ndarray:
        return product(vector[:, None]).astype(np.float64).ravel()

    try:
        with tqdm(desc="curvature products", disable=not progress_bar) as bar:
            return arpack_eigenpairs(multiply, network.n_parameters, k, network.dtype, seed, bar)
    except ArpackNoConvergence as error:
        raise RuntimeError(
            f"Lanczos found {len(error.eigenvalues)} of {k} eigenpairs before its iteration "
            "limit. Ask for a smaller k (eigenvalues far down the spectrum are close together)."
        ) from error


def _dense(
    product: Callable[[np.ndarray], np.ndarray], size: int, k: int
) -> tuple[np.ndarray, np.ndarray]:
    matrix = product(np.eye(size)).astype(np.float64)
    values, vectors = np.linalg.eigh((matrix + matrix.T) / 2)
    return values[::-1][:k], vectors[:, ::-1][:, :k]


class _MeanLoss(nn.Module):
    """A loss model as the mean-reduced criterion that curvlinops' operators expect."""

    reduction = "mean"

    def __init__(self, loss: LossModel) -> None:
        super().__init__()
        self.loss = loss

    def forward(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Mean loss over the samples."""
        return self.loss.losses(outputs, targets).mean()


def _ggn_product(network: Network, inputs: object, targets: Tensor) -> _Product:
    """X [P, j] ↦ G X with curvlinops' operator, G the batch's per-sample mean GGN."""
    trainable = [p for p in network.model.parameters() if p.requires_grad]
    if any(p.dtype not in (torch.float32, torch.float64) for p in trainable):
        raise ValueError(
            "curvature products need a float32 or float64 model; call model.float(), or use "
            "solver='gram', which computes in float32 whatever the model's dtype."
        )
    with calling_by_signature(network.model):
        operator = GGNLinearOperator(
            network.model,
            _MeanLoss(network.loss),
            trainable,
            [(attributed(select_rows(inputs, p)), targets[p]) for p in _pieces(targets)],
            # Its determinism check would draw from the global generator.
            check_deterministic=False,
            num_data=len(targets),
            batch_size_fn=batch_length,
        )

    def product(columns: Tensor) -> Tensor:
        with calling_by_signature(network.model):
            return operator @ columns

    return product


def _hessian_product(network: Network, inputs: object, targets: Tensor) -> _Product:
    """X [P, j] ↦ ∇²L X, with L the batch's mean loss, forward over reverse mode.

    `torch.func.grad` and not curvlinops' Hessian operator: that one differentiates through
    `jacrev`, whose inner vmap makes torch drop the derivative of layer_norm's statistics, and the
    "Hessian" of a transformer comes out asymmetric.
    """

    def product(columns: Tensor) -> Tensor:
        tangents = network.split(columns)
        total = torch.zeros_like(columns)
        for piece in _pieces(targets):
            loss = _summed_loss(network, select_rows(inputs, piece), targets[piece])

            def times(
                tangent: Parameters, loss: Callable[[Parameters], Tensor] = loss
            ) -> Parameters:
                return jvp(grad(loss), (network.parameters,), (tangent,))[1]

            products = vmap(times)(tangents)
            total += torch.cat([products[name].flatten(1) for name in products], 1).T
        return total / len(targets)

    return product


def _summed_loss(
    network: Network, inputs: object, targets: Tensor
) -> Callable[[Parameters], Tensor]:
    return lambda p: network.loss.losses(network.outputs(p, inputs), targets).sum()


def _pieces(targets: Tensor) -> list[slice]:
    size = _LANCZOS_CHUNK_SAMPLES
    return [slice(i, i + size) for i in range(0, len(targets), size)]


def _product(
    network: Network, inputs: object, targets: Tensor, matrix: Matrix
) -> Callable[[np.ndarray], np.ndarray]:
    """X [P, j] ↦ C X in numpy, computed in the model's dtype."""
    make = _ggn_product if matrix is Matrix.GGN else _hessian_product
    product = make(network, inputs, targets)

    def multiply(columns: np.ndarray) -> np.ndarray:
        given = torch.as_tensor(columns, dtype=network.dtype, device=network.device)
        return product(given).detach().cpu().numpy()

    return multiply


def _above_rounding(values: np.ndarray, dtype: torch.dtype, matrix: Matrix, solver: Solver) -> int:
    """Number of leading eigenvalues that are more than rounding error.

    Products and the dense matrix know an eigenvalue to about eps·λ_max. The Gram route knows its
    square root to about eps·σ_max, so it sees further down, until float64 itself ends.
    """
    if len(values) == 0 or not values[0] > 0.0:
        raise ValueError(
            "the curvature of the batch vanishes: no eigenvalue is positive. The model's outputs "
            "may not depend on its parameters, or its predictions are saturated (softmax at 0/1)."
        )
    if matrix is Matrix.HESSIAN:
        return len(values)
    noise = 100 * torch.finfo(dtype).eps
    floor = noise**2 if solver is Solver.GRAM else noise
    return int((values > values[0] * max(floor, 1e-13)).sum())
