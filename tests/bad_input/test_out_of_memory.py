"""Memory that runs out at any operation of any call: told with its remedy, and nothing is lost."""

from __future__ import annotations

import copy
import random
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from laplace_debiased import compare, directional_profile, evaluate, fit_temperature
from laplace_debiased.diagnostics import kfac_profile, top_eigenpairs
from laplace_debiased.errors import MemoryExhaustedError
from laplace_debiased.optim import MiniBatches, NewtonCG
from tests.bad_input.world import World, snapshot, world
from tests.untouched import equal, untouched

FAILURES = (
    torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."),
    RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 8 bytes."),
    MemoryError(),
)
MOMENTS = 6
"""Per call, at which memory runs out."""


class Exhausted(TorchDispatchMode):
    """Runs out of memory once, at a given operation; counts them."""

    def __init__(self, at: int = 0, failure: Exception | None = None) -> None:
        super().__init__()
        self.at, self.failure, self.n = at, failure, 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.n += 1
        if self.n == self.at and self.failure is not None:
            raise self.failure
        return func(*args, **(kwargs or {}))


def calls_on(w: World) -> dict[str, Callable[[], Any]]:
    """Calls whose arguments are made already.

    None of a Hessian: the scripts in its products do not hand on an exception of Python's.
    """
    own, other = (w.x[:6], w.y[:6]), (w.x[6:], w.y[6:])
    problem = w.model, "classification", own, other
    state, loader = w.la.state_dict(), w.loader()
    prior, batches = torch.tensor(2.0), MiniBatches(own, other)
    newton = NewtonCG(w.model.parameters(), w.model, nn.CrossEntropyLoss())
    return {
        "fit": lambda: w.la.fit(loader),
        "fit more": lambda: w.la.fit(loader, override=False),
        "glm": lambda: w.la(w.x),
        "nn": lambda: w.la(w.x, pred_type="nn", n_samples=4),
        "sample": lambda: w.la.sample(3),
        "functions": lambda: w.la.functional_samples(w.x, n_samples=4),
        "predictive": lambda: w.la.predictive_samples(w.x, n_samples=4),
        "grid search": lambda: w.la.optimize_prior_precision(val_loader=loader),
        "marglik": lambda: w.la.optimize_prior_precision(method="marglik", n_steps=3),
        "evidence": lambda: w.la.log_marginal_likelihood(prior),
        "state": lambda: w.la.state_dict(),
        "load": lambda: w.la.load_state_dict(state),
        "evaluate": lambda: evaluate(w.la, loader),
        "compare": lambda: compare(w.la, loader, loader, progress_bar=False),
        "temperature": lambda: fit_temperature(w.model, loader),
        "profile": lambda: directional_profile(*problem, k=2),
        "kfac profile": lambda: kfac_profile(*problem),
        "eigenpairs": lambda: top_eigenpairs(*problem[:3], k=2),
        "newton": lambda: newton.step(lambda: batches),
    }


@pytest.fixture(scope="module")
def fitted() -> World:
    return world("classification")


NAMES = list(calls_on(world("classification")))


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", NAMES)
def test_memory_that_runs_out_is_told_with_its_remedy_and_nothing_is_lost(
    name: str, fitted: World
) -> None:
    for first in (calls_on(copy.deepcopy(fitted)), calls_on(copy.deepcopy(fitted))):
        with Exhausted() as counting:  # the second time, with caches filled
            first[name]()
    rng = random.Random(name)
    for failure in FAILURES * (MOMENTS // len(FAILURES)):
        w, at = copy.deepcopy(fitted), rng.randint(1, counting.n)
        call, before = calls_on(w)[name], snapshot(w.la)
        with (
            untouched(w.model),
            pytest.raises(MemoryExhaustedError, match="byte_budget") as caught,
            Exhausted(at, failure),
        ):
            call()
        assert caught.value.__cause__ is failure
        assert equal(snapshot(w.la), before), at
