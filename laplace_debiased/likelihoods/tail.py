r"""Probabilities of all classes where moments are known of the K most probable ones only.

With V the covariance of the K chosen outputs, c its mean off-diagonal entry and v its mean diagonal
less c, every output beyond is taken to have variance c + v, and covariance c with any other. What
all outputs share a softmax does not see; what is each class's own averages out over the many
classes of the tail, whose sum Σ_j exp(f_j) is by the law of large numbers exp(v/2) Σ_j exp(μ_j).
Where a few classes are most of the tail its sum still varies: as a lognormal of the same mean and
variance (Fenton 1960), s² = log(1 + (exp(v) − 1) Σ π_j²) with π the tail's softmax; v where it is
one class, 0 where it is many. So the chosen outputs are integrated under V − c 11ᵀ beside *one*
further output, and the cost does not depend on C.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from laplace_debiased.likelihoods.integrals import (
    PIVOTED_UP_TO,
    POINTS,
    mutual_information,
    pivoted_root,
)
from laplace_debiased.likelihoods.links import bridge_of_sums, monte_carlo, probit


@dataclass(frozen=True, eq=False)
class ChosenMoments:
    """Means of all outputs, and the covariance of some.

    Attributes:
        mean: μ [..., C].
        covariance: V [..., K, K] of the chosen outputs, or their variances [..., K] where they are
            independent, or no more is needed.
        chosen: which outputs these are [..., K], K < C.
    """

    mean: Tensor
    covariance: Tensor
    chosen: Tensor

    @property
    def _is_diagonal(self) -> bool:
        return self.covariance.shape == self.chosen.shape

    @property
    def variances(self) -> Tensor:
        """Of the chosen outputs [..., K]."""
        return self.covariance if self._is_diagonal else self.covariance.diagonal(dim1=-2, dim2=-1)

    def shared(self) -> Tensor:
        """Mean covariance c [...] of two chosen outputs."""
        k = self.chosen.shape[-1]
        if self._is_diagonal or k == 1:
            return self.covariance.new_zeros(self.chosen.shape[:-1])
        off = self.covariance.sum((-2, -1)) - self.variances.sum(-1)
        return off / (k * (k - 1))

    def probit(self) -> Tensor:
        """Probabilities [..., C] by the probit approximation, the tail at its mean variance."""
        beyond = self.variances.mean(-1, keepdim=True).expand_as(self.mean)
        return probit(self.mean, beyond.scatter(-1, self.chosen, self.variances))

    def monte_carlo(
        self, n_samples: int | None = None, generator: torch.Generator | None = None
    ) -> Tensor:
        """Mean probabilities [..., C]; arguments as in :func:`links.monte_carlo`."""
        mean, root, beyond, _ = self._with_tail()
        p = monte_carlo(mean, None, n_samples, generator, root=root)
        tail = p[..., -1:] * torch.softmax(beyond, dim=-1)
        return tail.scatter(-1, self.chosen, p[..., :-1])

    def mutual_information(self) -> Tensor:
        """What the label would tell about the outputs [...], in nats: see ``links``.

        Within the tail, classes of lognormal weights tell E Σ π log(π / E π) = v/2, of which the
        tail's sum tells s²/2.
        """
        mean, root, _, within = self._with_tail()
        p = monte_carlo(mean, None, POINTS, root=root)[..., -1]
        return mutual_information(mean, None, root=root) + p * within.clamp_min(0.0)

    def _with_tail(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Means and a root of chosen outputs and the tail's sum; the tail's means; (v − s²)/2."""
        shared = self.shared()
        own = (self.variances.mean(-1) - shared).clamp_min(0.0)
        beyond = self.mean.scatter(-1, self.chosen, -torch.inf)
        concentration = torch.softmax(beyond, dim=-1).square().sum(-1)
        # Where exp(v) overflows, s² is v itself but for a constant.
        spread = torch.log1p(own.clamp_max(80.0).expm1() * concentration)
        spread = spread + (own - 80.0).clamp_min(0)
        lifted = beyond.logsumexp(-1) + (own - spread) / 2
        mean = torch.cat([self.mean.gather(-1, self.chosen), lifted.unsqueeze(-1)], dim=-1)
        root = torch.nn.functional.pad(self._root(shared), (0, 1, 0, 1))
        k = self.chosen.shape[-1]
        tail = torch.nn.functional.pad(spread.sqrt()[..., None, None], (k, 0, k, 0))
        return mean, root + tail, beyond, (own - spread) / 2

    def _root(self, shared: Tensor) -> Tensor:
        """Root [..., K, K] of V − c 11ᵀ, its negative eigenvalues set to zero."""
        if self._is_diagonal:
            return torch.diag_embed(self.covariance.clamp_min(0.0).sqrt())
        rest = self.covariance - shared[..., None, None]
        values, vectors = torch.linalg.eigh(rest)
        root = (vectors * values.clamp_min(0.0).sqrt().unsqueeze(-2)).flip(-1)
        k = self.chosen.shape[-1]
        if k > PIVOTED_UP_TO:
            return root
        # The signs of eigenvectors are a library's choice; a pivoted factor has none.
        return pivoted_root((root @ root.mT).reshape(-1, k, k)).reshape(root.shape)

    def bridge(self, *, normalise: bool = False) -> Tensor:
        """Probabilities [..., C] by the Laplace bridge; the [C, C] covariance is never formed."""
        n_outputs, k = self.mean.shape[-1], self.chosen.shape[-1]
        # A negative c of so many outputs is no covariance.
        shared = self.shared().clamp_min(0.0).unsqueeze(-1)
        variance = self.variances.mean(-1, keepdim=True)
        beyond = (n_outputs - 1) * shared + variance
        sums = beyond.expand_as(self.mean).scatter(
            -1, self.chosen, self.covariance.sum(-1) + (n_outputs - k) * shared
        )
        variances = variance.expand_as(self.mean).scatter(-1, self.chosen, self.variances)
        return bridge_of_sums(self.mean, sums, variances, normalise=normalise)
