"""A posterior precision that is low rank plus a diagonal prior."""

from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from laplace_debiased.network.grad_modes import outside_inference_mode


@dataclass(frozen=True, eq=False, repr=False)
class LowRank:
    """P = h U diag(λ) Uᵀ + D with few columns in U, and D diagonal: curvature plus prior precision.

    The columns of U are meant to be orthonormal, but nothing relies on it: with
    W = D^-½ U diag(λ)^½ and P = D^½ (I + h W Wᵀ) D^½, all goes through one Cholesky factor
    L Lᵀ = I + h Wᵀ W [k, k], stable at λ = 0 and at h = 0. Gradients reach `scale` and
    `prior_precision`, through a Cholesky factor rather than eigenvectors, so that repeated
    eigenvalues do no harm; U and λ are data, which must not require gradients. UᵀU is kept, and
    handed on by `scaled` and `with_prior`.

    Attributes:
        basis: U [P, k]; k = 0 leaves the prior alone.
        eigenvalues: λ [k], none negative; a mean or a sum over data, as `scale` completes it.
        prior_precision: a scalar, one per layer [n_layers], or the diagonal of D [P]; kept in that
            form, so that a scalar costs no memory. All positive. A vector that could be both
            layers and diagonal means the same either way.
        layer_sizes: number of parameters of each layer, in order, for a prior per layer.
        scale: h, one number, not negative: what λ is multiplied by.
    """

    basis: Tensor
    eigenvalues: Tensor
    prior_precision: Tensor
    layer_sizes: tuple[int, ...] | None = None
    scale: Tensor = field(default_factory=lambda: torch.ones(()))
    _grams: dict[tuple[int, ...], Tensor] = field(default_factory=dict, kw_only=True)

    def __post_init__(self) -> None:
        prior, scale = (
            torch.as_tensor(value, dtype=self.basis.dtype, device=self.basis.device)
            for value in (self.prior_precision, self.scale)
        )
        object.__setattr__(self, "prior_precision", prior if prior.numel() > 1 else prior.squeeze())
        object.__setattr__(self, "scale", scale.reshape(()))

    def __repr__(self) -> str:
        n_params, rank = self.basis.shape
        return (
            f"{type(self).__name__}({n_params} parameters, rank {rank}, {self.basis.dtype}, "
            f"{self.basis.device})"
        )

    @property
    def prior_diagonal(self) -> Tensor:
        """The diagonal of D: 0-d for a scalar prior, else [P]. It broadcasts over parameters."""
        prior, n_params = self.prior_precision, len(self.basis)
        if prior.ndim == 0 or len(prior) == n_params:
            return prior
        sizes = torch.tensor(self.layer_sizes, device=prior.device)
        return prior.repeat_interleave(sizes, output_size=n_params)

    def scaled(self, h: float | Tensor) -> "LowRank":
        """The operator with curvature times `h`; the prior stays."""
        like = self.scale
        return replace(self, scale=like * torch.as_tensor(h, dtype=like.dtype, device=like.device))

    def with_prior(self, prior_precision: Tensor) -> "LowRank":
        """The operator with another prior precision, of any form that the class takes."""
        return replace(self, prior_precision=prior_precision)

    def logdet(self) -> Tensor:
        """Log-determinant, 0-d: log det D + log det(I + h Wᵀ W)."""
        log_prior = self.prior_diagonal.log().expand(len(self.basis))
        return log_prior.sum() + 2 * self._cholesky().diagonal().log().sum()

    def sqrt_solve(self, z: Tensor) -> Tensor:
        """S z for each z in [..., P], with S Sᵀ = P⁻¹; same shape out.

        White noise in, zero-mean posterior samples out. S = D^-½ (I − h W M Wᵀ) with
        M = L^-ᵀ (I + L)⁻¹. It is a root because M + Mᵀ − M (L Lᵀ − I) Mᵀ = (L Lᵀ)⁻¹ for every
        non-singular L: with N = (I + L)⁻¹ and N L = I − N, all but the identity cancels in Lᵀ(·)L.
        S is not symmetric.
        """
        require_vectors("z", z, len(self.basis), self.basis)
        return self._less_curvature(z, self._core().mT) / self.prior_diagonal.sqrt()

    def square_norm(self, v: Tensor) -> Tensor:
        """vᵀ P v for each v in [..., P]; [...] out."""
        require_vectors("v", v, len(self.basis), self.basis)
        curvature = ((v @ self.basis).square() * self.eigenvalues).sum(-1)
        return self.scale * curvature + (self.prior_diagonal * v.square()).sum(-1)

    def inv_square_form(self, J: Tensor) -> Tensor:
        """J_n P⁻¹ J_nᵀ for each n: with Jacobians J [n, C, P] the functional variance [n, C, C].

        Computed as (J S)(J S)ᵀ: positive semi-definite whatever the rounding, and without the
        cancellation of the prior against the curvature.
        """
        require_vectors("J", J, len(self.basis), self.basis)
        if J.ndim != 3:
            raise ValueError(f"J must be [n, C, P], got the shape {list(J.shape)}.")
        root = self._less_curvature(J / self.prior_diagonal.sqrt(), self._core())
        return root @ root.mT

    def to_matrix(self) -> Tensor:
        """P as a dense [P, P], for tiny models."""
        curvature = (self.basis * self.eigenvalues) @ self.basis.mT
        return self.scale * curvature + torch.diag(self.prior_diagonal.expand(len(self.basis)))

    def detach(self) -> "LowRank":
        """The operator cut from the autograd graph; storage is shared."""
        prior, scale = self.prior_precision.detach(), self.scale.detach()
        return replace(self, prior_precision=prior, scale=scale)

    def _less_curvature(self, v: Tensor, core: Tensor) -> Tensor:
        """Each v in [..., P] less h D^-½ U core Uᵀ D^-½ v, as rows."""
        prior_root = self.prior_diagonal.sqrt()
        correction = ((v / prior_root) @ self.basis) @ core @ self.basis.mT
        return v - self.scale * correction / prior_root

    def _core(self) -> Tensor:
        """diag(λ)^½ M diag(λ)^½ [k, k]."""
        lower, roots = self._cholesky(), self.eigenvalues.sqrt()
        identity = torch.eye(len(roots), dtype=roots.dtype, device=roots.device)
        shifted = torch.linalg.solve_triangular(identity + lower, identity, upper=False)
        m = torch.linalg.solve_triangular(lower.mT, shifted, upper=True)
        return roots.unsqueeze(-1) * m * roots

    def _cholesky(self) -> Tensor:
        """L [k, k].

        Raises:
            RuntimeError: I + h Wᵀ W is not positive definite in this precision, which takes basis
                vectors that are close to dependent together with a very large h λ / prior.
        """
        roots = self.eigenvalues.sqrt()
        identity = torch.eye(len(roots), dtype=roots.dtype, device=roots.device)
        # h stays outside of the root: its derivative is then finite at h = 0.
        matrix = identity + self.scale * (roots.unsqueeze(-1) * self._gram() * roots)
        try:
            return torch.linalg.cholesky(matrix)
        except torch.linalg.LinAlgError as error:
            raise RuntimeError(
                f"the low-rank precision is not positive definite in {matrix.dtype}: the columns "
                "of basis are close to dependent while scale * eigenvalue / prior_precision is "
                f"{float(matrix.detach().diagonal().max()):.3g}; orthonormalise the basis, or "
                "move the operator to torch.float64."
            ) from error

    def _gram(self) -> Tensor:
        """Uᵀ D⁻¹ U [k, k]; of a prior that is constant over layers what does not depend on it."""
        prior, n_params = self.prior_precision, len(self.basis)
        if prior.ndim and len(prior) == n_params:
            whitened = self.basis / prior.sqrt().unsqueeze(-1)
            return whitened.mT @ whitened
        sizes = (self.layer_sizes or ()) if prior.ndim else (n_params,)
        if sizes not in self._grams:
            # Kept beyond a caller's inference mode, whose tensors autograd could not use later.
            with outside_inference_mode():
                parts = self.basis.split(sizes)
                self._grams[sizes] = torch.stack([part.mT @ part for part in parts])
        return torch.einsum("l,lij->ij", 1 / prior.reshape(-1), self._grams[sizes])


def require_vectors(name: str, value: object, n_params: int, like: Tensor) -> None:
    """Check that `value` is [..., n_params] of the dtype and device of `like`.

    Raises:
        TypeError: if it is no tensor, or of another dtype.
        ValueError: if it has another shape, or is on another device.
    """
    if not isinstance(value, Tensor):
        raise TypeError(f"{name} must be a torch.Tensor, got {type(value).__name__}.")
    if value.ndim == 0 or value.shape[-1] != n_params:
        raise ValueError(
            f"{name} must have {n_params} entries (one per parameter) in its last dimension, got "
            f"the shape {list(value.shape)}."
        )
    if value.dtype != like.dtype:
        raise TypeError(f"{name} must have the dtype {like.dtype}, got {value.dtype}.")
    if value.device != like.device:
        raise ValueError(f"{name} must be on the device {like.device}, got {value.device}.")
