"""The calls that are interrupted, and all that must be as it was afterwards."""

from __future__ import annotations

import os
import tempfile
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from laplace_debiased import (
    DebiasedLaplace,
    directional_profile,
    evaluate,
    fit_temperature,
)
from laplace_debiased.diagnostics import kfac_profile
from laplace_debiased.network import interrupts
from laplace_debiased.network.locks import locks_of
from laplace_debiased.optim import MiniBatches, NewtonCG, debiased_cg, model_quadratic
from tests.untouched import equal, world_of

N = 24


class World:
    """A network in training mode, posteriors of every kind, and one network that is optimised."""

    def __init__(self) -> None:
        torch.manual_seed(0)
        self.x, self.y = torch.randn(N, 4), torch.randint(3, (N,))
        self.model = nn.Sequential(
            nn.Linear(4, 5), nn.BatchNorm1d(5), nn.Tanh(), nn.Dropout(0.2), nn.Linear(5, 3)
        )
        self.model(self.x)
        self.model[0].bias.requires_grad_(False)
        self.model.train()[3].eval()
        self.loader = DataLoader(TensorDataset(self.x, self.y), batch_size=8, shuffle=True)
        self.posteriors = {name: self.posterior(name) for name in ("kron", "last", "lowrank")}
        for la in self.posteriors.values():
            la.fit(self.loader, n_samples=16)
        self.moving = nn.Sequential(nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, 3)).train()
        self.newton = NewtonCG(self.moving.parameters(), self.moving, nn.CrossEntropyLoss())
        self.folder = tempfile.mkdtemp()
        self.path = os.path.join(self.folder, "posterior.pt")
        self.posteriors["kron"].save(self.path)

    def posterior(self, name: str) -> Any:
        """A new posterior of a kind."""
        subset = "last_layer" if name == "last" else "all"
        structure = "lowrank" if name == "lowrank" else "kron"
        options = {"rank": 4} if structure == "lowrank" else {}
        return DebiasedLaplace(self.model, "classification", subset, structure, **options)

    def halves(self) -> tuple[Any, Any]:
        """Two batches."""
        half = N // 2
        return (self.x[:half], self.y[:half]), (self.x[half:], self.y[half:])

    def quadratics(self) -> list[Any]:
        """Of the two batches."""
        loss = nn.CrossEntropyLoss()
        return [model_quadratic(self.moving, loss, [batch], damping=0.1) for batch in self.halves()]


def calls(w: World) -> dict[str, Callable[[], Any]]:
    """Every entry point on a world, by name."""
    kron, last, low = (w.posteriors[name] for name in ("kron", "last", "lowrank"))
    own, other = w.halves()
    seeds = iter(range(10**9))
    found: dict[str, Callable[[], Any]] = {
        "save": lambda: kron.save(w.path),
        "load": lambda: DebiasedLaplace.load(w.path, w.model),
        "evaluate": lambda: evaluate(kron, w.loader),
        "fit_temperature": lambda: fit_temperature(w.model, w.loader),
        "directional_profile": lambda: directional_profile(
            w.model, "classification", own, other, w.loader, k=3
        ),
        "kfac_profile": lambda: kfac_profile(w.model, "classification", own, other, n_bands=3),
        "debiased_cg": lambda: debiased_cg(*w.quadratics()),
        "NewtonCG.step": lambda: w.newton.step(lambda: MiniBatches(own, other)),
        "marginal likelihood": lambda: kron.log_marginal_likelihood(),
        "marglik": lambda: kron.optimize_prior_precision(method="marglik", n_steps=3),
        "adding to a fit": lambda: kron.fit(w.loader, override=False, n_samples=4),
        "two loaders": lambda: low.fit(w.loader, magnitude_loader=w.loader, n_data=N),
    }
    for name, la in (("kron", kron), ("last", last), ("lowrank", low)):
        found |= {
            f"{name}: construct": lambda name=name: w.posterior(name),
            f"{name}: fit": lambda la=la: la.fit(w.loader, n_samples=16, seed=next(seeds) % 2),
            f"{name}: glm": lambda la=la: la(w.x),
            f"{name}: nn": lambda la=la: la(w.x, pred_type="nn", n_samples=5),
            f"{name}: functional samples": lambda la=la: la.functional_samples(w.x, n_samples=3),
            f"{name}: sample": lambda la=la: la.sample(3),
            f"{name}: state": lambda la=la: la.load_state_dict(la.state_dict()),
            f"{name}: grid search": lambda la=la: la.optimize_prior_precision(
                val_loader=w.loader, grid_size=5
            ),
        }
    found["kron: grid search of networks"] = lambda: kron.optimize_prior_precision(
        val_loader=w.loader, grid_size=2, pred_type="nn", n_samples=2
    )
    return found


MADE_ANEW = ("_prepared", "_predictor", "params")
"""Attributes of a posterior that follow from the others and the model."""


class Record:
    """All that a call may not leave half-way."""

    def __init__(self, w: World) -> None:
        self.world = world_of(w.model)
        self.held = {name: _held(la) for name, la in w.posteriors.items()}
        self.bits = {name: [la.mean.clone(), *_bits(la)] for name, la in w.posteriors.items()}
        self.moving = [parameter.detach().clone() for parameter in w.moving.parameters()]
        self.steps = w.newton.param_groups[0]["n_steps"]

    def differences(self, other: Record) -> list[str]:
        """Names of what differs."""
        names = [name for name in self.world if not equal(self.world[name], other.world[name])]
        for name, held in self.held.items():
            now = other.held[name]
            changed = [key for key in now if now[key] is not held.get(key)]
            if changed or not equal(self.bits[name], other.bits[name]):
                names.append(name)
        if not equal(self.moving, other.moving):
            names.append("optimised" if other.steps == self.steps + 1 else "half a step")
        return names


def _held(la: Any) -> dict[str, Any]:
    return {name: value for name, value in vars(la).items() if name not in MADE_ANEW}


def _bits(la: Any) -> list[Tensor]:
    return [la.prior_precision.clone(), la.prior_mean.clone(), la.sigma_noise.clone()]


def whole(la: Any) -> bool:
    """Whether the parts of a posterior belong to one fit and one tuning."""
    fit = la._fit
    parts = (
        la.n_data == fit.n_data,
        la.loss == fit.mean_loss * fit.n_data,
        la.coverage is fit.coverage,
        list(map(id, la.params)) == list(map(id, la._target.parameters(fit.coverage))),
        la._watch.reference is fit.model,
        (la.tuning_result is None) == (la.tuned_link_approx is None),
    )
    return all(parts) and bool(torch.isfinite(la.log_marginal_likelihood()))


@contextmanager
def nothing_left_behind(w: World) -> Iterator[None]:
    """Check guards and locks after the block."""
    yield
    state = interrupts._STATE
    assert (state.open, state.held, state.pending) == (0, 0, False)
    assert not any(mode.inside for mode in torch.overrides._get_current_function_mode_stack())
    assert torch.is_grad_enabled()
    for model in (w.model, w.moving):
        taken: list[bool] = []
        thread = threading.Thread(target=_try_locks, args=(locks_of(model), taken))
        thread.start()
        thread.join()
        assert all(taken), "a lock is held"


def _try_locks(locks: Any, taken: list[bool]) -> None:
    for lock in locks:
        taken.append(lock.acquire(blocking=False))
        if taken[-1]:
            lock.release()
