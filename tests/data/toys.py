"""Datasets whose samples say which they are."""

from __future__ import annotations

import random
from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset, IterableDataset

from laplace_debiased.checks import checked_integer
from laplace_debiased.data.build import Supply, plan_from_supply
from laplace_debiased.data.plan import CurvaturePlan
from laplace_debiased.data.pool import plan_by_curvature
from laplace_debiased.data.sources import Batch
from laplace_debiased.network.rng import RngState


class Numbers(Dataset):
    """Sample i is (i, i); with noise, its input is augmented from all three generators."""

    def __init__(self, n: int, noisy: bool = False) -> None:
        self.n, self.noisy = n, noisy

    def __len__(self) -> int:
        return self.n

    def __getitem__(self, i: int) -> tuple[Tensor, Tensor]:
        if not -self.n <= i < self.n:
            raise IndexError(i)
        i = int(i) % self.n
        noise = torch.rand(3) + np.random.rand() + random.random() if self.noisy else torch.zeros(3)
        return i + noise, torch.tensor(i)


class NumberStream(IterableDataset):
    """The samples of ``Numbers`` without indices, optionally in another order each time."""

    def __init__(self, n: int, restless: bool = False) -> None:
        self.n, self.restless = n, np.random.default_rng(0) if restless else None

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        order = np.arange(self.n) if self.restless is None else self.restless.permutation(self.n)
        return ((torch.full((3,), float(i)), torch.tensor(i)) for i in order)


def plan_from_loader(
    loader, *, folds, n_samples=None, n_data=None, fractions=None, exclude=frozenset(), **options
):
    supply = Supply.of(loader, n_samples=n_samples, n_data=n_data, n_folds=folds, **options)
    supply = supply.without(exclude) if exclude else supply
    return plan_from_supply(supply, fractions or (1 / folds,) * folds)


def plan_from_pool(
    loader, score, *, folds, n_samples, n_data=None, seed=0, exclude=frozenset(), **options
):
    budget = checked_integer("n_samples", n_samples)
    supply = Supply.of(loader, n_samples=budget, n_data=n_data, n_folds=folds, seed=seed)
    return plan_by_curvature(supply.without(exclude), score, (1 / folds,) * folds, **options)


def walk(plan: CurvaturePlan) -> list[Batch]:
    return list(plan.batches())


def targets_by_fold(plan: CurvaturePlan) -> list[list[int]]:
    """Targets of each fold in the order of one walk, each repeated by its count."""
    found: list[list[int]] = [[] for _ in plan.fold_sizes]
    for batch in plan.batches():
        for y, k, count in zip(batch.targets, batch.folds, batch.counts, strict=True):
            found[int(k)] += [int(y)] * int(count)
    return found


def flat(folds: list[list[int]]) -> list[int]:
    return [y for fold in folds for y in fold]


def same_walk(one: list[Batch], other: list[Batch]) -> bool:
    """Whether two walks gave the same tensors in the same order, to the bit."""
    names = ("inputs", "targets", "folds", "counts", "weights")
    return len(one) == len(other) and all(
        torch.equal(getattr(a, name), getattr(b, name))
        for a, b in zip(one, other, strict=True)
        for name in names
    )


def peek() -> tuple[float, float, float]:
    """Next draw of each global generator, left where it was."""
    state = RngState.capture()
    values = torch.rand(()).item(), float(np.random.rand()), random.random()
    state.restore()
    return values
