"""What a training loader gives to a fit, looked up once."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from laplace_debiased.checks import checked_integer
from laplace_debiased.data.loaders import check_loader, loader_length, sampler_indices


@dataclass(frozen=True, eq=False)
class Supply:
    """A loader with the budget that is drawn from what is behind it.

    Attributes:
        loader: The training loader.
        n_data: N, size of the training set.
        budget: Samples m to draw; None for everything that one walk yields.
        pool: Dataset indices that the budget is drawn from, ascending; None without a budget.
            [M] int64
        n_excluded: How many samples were taken out of the pool.
    """

    loader: Any
    n_data: int
    budget: int | None = None
    pool: Tensor | None = None
    n_excluded: int = 0

    @classmethod
    def of(
        cls,
        loader: Any,
        *,
        n_samples: int | None = None,
        n_data: int | None = None,
        n_folds: int = 1,
    ) -> Supply:
        """Look a loader up.

        Args:
            loader: The training loader.
            n_samples: Budget m in all folds together; None for everything.
            n_data: N where it is not ``len(loader.dataset)``.
            n_folds: Folds that the budget is split into.

        Raises:
            TypeError: A number is no int, or the loader cannot be walked.
            ValueError: N is unknown, not n_folds <= m <= N, or the sampler does not tell its
                indices.
        """
        check_loader(loader, "loader")
        if n_samples is None:
            return cls(loader, loader_length(loader, n_data))
        budget = checked_integer("n_samples", n_samples)
        n = loader_length(loader, n_data)
        if budget > n:
            raise ValueError(
                f"n_samples={budget} exceeds the size of the training set ({n}): lower it, or pass "
                "n_samples=None for everything."
            )
        if budget < n_folds:
            raise ValueError(f"n_samples={budget} is too few for {n_folds} folds of at least one.")
        return cls(loader, n, budget, sampler_indices(loader))._checked()

    def without(self, indices: frozenset[int]) -> Supply:
        """The same supply with samples taken out of its pool.

        Raises:
            ValueError: There is no budget, or the rest is smaller than it.
        """
        if not indices:
            return self
        if self.pool is None:
            raise ValueError("exclude needs a budget: pass n_samples.")
        kept = self.pool[~torch.isin(self.pool, torch.tensor(sorted(indices)))]
        return replace(self, pool=kept, n_excluded=len(indices))._checked()

    def _checked(self) -> Supply:
        assert self.pool is not None
        assert self.budget is not None
        if self.budget > len(self.pool):
            excluded = f" after {self.n_excluded} excluded ones" if self.n_excluded else ""
            raise ValueError(
                f"n_samples={self.budget} exceeds the {len(self.pool)} samples that the loader's "
                f"sampler can give{excluded}: lower n_samples."
            )
        return self

    @property
    def is_share(self) -> bool:
        """Whether the budget leaves anything out; if not, every sample is taken once."""
        return self.pool is not None and self.budget is not None and self.budget < len(self.pool)

    @property
    def population(self) -> int:
        """Size of what draws from the pool stand for: N without the samples that were excluded."""
        pool_size = 0 if self.pool is None else len(self.pool)
        return max(pool_size, self.n_data - self.n_excluded)
