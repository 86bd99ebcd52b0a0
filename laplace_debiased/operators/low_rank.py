"""A posterior precision that is low rank plus a diagonal prior."""

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import cached_property

import torch
from torch import Tensor

from laplace_debiased.network.grad_modes import outside_inference_mode
from laplace_debiased.operators._capacitance import (
    Capacitance,
    Grams,
    require_no_grad,
)
from laplace_debiased.operators._validate import (
    as_scalar,
    require_finite,
    require_floating,
    require_same_kind,
    require_vectors,
)


@dataclass(frozen=True, eq=False, repr=False)
class LowRank:
    """P = h U diag(λ) Uᵀ + D with few columns in U, and D diagonal: curvature plus prior precision.

    The columns of U are meant to be orthonormal, but nothing relies on it: with
    W = D^-½ U diag(λ)^½ and P = D^½ (I + h W Wᵀ) D^½, all goes through one Cholesky factor
    L Lᵀ = I + h Wᵀ W [k, k], stable at λ = 0 and at h = 0. Gradients reach `scale` and
    `prior_precision`, through a Cholesky factor rather than eigenvectors, so that repeated
    eigenvalues do no harm; U and λ are data.

    The factor is computed at first use and kept, unless `scale` or `prior_precision` require
    gradients: a kept one would carry a graph that the first backward pass frees. UᵀU is kept in
    any case, and handed on by `scaled` and `with_prior`.

    Attributes:
        basis: U [P, k]; k = 0 leaves the prior alone.
        eigenvalues: λ [k], none negative; a mean or a sum over data, as `scale` completes it.
        prior_precision: a scalar, one per layer [n_layers], or the diagonal of D [P]; kept in that
            form, so that a scalar costs no memory. All positive. A vector that could be both
            layers and diagonal means the same either way.
        layer_sizes: number of parameters of each layer, in order, for a prior per layer.
        scale: h, one number, not negative: what λ is multiplied by.

    Raises:
        TypeError: something is not a float32 or float64 tensor, or dtypes differ.
        ValueError: shapes or devices do not fit, an entry is not finite, an eigenvalue or the scale
            is negative, a prior precision is not positive, or `basis` or `eigenvalues` require
            gradients.
    """

    basis: Tensor
    eigenvalues: Tensor
    prior_precision: Tensor | float
    layer_sizes: tuple[int, ...] | None = None
    scale: Tensor | float = 1.0
    # Set where the operator is derived from a checked one: the basis is large and known to be good.
    _grams: Grams | None = field(default=None, kw_only=True)

    def __post_init__(self) -> None:
        if self._grams is None:
            sizes = _check_data(self.basis, self.eigenvalues, self.layer_sizes)
            object.__setattr__(self, "layer_sizes", sizes)
            object.__setattr__(self, "_grams", Grams(self.basis, sizes))
        prior = _checked_prior(self.prior_precision, self.basis, self.layer_sizes)
        object.__setattr__(self, "prior_precision", prior)
        scale = as_scalar("scale", self.scale, self.basis)
        if bool(scale.detach() < 0):
            raise ValueError(f"scale must not be negative, got {scale.item():g}.")
        object.__setattr__(self, "scale", scale)

    def __repr__(self) -> str:
        return (
            f"{type(self).__name__}({self.n_params} parameters, rank {self.rank}, {self.dtype}, "
            f"{self.device})"
        )

    @property
    def n_params(self) -> int:
        """P, the number of parameters."""
        return self.basis.shape[0]

    @property
    def rank(self) -> int:
        """k, the number of columns of U."""
        return self.basis.shape[1]

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of all tensors."""
        return self.basis.dtype

    @property
    def device(self) -> torch.device:
        """The device of all tensors."""
        return self.basis.device

    @property
    def prior_diagonal(self) -> Tensor:
        """The diagonal of D: 0-d for a scalar prior, else [P]. It broadcasts over parameters."""
        prior = self._prior
        if prior.ndim == 0 or prior.shape[0] == self.n_params:
            return prior
        sizes = torch.tensor(self.layer_sizes, device=self.device)
        return prior.repeat_interleave(sizes, output_size=self.n_params)

    def scaled(self, h: float | Tensor) -> "LowRank":
        """Return the operator with curvature times `h`; the prior stays. Differentiable in `h`.

        Raises:
            ValueError: `h` is not one finite real number, or is negative.
        """
        return replace(self, scale=self._h * as_scalar("h", h, self.basis))

    def with_prior(self, prior_precision: Tensor | float) -> "LowRank":
        """Return the operator with another prior precision, of any form that the class takes."""
        return replace(self, prior_precision=prior_precision)

    def logdet(self) -> Tensor:
        """Log-determinant, 0-d: log det D + log det(I + h Wᵀ W)."""
        factor = self._factor()
        log_prior = self.prior_diagonal.log()
        prior_part = self.n_params * log_prior if log_prior.ndim == 0 else log_prior.sum()
        return prior_part + 2 * factor.cholesky.diagonal().log().sum()

    def solve(self, v: Tensor) -> Tensor:
        """P⁻¹ v for each v in [..., P]; same shape out (Woodbury's identity)."""
        require_vectors("v", v, self.n_params, self.basis)
        prior = self.prior_diagonal
        correction = self._factor().woodbury((v / prior) @ self.basis) @ self.basis.mT
        return (v - self._h * correction) / prior

    def sqrt_solve(self, z: Tensor) -> Tensor:
        """S z for each z in [..., P], with S Sᵀ = P⁻¹; same shape out.

        White noise in, zero-mean posterior samples out. S = D^-½ (I − h W M Wᵀ) with
        M = L^-ᵀ (I + L)⁻¹. It is a root because M + Mᵀ − M (L Lᵀ − I) Mᵀ = (L Lᵀ)⁻¹ for every
        non-singular L: with N = (I + L)⁻¹ and N L = I − N, all but the identity cancels in Lᵀ(·)L.
        S is not symmetric.
        """
        require_vectors("z", z, self.n_params, self.basis)
        return self._subtract_curvature(z, self._factor().root) / self.prior_diagonal.sqrt()

    def square_norm(self, v: Tensor) -> Tensor:
        """vᵀ P v for each v in [..., P]; [...] out."""
        require_vectors("v", v, self.n_params, self.basis)
        curvature = ((v @ self.basis).square() * self.eigenvalues).sum(-1)
        return self._h * curvature + (self.prior_diagonal * v.square()).sum(-1)

    def inv_square_form(self, J: Tensor) -> Tensor:
        """J_n P⁻¹ J_nᵀ for each n: with Jacobians J [n, C, P] the functional variance [n, C, C].

        Computed as (J S)(J S)ᵀ: positive semi-definite whatever the rounding, and without the
        cancellation of the prior against the curvature that `projected_variance` has.
        """
        require_vectors("J", J, self.n_params, self.basis)
        if J.ndim != 3:
            raise ValueError(f"J must be [n, C, P], got the shape {list(J.shape)}.")
        prior_root = self.prior_diagonal.sqrt()
        root = self._subtract_curvature(J / prior_root, self._factor().transposed_root)
        return root @ root.mT

    def to_matrix(self) -> Tensor:
        """P as a dense [P, P], for tiny models."""
        curvature = (self.basis * self.eigenvalues) @ self.basis.mT
        return self._h * curvature + torch.diag(self.prior_diagonal.expand(self.n_params))

    def detach(self) -> "LowRank":
        """Return the operator cut from the autograd graph; storage is shared."""
        return replace(self, prior_precision=self._prior.detach(), scale=self._h.detach())

    @property
    def _h(self) -> Tensor:
        assert isinstance(self.scale, Tensor)  # __post_init__ saw to it; for the type checker
        return self.scale

    @property
    def _prior(self) -> Tensor:
        assert isinstance(self.prior_precision, Tensor)  # likewise
        return self.prior_precision

    def _subtract_curvature(self, v: Tensor, core: Callable[[Tensor], Tensor]) -> Tensor:
        """Subtract h D^-½ U core(Uᵀ D^-½ v) from each v in [..., P]; `core` acts on [..., k]."""
        prior_root = self.prior_diagonal.sqrt()
        correction = core((v / prior_root) @ self.basis) @ self.basis.mT
        return v - self._h * correction / prior_root

    def _factor(self) -> Capacitance:
        if self._h.requires_grad or self._prior.requires_grad:
            return self._compute_factor()
        return self._kept_factor

    @cached_property
    def _kept_factor(self) -> Capacitance:
        # Kept beyond a caller's inference mode, whose tensors could not be used in autograd later.
        with outside_inference_mode():
            return self._compute_factor()

    def _compute_factor(self) -> Capacitance:
        assert self._grams is not None  # __post_init__ saw to it; for the type checker
        return Capacitance.factorise(self.eigenvalues, self._grams.weighted(self._prior), self._h)


def _check_basis(basis: Tensor) -> None:
    require_floating("basis", basis)
    if basis.ndim != 2 or basis.shape[0] == 0:
        raise ValueError(
            f"basis must be [P, k] with at least one parameter, got the shape {list(basis.shape)}."
        )
    require_finite("basis", basis)
    require_no_grad("basis", basis)


def _check_data(
    basis: Tensor, eigenvalues: Tensor, layer_sizes: tuple[int, ...] | None
) -> tuple[int, ...] | None:
    _check_basis(basis)
    require_floating("eigenvalues", eigenvalues)
    n_params, rank = basis.shape
    if eigenvalues.shape != (rank,):
        raise ValueError(
            f"eigenvalues must be [{rank}] to fit the basis {list(basis.shape)}, got the shape "
            f"{list(eigenvalues.shape)}."
        )
    require_same_kind("eigenvalues", eigenvalues, "basis", basis)
    require_finite("eigenvalues", eigenvalues)
    require_no_grad("eigenvalues", eigenvalues)
    if rank and float(eigenvalues.min()) < 0:
        raise ValueError(
            "eigenvalues must not be negative, got the smallest "
            f"{float(eigenvalues.min()):.6g}; clamp what rounding made negative to zero."
        )
    if layer_sizes is None:
        return None
    sizes = tuple(int(size) for size in layer_sizes)
    if any(size < 1 for size in sizes) or sum(sizes) != n_params:
        raise ValueError(
            f"layer_sizes must be positive and sum to the {n_params} rows of the basis, got "
            f"{len(sizes)} sizes that sum to {sum(sizes)}, the smallest {min(sizes, default=0)}."
        )
    return sizes


def _checked_prior(
    prior_precision: Tensor | float, basis: Tensor, layer_sizes: tuple[int, ...] | None
) -> Tensor:
    name = "prior_precision"
    if not isinstance(prior_precision, Tensor) or prior_precision.numel() == 1:
        prior = as_scalar(name, prior_precision, basis)
    else:
        lengths = {basis.shape[0]} | ({len(layer_sizes)} if layer_sizes is not None else set())
        if prior_precision.ndim != 1 or len(prior_precision) not in lengths:
            layers = "no layer_sizes given" if layer_sizes is None else f"{len(layer_sizes)} layers"
            raise ValueError(
                f"{name} must be a scalar, one per layer ({layers}) or one per parameter "
                f"[{basis.shape[0]}], got the shape {list(prior_precision.shape)}."
            )
        require_floating(name, prior_precision)
        prior = prior_precision.to(device=basis.device, dtype=basis.dtype)
        require_finite(name, prior)
    if not bool((prior.detach() > 0).all()):
        raise ValueError(f"{name} must be positive, got {float(prior.detach().min()):.6g}.")
    return prior
