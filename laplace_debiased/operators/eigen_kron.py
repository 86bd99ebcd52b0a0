"""A block-diagonal posterior precision in a Kronecker eigenbasis."""

import copy
import math
from dataclasses import dataclass, field, replace
from numbers import Real

import torch
from torch import Tensor

from laplace_debiased.errors import NumericalError
from laplace_debiased.operators.eigen_block import EigenBlock
from laplace_debiased.operators.low_rank import require_vectors


@dataclass(frozen=True, eq=False, repr=False)
class EigenKron:
    """blockdiag_b(U_b (diag(vec Λ_b) + δ_b I) U_bᵀ): curvature plus prior precision, per block.

    It stands where laplace-torch keeps a `KronDecomposed` and has its interface. Two differences:
    Λ_b is any table rather than an outer product, and it is a value: no method changes it.
    Everything is differentiable in `deltas` and in the scalar of a product. As in laplace-torch,
    `h * kron` multiplies the eigenvalues and leaves the deltas, so that
    `h * kron + prior_precision` is the posterior precision h Λ + δ whenever kron has no deltas.

    Attributes:
        blocks: one `EigenBlock` per parameter tensor, in the order of the parameters. All share
            dtype and device.
        deltas: δ [n_blocks], the prior precision of each block. Given as a scalar or as [1] it is
            the same for all; zero unless given.

    Raises:
        ValueError: deltas of another shape.
    """

    blocks: tuple[EigenBlock, ...]
    deltas: Tensor = field(default_factory=lambda: torch.zeros(()))

    def __post_init__(self) -> None:
        deltas = _checked_deltas(self.deltas, len(self.blocks))
        deltas = deltas.to(device=self.device, dtype=self.dtype).expand(len(self.blocks))
        object.__setattr__(self, "deltas", deltas)

    def __repr__(self) -> str:
        return (
            f"{type(self).__name__}({len(self)} blocks, {self.n_params} parameters, "
            f"{self.dtype}, {self.device})"
        )

    def __len__(self) -> int:
        return len(self.blocks)

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of all tensors."""
        return self.blocks[0].eigenvalues.dtype

    @property
    def device(self) -> torch.device:
        """The device of all tensors."""
        return self.blocks[0].eigenvalues.device

    @property
    def n_params(self) -> int:
        """P, the number of parameters of all blocks."""
        return sum(block.n_params for block in self.blocks)

    @property
    def eigenvectors(self) -> list[list[Tensor | None]]:
        """Per block [U_B, U_A], or [U_B] without an input factor; None for an identity.

        A thin side has fewer columns than rows.
        """
        return [
            [block.output_basis, block.input_basis][: min(2, block.eigenvalues.ndim)]
            for block in self.blocks
        ]

    @property
    def eigenvalues(self) -> list[list[Tensor]]:
        """Per block one entry: the table Λ [(G,) D_out, D_in] or [D_out], without deltas.

        Where laplace-torch lists the eigenvalues of each factor, this lists their full table. With
        a thin side it has one row or column for all directions outside of the basis.
        """
        return [[block.eigenvalues] for block in self.blocks]

    def __add__(self, deltas: Tensor) -> "EigenKron":
        """Add a prior precision: a scalar tensor, or one per block [n_blocks]."""
        addend = _checked_deltas(deltas, len(self)).to(device=self.device, dtype=self.dtype)
        return EigenKron(self.blocks, self.deltas + addend)

    def __mul__(self, scalar: float | Tensor) -> "EigenKron":
        """Multiply the eigenvalues by a number or a one-element tensor; the deltas stay.

        Raises:
            NumericalError: if one overflows.
        """
        single = scalar.numel() == 1 and scalar.ndim <= 1 if isinstance(scalar, Tensor) else None
        if not (isinstance(scalar, Real) if single is None else single):
            raise ValueError(f"scalar must be one real number; got {scalar!r}.")
        scale = torch.as_tensor(scalar, dtype=self.dtype, device=self.device).reshape(())
        blocks = tuple(replace(b, eigenvalues=scale * b.eigenvalues) for b in self.blocks)
        _require_finite(blocks)
        return EigenKron(blocks, self.deltas)

    __radd__ = __add__
    __rmul__ = __mul__

    def logdet(self) -> Tensor:
        """Log-determinant, 0-d; a ValueError where an eigenvalue Λ + δ is not positive."""
        tables = self.tables()
        _require_sign(tables, "logdet", strict=True)
        return torch.stack(
            [
                (table.log() * block.multiplicities() if block.is_thin else table.log()).sum()
                for block, table in zip(self.blocks, tables, strict=True)
            ]
        ).sum()

    def bmm(self, W: Tensor, exponent: float = -1) -> Tensor:
        """The operator to the power `exponent`, times each vector in W.

        Args:
            W: [P], [n, P] or [n, C, P].
            exponent: any real number; -1 solves, -0.5 turns white noise into posterior samples.

        Returns:
            A tensor of the shape of W. (laplace-torch drops dimensions of size one in W [P] and
            [n, P].)

        Raises:
            TypeError: W is no tensor, or of another dtype.
            ValueError: W has another shape or device; an eigenvalue Λ + δ is not positive under a
                negative exponent, or is negative under a fractional one.
        """
        require_vectors("W", W, self.n_params, self.deltas)
        if W.ndim > 3:
            raise ValueError(f"W must be [P], [n, P] or [n, C, P], got {list(W.shape)}.")
        parts = [
            block.from_eigenbasis(block.to_eigenbasis(part) * block.per_coordinate(table))
            for block, part, table in zip(
                self.blocks, self._split(W), self._powers(exponent), strict=True
            )
        ]
        return torch.cat(parts, dim=-1)

    def inv_square_form(self, W: Tensor) -> Tensor:
        """W_n P⁻¹ W_nᵀ for each n: with Jacobians W [n, C, P] the functional variance [n, C, C].

        Raises:
            TypeError, ValueError: as `bmm`.
        """
        require_vectors("W", W, self.n_params, self.deltas)
        if W.ndim != 3:
            raise ValueError(f"W must be [n, C, P], got the shape {list(W.shape)}.")
        variance = W.new_zeros(W.shape[0], W.shape[1], W.shape[1])
        roots = self._powers(-0.5)
        for block, part, root in zip(self.blocks, self._split(W), roots, strict=True):
            # A product of one matrix with itself is positive semi-definite whatever the rounding.
            whitened = block.to_eigenbasis(part) * block.per_coordinate(root)
            variance = variance + whitened @ whitened.mT
        return variance

    def diag(self, exponent: float = 1) -> Tensor:
        """The diagonal [P] of the operator to the power `exponent`; see `bmm`."""
        powers = self._powers(exponent)
        diagonals = [b.diagonal_of(table) for b, table in zip(self.blocks, powers, strict=True)]
        return torch.cat(diagonals)

    def to_matrix(self, exponent: float = 1) -> Tensor:
        """The operator to the power `exponent` as a dense [P, P], for tiny models; see `bmm`."""
        identity = torch.eye(self.n_params, dtype=self.dtype, device=self.device)
        return self.bmm(identity, exponent)

    def clone(self) -> "EigenKron":
        """A copy that shares no memory, as laplace-torch's matrices have one."""
        return copy.deepcopy(self)

    def detach(self) -> "EigenKron":
        """Return the operator cut from the autograd graph; storage is shared."""
        blocks = tuple(replace(b, eigenvalues=b.eigenvalues.detach()) for b in self.blocks)
        return EigenKron(blocks, self.deltas.detach())

    def _split(self, vectors: Tensor) -> tuple[Tensor, ...]:
        return vectors.split([block.n_params for block in self.blocks], dim=-1)

    def tables(self) -> list[Tensor]:
        """Λ + δ of every block."""
        return [b.eigenvalues + delta for b, delta in zip(self.blocks, self.deltas, strict=True)]

    def _powers(self, exponent: float) -> list[Tensor]:
        exponent = float(exponent)
        if not math.isfinite(exponent):
            raise ValueError(f"exponent must be finite, got {exponent}.")
        tables = self.tables()
        if exponent < 0:
            _require_sign(tables, f"the exponent {exponent:g}", strict=True)
        elif not exponent.is_integer():
            _require_sign(tables, f"the exponent {exponent:g}", strict=False)
        return [table.pow(exponent) for table in tables]


