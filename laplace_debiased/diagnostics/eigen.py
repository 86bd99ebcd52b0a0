r"""Top eigenpairs of a mini-batch's curvature, and how far two eigenspaces coincide.

Three solvers, matched to what is small; the first two are those of `curvature.lowrank`:

* **Gram**: with A [mR, P] the rows J_nᵀ S_n, G = AᵀA/m has the eigenvalues of the mR × mR matrix
  AAᵀ/m and the eigenvectors Aᵀv/√(mλ). All eigenpairs at once, at the price of R backward passes
  over the batch.
* **Lanczos**: ARPACK on matrix-vector products, for batches or models whose rows do not fit, and
  for the Hessian.
* **Dense**: the matrix itself, for models of a few hundred parameters (ARPACK cannot give all P
  eigenpairs).
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import grad, jvp
from tqdm import tqdm

from laplace_debiased.checks import checked_flag, checked_integer, generator_seed
from laplace_debiased.curvature.lowrank import span
from laplace_debiased.curvature.lowrank.products import (
    Product,
    arpack_eigenpairs,
    ggn_product,
    product_cutoff,
    significant_pairs,
)
from laplace_debiased.curvature.lowrank.span import (
    gram_matrix,
    orthonormal_pairs,
    relative_cutoff,
    span_eigenpairs,
)
from laplace_debiased.diagnostics.network import LossNetwork
from laplace_debiased.errors import ArgumentTypeError
from laplace_debiased.network.functional import FunctionalNetwork
from laplace_debiased.network.inputs import row_slices, select_rows
from laplace_debiased.network.modes import differentiable_kernels, public_call, undisturbed
from laplace_debiased.network.outputs import checked_model
from laplace_debiased.network.transforms import Parameters, vmap
from laplace_debiased.options import Curvature, parse_choice

_GRAM_MAX_BYTES = 2 * 2**30
_GRAM_MAX_ROWS = 1024
_DENSE_MAX_PARAMETERS = 256
_LANCZOS_CHUNK_SAMPLES = 512


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
    """

    values: Tensor
    vectors: Tensor


