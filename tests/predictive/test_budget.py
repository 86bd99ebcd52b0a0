"""Memory follows the byte budget where there are many classes."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.data import DataLoader, TensorDataset
from torch.utils.weak import WeakIdKeyDictionary

from laplace_debiased import DebiasedLaplace
from laplace_debiased.predictive import OutputSelection

MIB = 2**20


def network() -> nn.Module:
    """About 49,000 recorded outputs per sample: 6 MiB with 32 columns."""
    return nn.Sequential(
        nn.Conv2d(3, 16, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(16, 16, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(16, 16, 3, padding=1),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(16, 100),
    )


class Peak(TorchDispatchMode):
    """The most bytes that live at a time of what operations made inside."""

    def __init__(self) -> None:
        super().__init__()
        self.live, self.most = 0, 0
        self._known: WeakIdKeyDictionary = WeakIdKeyDictionary()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        found = func(*args, **(kwargs or {}))
        for value in found if isinstance(found, tuple | list) else (found,):
            if isinstance(value, Tensor):
                self._add(value.untyped_storage())
        return found

    def _add(self, storage: torch.UntypedStorage) -> None:
        if storage not in self._known:
            size = storage.nbytes()
            self._known[storage] = size
            self.live += size
            self.most = max(self.most, self.live)
            weakref.finalize(storage, self._remove, size)

    def _remove(self, size: int) -> None:
        self.live -= size


def added_bytes(call: Callable[[], Any]) -> int:
    """What a call takes at its peak beyond what was there before."""
    with Peak() as peak:
        call()
    return peak.most


def test_fits_sweeps_and_predictions_stay_in_the_budget() -> None:
    """8 MiB against no limit, which takes ten times as much for predictions."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model, x, y = network(), torch.randn(16, 3, 32, 32), torch.randint(100, (16,))
    loader = DataLoader(TensorDataset(x, y), batch_size=16)
    peaks = {}
    for budget in (8 * MIB, 4096 * MIB):
        la = DebiasedLaplace(model, byte_budget=budget, prior_precision=100.0)
        peaks["fit", budget] = added_bytes(partial(la.fit, loader, n_samples=None))
        peaks["prediction", budget] = added_bytes(partial(la, x))
        arguments = x, la._H_factor, torch.logspace(0, 4, 3), OutputSelection(32)
        peaks["sweep", budget] = added_bytes(
            partial(la.predictor.sweep, *arguments, diagonal=False)
        )
    for step in ("fit", "prediction", "sweep"):
        assert peaks[step, 8 * MIB] < 20 * MIB, peaks
    assert peaks["prediction", 4096 * MIB] > 100 * MIB, peaks