def _checked_deltas(deltas: Tensor, n_blocks: int) -> Tensor:
    if not isinstance(deltas, Tensor):
        raise ValueError(
            f"deltas must be a torch.Tensor, got {type(deltas).__name__}; wrap a number with "
            "torch.tensor."
        )
    if deltas.is_complex() or deltas.ndim > 1 or (deltas.ndim and len(deltas) not in (1, n_blocks)):
        raise ValueError(
            f"deltas must be a real scalar, [1] or one per block [{n_blocks}], got a "
            f"{deltas.dtype} tensor of the shape {list(deltas.shape)}."
        )
    return deltas


def _require_finite(blocks: tuple[EigenBlock, ...]) -> None:
    largest = torch.stack([block.eigenvalues.detach().abs().max() for block in blocks])
    finite = torch.isfinite(largest)
    if not bool(finite.all()):
        raise NumericalError(
            f"the curvature of block {int((~finite).nonzero()[0])} (of {len(blocks)}) overflows in "
            f"{largest.dtype}: n_data / (sigma_noise² · temperature) is too large for it. Raise "
            "sigma_noise or temperature, or use a model in torch.float64."
        )


def _require_sign(tables: list[Tensor], purpose: str, *, strict: bool) -> None:
    # One small tensor for all blocks: an accelerator is waited for once, not once per block.
    minima = torch.stack([table.detach().min() for table in tables])
    good = minima > 0 if strict else minima >= 0
    if not bool(good.all()):
        block = int((~good).nonzero()[0])
        needed = "positive" if strict else "non-negative"
        raise ValueError(
            f"{purpose} needs {needed} eigenvalues, but the smallest eigenvalue + delta of block "
            f"{block} (of {len(tables)}) is {minima[block].item():.6g}; add a larger prior "
            "precision."
        )
