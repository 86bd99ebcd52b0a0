"""Memory follows the byte budget where there are many classes."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.data import DataLoader, TensorDataset
from torch.utils.weak import WeakIdKeyDictionary

from laplace_debiased import DebiasedLaplace
from laplace_debiased.network import inputs
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


@pytest.mark.parametrize("subset", ["all", "last_layer"])
def test_moments_of_a_whole_grid_stay_in_the_budget(subset: str) -> None:
    """All outputs at every prior are .06 MB a sample: a few at a time by 1 MiB, 32 without a limit.

    Labels that do not count fill whole parts, and change nothing.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 24)).double()
        x, y = torch.randn(32, 4).double(), torch.randint(24, (32,))
    y[3:10] = -100
    loader, train = (DataLoader(TensorDataset(x, y.clamp_min(low)), 32) for low in (-100, 0))
    peaks: dict[int, int] = {}
    found: dict[int, Tensor] = {}
    for budget in (MIB, 4096 * MIB):
        options: dict[str, Any] = {"byte_budget": budget, "n_outputs": None, "ignore_index": -100}
        la = DebiasedLaplace(model, "classification", subset, **options)
        la.fit(train, n_samples=None)
        peaks[budget] = added_bytes(
            partial(
                la.optimize_prior_precision,
                val_loader=loader,
                link_approx="mc",
                n_samples=4,
                log_prior_prec_min=-1,
                log_prior_prec_max=2,
                grid_size=6,
                refine=False,
            )
        )
        found[budget] = torch.tensor([*la.tuning_result.losses, la.tuning_result.map_loss])
    torch.testing.assert_close(*found.values(), rtol=1e-10, atol=0.0)
    assert peaks[MIB] < 1.2 * MIB, peaks
    assert peaks[4096 * MIB] > 3 * MIB, peaks


@pytest.mark.parametrize("subset", ["all", "last_layer"])
def test_a_forward_pass_in_pieces_gives_the_same(
    subset: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Seven samples, two at a time; the network sees no more than two together."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Flatten(), nn.Linear(12, 5), nn.Tanh(), nn.Linear(5, 3)).double()
        x, y = torch.randn(7, 3, 4).double(), torch.randint(3, (7,))
    la = DebiasedLaplace(model, "classification", subset)
    la.fit(DataLoader(TensorDataset(x, y), 7), n_samples=None)
    outputs, probabilities = la.predictor.outputs(x), la(x)
    monkeypatch.setattr(inputs, "_PIECE_BYTES", 2 * x[0].nbytes)
    lengths: list[int] = []
    model[0].register_forward_hook(lambda _, given, __: lengths.append(len(given[0])))
    torch.testing.assert_close(la.predictor.outputs(x), outputs, rtol=1e-12, atol=0.0)
    assert lengths == [2, 2, 2, 1]
    torch.testing.assert_close(la(x), probabilities, rtol=1e-12, atol=0.0)