@public_call
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
        ValueError: for a bad option.
        NumericalError: for outputs that are not finite, a curvature that vanishes, or if Lanczos
            does not converge.
    """
    which = parse_choice(Curvature, matrix, "matrix")
    checked_model(model)
    how = parse_choice(Solver, solver, "solver")
    k, seed = checked_integer("k", k), generator_seed(seed)
    checked_flag("progress_bar", progress_bar)
    with undisturbed(model), differentiable_kernels(model):
        network = LossNetwork.of(model, likelihood, dict_key_y)
        functional = network.functional
        inputs, targets, outputs = network.batch(batch)
        root = network.loss.hessian_root(outputs)
        k = min(k, functional.n_params)
        how = _resolve(how, which, network, root, k)
        if how is Solver.GRAM:
            pairs = _gram_eigenpairs(network, inputs, root, k, progress_bar)
        else:
            if which is Curvature.GGN:
                product = _ggn_product(network, inputs, root)
                cutoff = product_cutoff(functional.dtype)
            else:  # all are wanted: it may be indefinite
                product, cutoff = _hessian_product(network, inputs, targets), -math.inf
            if how is Solver.LANCZOS:
                bar = progress_bar
                pairs = arpack_eigenpairs(product, functional, k, seed=seed, progress_bar=bar)
            else:
                pairs = _dense_eigenpairs(product, functional, k)
            pairs = significant_pairs(pairs, cutoff)
    return Eigenpairs(pairs.eigenvalues.cpu(), pairs.basis)


def eigenspace_overlap(u: Tensor, v: Tensor) -> float:
    r"""‖UᵀV‖_F² / k: the mean squared cosine of the principal angles between two subspaces.

    1 for equal subspaces, 0 for orthogonal ones; two random ones of dimension k in P dimensions
    overlap by k/P.

    Args:
        u: orthonormal columns [P, k].
        v: orthonormal columns [P, k].

    Raises:
        ArgumentTypeError: if one is no tensor.
        ValueError: if the shapes differ, or the columns are not orthonormal (to 1e-3).
    """
    for name, basis in (("u", u), ("v", v)):
        if not isinstance(basis, Tensor):
            kind = type(basis).__name__
            raise ArgumentTypeError(f"{name} must be a tensor [P, k]; got {kind}.")
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


def _resolve(
    solver: Solver, matrix: Curvature, network: LossNetwork, root: Tensor, k: int
) -> Solver:
    if solver is Solver.GRAM and matrix is Curvature.HESSIAN:
        raise ValueError(
            "solver='gram' needs matrix='ggn': the Hessian is no Gram matrix. Use 'lanczos'."
        )
    if solver is Solver.LANCZOS and k >= network.functional.n_params:
        raise ValueError(
            f"solver='lanczos' finds fewer than P = {network.functional.n_params} eigenpairs; got "
            f"k = {k}. Use solver='dense', or a smaller k."
        )
    if solver is not Solver.AUTO:
        return solver
    if network.functional.n_params <= max(_DENSE_MAX_PARAMETERS, k):
        return Solver.DENSE
    n_rows = root.shape[0] * root.shape[2]
    fits = n_rows <= _GRAM_MAX_ROWS and network.rows_bytes(n_rows) <= _GRAM_MAX_BYTES
    return Solver.GRAM if matrix is Curvature.GGN and fits else Solver.LANCZOS


def _gram_eigenpairs(
    network: LossNetwork, inputs: Any, root: Tensor, k: int, progress_bar: bool
) -> span.Eigenpairs:
    """From all rows J_nᵀ S_n [mR, P] of a batch; `relative_cutoff` says what is rounding."""
    m, _, rank = root.shape
    functional = network.functional
    rows = root.new_empty((m, rank, functional.n_params), dtype=functional.dtype)
    with tqdm(desc="rows of the Gram matrix", total=m * rank, disable=not progress_bar) as bar:
        for tile, values in network.row_pass.walk(inputs, root):
            rows[tile.samples, tile.columns] = values
            bar.update(values.shape[0] * values.shape[1])
    flat = rows.flatten(0, 1)
    gram = gram_matrix(flat)
    root_of_mean = gram.new_full((len(gram),), m**-0.5)
    cutoff = relative_cutoff(functional.dtype)
    return orthonormal_pairs(flat, span_eigenpairs(gram, root_of_mean, rank=k, cutoff=cutoff))


def _dense_eigenpairs(product: Product, network: FunctionalNetwork, k: int) -> span.Eigenpairs:
    """From the matrix itself, by its products with all unit vectors."""
    eye = torch.eye(network.n_params, dtype=network.dtype, device=network.device)
    matrix = product(eye).double()
    values, vectors = torch.linalg.eigh((matrix + matrix.T) / 2)
    return span.Eigenpairs(vectors.flip(1)[:, :k].to(network.dtype), values.flip(0)[:k])


def _ggn_product(network: LossNetwork, inputs: Any, root: Tensor) -> Product:
    """X [P, j] ↦ G X, G the batch's per-sample mean GGN."""
    scaled = root * len(root) ** -0.5
    positions = torch.arange(len(root), device=root.device)

    def walk() -> Iterator[tuple[Any, Tensor]]:
        for piece in row_slices(len(root), _LANCZOS_CHUNK_SAMPLES):
            yield select_rows(inputs, piece), positions[piece]

    return ggn_product(network.functional, walk, lambda at: scaled[at])


def _hessian_product(network: LossNetwork, inputs: Any, targets: Tensor) -> Product:
    """X [P, j] ↦ ∇²L X, with L the batch's mean loss, forward over reverse mode.

    `torch.func.grad` and not curvlinops' Hessian operator: that one differentiates through
    `jacrev`, whose inner vmap makes torch drop the derivative of layer_norm's statistics, and the
    "Hessian" of a transformer comes out asymmetric.
    """
    functional = network.functional

    def product(columns: Tensor) -> Tensor:
        parameters, tangents = functional.parameters(), functional.split(columns)

        def of_piece(piece: slice) -> Tensor:
            call = functional.function_of(select_rows(inputs, piece))

            def loss(values: Parameters) -> Tensor:
                return network.loss.losses(call(values), targets[piece]).sum()

            found = vmap(lambda tangent: jvp(grad(loss), (parameters,), (tangent,))[1])(tangents)
            return torch.cat([found[name].flatten(1) for name in found], 1).T

        pieces = row_slices(len(targets), _LANCZOS_CHUNK_SAMPLES)
        return sum(map(of_piece, pieces), torch.zeros_like(columns)) / len(targets)

    return product
