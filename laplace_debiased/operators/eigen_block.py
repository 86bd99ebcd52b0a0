"""One diagonal block of a curvature: a Kronecker eigenbasis with a full table of eigenvalues."""

from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from laplace_debiased.operators._validate import (
    as_scalar,
    require_finite,
    require_floating,
    require_same_kind,
)


@dataclass(frozen=True, eq=False, repr=False)
class EigenBlock:
    """The block U diag(vec Λ) Uᵀ with U = U_B ⊗ U_A, acting on row-major vec(W), W [D_out, D_in].

    K-FAC in its eigenbasis has Λ_ij = λ_B,i λ_A,j. Here Λ is any table, as in EKFAC (George et
    al. 2018, "Fast approximate natural gradient descent in a Kronecker-factored eigenbasis") and as
    magnitudes that were measured on another batch need it. The block carries no scale of its own:
    whether Λ is a per-sample mean or a sum over the data is up to who builds it.

    Attributes:
        output_basis: U_B [D_out, D_out], orthonormal columns, acts on the rows of W. None stands
            for the identity, which is then never formed. (`nn.Embedding` stores its weight as
            [n_embeddings, dim]: one-hot inputs are its *rows*, so there it is this one that is
            None.)
        input_basis: U_A [D_in, D_in], orthonormal columns, acts on the columns of W. None stands
            for the identity, or for no input factor at all if the eigenvalues are 1-d.
        eigenvalues: Λ [D_out, D_in], or [D_out] where there is no input factor (a bias).

    A weight of G groups is W [G, D_out, D_in], G blocks of the same size in one: the bases are then
    [G, D_out, D_out] and [G, D_in, D_in], and Λ is [G, D_out, D_in].

    Raises:
        TypeError: something is not a float32 or float64 tensor, or dtypes differ.
        ValueError: shapes or devices do not fit, an entry is not finite, or the block is empty.
    """

    output_basis: Tensor | None
    input_basis: Tensor | None
    eigenvalues: Tensor
    # Set where a block is derived from a checked one: its bases are large and known to be good.
    _bases_checked: bool = field(default=False, kw_only=True)

    def __post_init__(self) -> None:
        table = require_floating("eigenvalues", self.eigenvalues)
        if table.ndim not in (1, 2, 3) or table.numel() == 0:
            raise ValueError(
                "eigenvalues must be [D_out, D_in], [D_out] or [groups, D_out, D_in] with at least "
                f"one entry, got the shape {list(table.shape)}."
            )
        require_finite("eigenvalues", table)
        if self._bases_checked:
            return
        if table.ndim == 1 and self.input_basis is not None:
            raise ValueError(
                "input_basis must be None with eigenvalues [D_out] (no input factor); give the "
                "eigenvalues as a table [D_out, D_in] to use it."
            )
        for name, basis, axis in (
            ("output_basis", self.output_basis, 0 if table.ndim == 1 else -2),
            ("input_basis", self.input_basis, -1),
        ):
            if basis is not None:
                _check_basis(name, basis, table, axis)

    def __repr__(self) -> str:
        names = [
            f"{name}=identity" for name in ("output_basis", "input_basis") if self._implicit(name)
        ]
        shape = f"eigenvalues={list(self.eigenvalues.shape)}"
        return f"{type(self).__name__}({', '.join([shape, *names])}, {self.eigenvalues.dtype})"

    def _implicit(self, name: str) -> bool:
        has_factor = name == "output_basis" or self.eigenvalues.ndim > 1
        return has_factor and getattr(self, name) is None

    @property
    def n_params(self) -> int:
        """Number of parameters of the block, D_out · D_in (of all groups) or D_out."""
        return self.eigenvalues.numel()

    def to_eigenbasis(self, vectors: Tensor) -> Tensor:
        """Uᵀ v for each v [n_params] in `vectors` [..., n_params]; same shape out.

        Coordinates are in the order of `eigenvalues.flatten()`.
        """
        if self.eigenvalues.ndim == 1:
            return vectors if self.output_basis is None else vectors @ self.output_basis
        matrices = vectors.unflatten(-1, self.eigenvalues.shape)
        if self.output_basis is not None:
            matrices = self.output_basis.mT @ matrices
        if self.input_basis is not None:
            matrices = matrices @ self.input_basis
        return matrices.flatten(-self.eigenvalues.ndim)

    def from_eigenbasis(self, coordinates: Tensor) -> Tensor:
        """U c for each c [n_params] in `coordinates` [..., n_params]; same shape out."""
        if self.eigenvalues.ndim == 1:
            return coordinates if self.output_basis is None else coordinates @ self.output_basis.mT
        matrices = coordinates.unflatten(-1, self.eigenvalues.shape)
        if self.output_basis is not None:
            matrices = self.output_basis @ matrices
        if self.input_basis is not None:
            matrices = matrices @ self.input_basis.mT
        return matrices.flatten(-self.eigenvalues.ndim)

    def diagonal_of(self, table: Tensor) -> Tensor:
        """Return the diagonal [n_params] of U diag(vec T) Uᵀ for a T of the eigenvalues' shape."""
        diagonal = table if self.output_basis is None else self.output_basis.square() @ table
        if self.input_basis is not None:
            diagonal = diagonal @ self.input_basis.square().mT
        return diagonal.flatten()

    def dense_basis(self) -> Tensor:
        """U = U_B ⊗ U_A as a dense [n_params, n_params] matrix, for tests and tiny models."""
        identity = torch.eye(
            self.n_params, dtype=self.eigenvalues.dtype, device=self.eigenvalues.device
        )
        return self.from_eigenbasis(identity).mT

    def scaled(self, scale: float | Tensor) -> "EigenBlock":
        """Return the block with eigenvalues times `scale`; differentiable in `scale`.

        Raises:
            ValueError: `scale` is not one finite real number, or the product overflows.
        """
        eigenvalues = as_scalar("scale", scale, self.eigenvalues) * self.eigenvalues
        return replace(self, eigenvalues=eigenvalues, _bases_checked=True)

    def detach(self) -> "EigenBlock":
        """Return the block cut from the autograd graph; storage is shared."""
        bases = (self.output_basis, self.input_basis)
        output_basis, input_basis = (None if b is None else b.detach() for b in bases)
        return replace(
            self,
            output_basis=output_basis,
            input_basis=input_basis,
            eigenvalues=self.eigenvalues.detach(),
            _bases_checked=True,
        )


def _check_basis(name: str, basis: Tensor, table: Tensor, axis: int) -> None:
    require_floating(name, basis)
    size = table.shape[axis]
    shape = [*table.shape[:-2], size, size]
    if list(basis.shape) != shape:
        raise ValueError(
            f"{name} must be {shape} to fit the eigenvalues {list(table.shape)}, got the "
            f"shape {list(basis.shape)}."
        )
    require_same_kind(name, basis, "eigenvalues", table)
    require_finite(name, basis)
