"""The small k×k algebra behind a low-rank operator."""

import math
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from laplace_debiased.network.grad_modes import outside_inference_mode


@dataclass(frozen=True, eq=False)
class Grams:
    """Uᵀ D⁻¹ U for a fixed U [P, k] and any D, reusing what does not depend on D.

    U must not require gradients: what is kept would carry their graph.
    """

    basis: Tensor
    layer_sizes: tuple[int, ...] | None

    def weighted(self, prior: Tensor) -> Tensor:
        """Uᵀ D⁻¹ U [k, k] for D's diagonal given as a scalar, per layer or in full, [] or [n]."""
        if prior.ndim == 0:
            return self._total / prior
        if prior.shape[0] == self.basis.shape[0]:
            whitened = self.basis / prior.sqrt().unsqueeze(-1)
            return whitened.mT @ whitened
        return torch.einsum("l,lij->ij", 1 / prior, self._per_layer)

    # Kept beyond a caller's inference mode, whose tensors could not be used in autograd later.
    @cached_property
    def _total(self) -> Tensor:
        with outside_inference_mode():
            return self.basis.mT @ self.basis

    @cached_property
    def _per_layer(self) -> Tensor:
        assert self.layer_sizes is not None  # the operator refuses a prior per layer without them
        with outside_inference_mode():
            return torch.stack([part.mT @ part for part in self.basis.split(self.layer_sizes)])


@dataclass(frozen=True, eq=False)
class Capacitance:
    """I + h diag(λ)^½ C diag(λ)^½ = L Lᵀ with C = Uᵀ D⁻¹ U; all methods act on rows t [..., k].

    Attributes:
        eigenvalue_roots: λ^½ [k].
        cholesky: L [k, k], lower triangular.
    """

    eigenvalue_roots: Tensor
    cholesky: Tensor

    @classmethod
    def factorise(cls, eigenvalues: Tensor, gram: Tensor, scale: Tensor) -> "Capacitance":
        """Factorise for λ [k] ≥ 0, C [k, k] and h ≥ 0; differentiable in C and h.

        Raises:
            RuntimeError: the matrix is not positive definite in this precision, which takes basis
                vectors that are close to dependent together with a very large h λ / prior.
        """
        roots = eigenvalues.sqrt()
        identity = torch.eye(len(roots), dtype=roots.dtype, device=roots.device)
        # h stays outside of the root: its derivative is then finite at h = 0.
        matrix = identity + scale * (roots.unsqueeze(-1) * gram * roots)
        try:
            return cls(roots, torch.linalg.cholesky(matrix))
        except torch.linalg.LinAlgError as error:
            raise RuntimeError(
                f"the low-rank precision is not positive definite in {matrix.dtype}: the columns "
                "of basis are close to dependent while scale * eigenvalue / prior_precision is "
                f"{float(matrix.detach().diagonal().max()):.3g}; orthonormalise the basis, or "
                "move the operator to torch.float64."
            ) from error

    def whiten(self, t: Tensor) -> Tensor:
        """L⁻¹ diag(λ)^½ t."""
        return _solve_rows(self.cholesky.mT, t * self.eigenvalue_roots, upper=True)

    def woodbury(self, t: Tensor) -> Tensor:
        """diag(λ)^½ (L Lᵀ)⁻¹ diag(λ)^½ t."""
        return self.eigenvalue_roots * _solve_rows(self.cholesky, self.whiten(t), upper=False)

    def root(self, t: Tensor) -> Tensor:
        """diag(λ)^½ M diag(λ)^½ t with M = L⁻ᵀ (I + L)⁻¹."""
        inner = _solve_rows(self._shifted.mT, t * self.eigenvalue_roots, upper=True)
        return self.eigenvalue_roots * _solve_rows(self.cholesky, inner, upper=False)

    def transposed_root(self, t: Tensor) -> Tensor:
        """diag(λ)^½ Mᵀ diag(λ)^½ t, with the M of `root`."""
        inner = _solve_rows(self.cholesky.mT, t * self.eigenvalue_roots, upper=True)
        return self.eigenvalue_roots * _solve_rows(self._shifted, inner, upper=False)

    @property
    def _shifted(self) -> Tensor:
        return self.cholesky + torch.eye(
            len(self.cholesky), dtype=self.cholesky.dtype, device=self.cholesky.device
        )


def require_no_grad(name: str, value: Tensor) -> Tensor:
    """Return `value` if it does not require gradients.

    Raises:
        ValueError: it does.
    """
    if value.requires_grad:
        raise ValueError(
            f"{name} must not require gradients: a low-rank operator is differentiable in scale "
            f"and prior_precision only; pass {name}.detach()."
        )
    return value


def _solve_rows(triangle: Tensor, rows: Tensor, *, upper: bool) -> Tensor:
    """X with X A = rows, for rows [..., k] and a triangular A [k, k]."""
    flat = rows.reshape(math.prod(rows.shape[:-1]), rows.shape[-1])
    return torch.linalg.solve_triangular(triangle, flat, upper=upper, left=False).reshape(
        rows.shape
    )
