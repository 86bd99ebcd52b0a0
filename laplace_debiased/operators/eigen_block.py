"""One diagonal block of a curvature: a Kronecker eigenbasis with a full table of eigenvalues."""

import math
from dataclasses import dataclass

from torch import Tensor

from laplace_debiased.curvature.rows import sides


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

    A side may be thin: a basis of r < D columns, and r + 1 entries in Λ, the last of which belongs
    to every direction outside of the basis. Its *coordinates* are then r + D numbers: those along
    the basis, and what is left of the vector (see :mod:`curvature.rows.sides`).
    """

    output_basis: Tensor | None
    input_basis: Tensor | None
    eigenvalues: Tensor

    def __repr__(self) -> str:
        sides_known = [("output_basis", self.output_basis)]
        if self.eigenvalues.ndim > 1:
            sides_known.append(("input_basis", self.input_basis))
        names = [f"{name}=identity" for name, basis in sides_known if basis is None]
        shape = f"eigenvalues={list(self.eigenvalues.shape)}"
        return f"{type(self).__name__}({', '.join([shape, *names])}, {self.eigenvalues.dtype})"

    @property
    def n_params(self) -> int:
        """Number of parameters of the block, D_out · D_in (of all groups) or D_out."""
        return math.prod(self._shape)

    @property
    def is_thin(self) -> bool:
        """Whether a side has fewer directions than dimensions."""
        return sides.is_thin(self.output_basis) or sides.is_thin(self.input_basis)

    @property
    def _shape(self) -> tuple[int, ...]:
        """Of the parameter: the table's, with the dimensions of thin sides."""
        shape = list(self.eigenvalues.shape)
        if self.output_basis is not None:
            shape[self._output_axis] = self.output_basis.shape[-2]
        if self.input_basis is not None:
            shape[-1] = self.input_basis.shape[-2]
        return tuple(shape)

    @property
    def _output_axis(self) -> int:
        return -1 if self.eigenvalues.ndim == 1 else -2

    def multiplicities(self) -> Tensor:
        """Number of directions that every entry of the table stands for; they sum to n_params."""
        return sides.table_multiplicities(self.eigenvalues, self.output_basis, self.input_basis)

    def per_direction(self) -> Tensor:
        """Eigenvalues of all directions [n_params], equal along a complement."""
        return self.eigenvalues.flatten().repeat_interleave(self.multiplicities().long().flatten())

    def per_coordinate(self, table: Tensor) -> Tensor:
        """A table of the eigenvalues' shape as one entry per coordinate, flat."""
        table = sides.spread(table, self.output_basis, dim=self._output_axis)
        return sides.spread(table, self.input_basis).flatten()

    def to_eigenbasis(self, vectors: Tensor) -> Tensor:
        """Uᵀ v for each v [n_params] in `vectors` [..., n_params]; same shape out.

        Coordinates are in the order of `eigenvalues.flatten()`; see `per_coordinate` for thin
        sides, where they are more than the parameters.
        """
        if self.eigenvalues.ndim == 1:
            return sides.coordinates(vectors, self.output_basis)
        matrices = vectors.unflatten(-1, self._shape)
        matrices = sides.coordinates(matrices.mT, self.output_basis).mT
        return sides.coordinates(matrices, self.input_basis).flatten(-self.eigenvalues.ndim)

    def from_eigenbasis(self, coordinates: Tensor) -> Tensor:
        """U c for each c in `coordinates` [..., n]; parameters [..., n_params] out."""
        if self.eigenvalues.ndim == 1:
            return sides.from_coordinates(coordinates, self.output_basis)
        shape = list(self.eigenvalues.shape)
        for basis, axis in ((self.output_basis, -2), (self.input_basis, -1)):
            if sides.is_thin(basis):
                shape[axis] = sum(basis.shape[-2:])
        matrices = coordinates.unflatten(-1, shape)
        matrices = sides.from_coordinates(matrices.mT, self.output_basis).mT
        return sides.from_coordinates(matrices, self.input_basis).flatten(-self.eigenvalues.ndim)

    def diagonal_of(self, table: Tensor) -> Tensor:
        """Return the diagonal [n_params] of U diag(vec T) Uᵀ for a T of the eigenvalues' shape."""
        diagonal = table
        if self.output_basis is not None:
            diagonal = sides.entry_squares(self.output_basis) @ table
        if self.input_basis is not None:
            diagonal = diagonal @ sides.entry_squares(self.input_basis).mT
        return diagonal.flatten()
