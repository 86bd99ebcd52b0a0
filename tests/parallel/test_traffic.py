"""What a fit moves between processes does not grow with its samples."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from functools import wraps
from typing import Any

import pytest
import torch
import torch.distributed
from torch.distributed import distributed_c10d
from torch.utils.data import DataLoader, TensorDataset

from laplace_debiased import DebiasedLaplace
from tests.parallel.cases import network
from tests.parallel.crowd import run

N = 600
SIZES = 64, 256
PLAN_BYTES = 48
"""Of a sample in the plan that rank 0 draws: index, fold, count, weight, and a list of indices."""


def counting() -> Counter[str]:
    """Bytes and calls of every collective of this process from now on."""
    seen: Counter[str] = Counter()

    def counted(function: Callable[..., Any], name: str, position: int) -> Callable[..., Any]:
        @wraps(function)
        def call(*args: Any, **kwargs: Any) -> Any:
            seen[name] += args[position].nbytes
            seen[f"calls of {name}"] += 1
            return function(*args, **kwargs)

        return call

    for name, position in (("all_reduce", 0), ("broadcast", 0), ("all_gather", 1)):
        function = counted(getattr(distributed_c10d, name), name, position)
        for module in (torch.distributed, distributed_c10d):
            setattr(module, name, function)
    return seen


def traffic(rank: int, sampling: str) -> list[dict[str, int]]:
    """What this rank hands over in a fit of every size."""
    inputs = torch.linspace(-2, 2, N * 36, dtype=torch.float64).mul(11).sin().reshape(N, 36)
    loader = DataLoader(TensorDataset(inputs, torch.arange(N) % 3), batch_size=16)
    seen, found = counting(), []
    for n_samples in SIZES:
        la = DebiasedLaplace(network("images"), sampling=sampling)
        seen.clear()
        la.fit(loader, n_samples=n_samples)
        found.append(dict(seen))
    return found


@pytest.mark.parametrize("sampling", ["uniform", "curvature"])
def test_sums_are_as_large_whatever_the_budget(sampling: str) -> None:
    for few, many in run(2, traffic, sampling):
        assert few["all_reduce"] == many["all_reduce"] > 0
        for name in ("all_reduce", "broadcast", "all_gather"):
            assert few[f"calls of {name}"] == many[f"calls of {name}"]
        # The plan is told to all ranks, a few numbers for every sample.
        others = [one["broadcast"] + one["all_gather"] for one in (few, many)]
        assert others[1] - others[0] <= PLAN_BYTES * (SIZES[1] - SIZES[0])
