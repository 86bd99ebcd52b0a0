"""Estimated eigenvalues beside the full-data curvature along the same directions."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from laplace_debiased.demo.data import DigitSplits, Split, drawn_indices
from laplace_debiased.factory import DebiasedLaplace
from laplace_debiased.network.rng import derived_seed


@dataclass(frozen=True, eq=False)
class Spectrum:
    """Curvature along the Kronecker eigenvectors of batches B: per-sample means, [n_batches, P].

    Attributes:
        own_batch: measured on B itself, as ``scheme="single"`` does.
        other_batch: on a disjoint batch of the same size, ``scheme="two_batch"``.
        cross_fitted: from B's two halves, each measured along the other's directions and
            averaged at equal ranks, the default.
        full_data: on all training data, along the same directions.
        n_samples: size of B.

    In the null space of a factor of B the eigenvectors are not unique; there the four are matched
    as far as its total curvature goes, not direction by direction.
    """

    own_batch: Tensor
    other_batch: Tensor
    cross_fitted: Tensor
    full_data: Tensor
    n_samples: int

    def ranks(self) -> Tensor:
        """Rank of each direction by the curvature that its own batch reports, largest first."""
        return self.own_batch.argsort(dim=1, descending=True).argsort(dim=1)


def measure_spectrum(
    model: nn.Module, splits: DigitSplits, *, n_samples: int, n_batches: int, seed: int
) -> Spectrum:
    """Draw pairs of disjoint batches, and measure exact directional curvature (``"ggn"``).

    Raises:
        ValueError: if the training split does not hold two batches of ``n_samples``.
    """
    train = splits.train
    if 2 * n_samples > len(train):
        raise ValueError(
            f"n_samples={n_samples} must be at most {len(train) // 2}: two disjoint batches are "
            f"drawn from {len(train)} training samples."
        )
    parts = [
        _one_batch(model, train, n_samples, derived_seed(seed, "spectrum", index))
        for index in range(n_batches)
    ]
    own, other, cross_fitted, full = (torch.stack(part) for part in zip(*parts, strict=True))
    return Spectrum(own, other, cross_fitted, full, n_samples)


def _one_batch(model: nn.Module, train: Split, n_samples: int, seed: int) -> tuple[Tensor, ...]:
    """The four measurements along the eigenvectors of one drawn batch."""
    chosen = drawn_indices(train, n_samples, seed)
    batch = train.subset(chosen)
    rest = torch.ones(len(train), dtype=torch.bool)
    rest[chosen] = False
    unseen = train.subset(rest.nonzero().squeeze(-1))
    other = unseen.subset(drawn_indices(unseen, n_samples, seed))

    def curvatures(scheme: str, data: Split, **fit_options: Any) -> Tensor:
        la = DebiasedLaplace(model, scheme=scheme, magnitudes="ggn")
        la.fit(data.loader(), **fit_options)
        return torch.cat([block.per_direction().flatten() for block in la.H.blocks]) / la.n_data

    def held_out(data: Split) -> Tensor:
        return curvatures(
            "two_batch", batch, magnitude_loader=data.loader(), n_data=len(train), n_samples=None
        )

    return (
        curvatures("single", train, n_samples=n_samples, seed=seed),
        held_out(other),
        curvatures("cross_fit", train, n_samples=n_samples, seed=seed),
        held_out(train),
    )
