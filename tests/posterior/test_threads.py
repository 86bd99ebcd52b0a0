"""Eight threads at once get what one thread gets, whatever their gradient modes."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from laplace_debiased import DebiasedLaplace
from laplace_debiased.network.locks import locks_of, model_lock
from laplace_debiased.network.modes import evaluation_mode, math_attention
from tests.posterior.cases import INPUTS, STRUCTURES, fitted, loader, network
from tests.untouched import untouched

MODES = [nullcontext, torch.no_grad, torch.inference_mode, torch.enable_grad]
THREADS = 8


def at_once(task: Callable[[int], Any], n: int = 24) -> list[Any]:
    """Results of n tasks on eight threads that start together."""
    barrier = threading.Barrier(THREADS)

    def run(number: int) -> Any:
        if number < THREADS:
            barrier.wait(timeout=60)
        return task(number)

    with ThreadPoolExecutor(THREADS) as pool:
        return list(pool.map(run, range(n)))


def prediction(la: Any, number: int) -> list[Tensor]:
    """The prediction of one request: its own rows, gradient mode, kind and draws."""
    x = INPUTS[number % 5 :: 3]
    generator = torch.Generator().manual_seed(number)
    with MODES[number % len(MODES)]():
        match number % 3:
            case 0:
                result = la(x)
            case 1:
                result = la(x, pred_type="nn", n_samples=4, generator=generator)
            case _:
                result = la(x, link_approx="mc", n_samples=4, generator=generator)
        assert torch.is_inference_mode_enabled() is (MODES[number % 4] is torch.inference_mode)
    return list(result) if isinstance(result, tuple) else [result]


def assert_same_results(las: list[Any], n: int = 24) -> None:
    expected = [prediction(las[number % len(las)], number) for number in range(n)]
    found = at_once(lambda number: prediction(las[number % len(las)], number), n)
    for one, other in zip(found, expected, strict=True):
        for a, b in zip(one, other, strict=True):
            assert torch.equal(a, b)


@pytest.mark.parametrize("structure", STRUCTURES)
@pytest.mark.parametrize("training", [False, True])
def test_threads_get_what_one_thread_gets(structure: str, training: bool) -> None:
    model = network().train(training)
    la = fitted(structure, model)
    with untouched(model):
        assert_same_results([la])


def test_posteriors_of_one_model_share_it() -> None:
    model = network().train()
    las = [fitted("kron", model), fitted("lowrank", model), fitted("kron", model, n=12)]
    with untouched(model):
        assert_same_results(las)


class Wrapper(nn.Module):
    def __init__(self, backbone: nn.Module, scale: float) -> None:
        super().__init__()
        self.backbone, self.scale = backbone, scale

    def forward(self, x: Tensor) -> Tensor:
        return self.scale * self.backbone(x)


def test_models_that_share_a_backbone_take_turns() -> None:
    """A network that normalises by the batch where its mode is not its own any more."""
    backbone = network().train()
    las = []
    for scale in (1.0, 2.0):
        la = DebiasedLaplace(Wrapper(backbone, scale))
        la.fit(loader())
        las.append(la)
    las.append(fitted("kron", backbone))
    with untouched(backbone):
        assert_same_results(las)


def test_regression_too() -> None:
    la = DebiasedLaplace(network(), "regression")
    la.fit([(INPUTS, INPUTS[:, :3])], n_data=30)
    assert_same_results([la])


class Slow(nn.Module):
    """Notices whether it is called while in training mode, or twice at a time."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.inside, self.overlaps = nn.Linear(4, 3).double(), 0, 0

    def forward(self, x: Tensor) -> Tensor:
        assert not self.training
        self.inside += 1
        self.overlaps += self.inside > 1
        time.sleep(0.002)
        self.inside -= 1
        return self.inner(x)


def test_calls_of_one_model_take_turns_and_of_two_do_not() -> None:
    model = Slow().train()
    la = DebiasedLaplace(model)
    la.fit(loader())
    at_once(lambda number: la(INPUTS[:2]), 16)
    assert model.overlaps == 0
    assert model.training
    first, second = locks_of(nn.Linear(1, 1)), locks_of(nn.Linear(1, 1))
    assert not set(first) & set(second)


def test_locks_cover_wrappers_parts_and_joint_models() -> None:
    a, b = nn.Linear(2, 2), nn.Linear(2, 2)
    one, two = locks_of(a), locks_of(b)
    joined = nn.Sequential(a, b)
    joint = locks_of(joined)
    assert set(joint) == set(one) | set(two)
    assert [id(lock) for lock in joint] == sorted(map(id, joint))
    whole = nn.Sequential(nn.Linear(2, 2), nn.Tanh())
    assert set(locks_of(whole)) == set(locks_of(whole[0]))
    entered = threading.Event()

    def enter() -> None:
        with evaluation_mode(a):
            entered.set()

    with model_lock(joined):
        thread = threading.Thread(target=enter)
        thread.start()
        assert not entered.wait(0.05)
    assert entered.wait(5)
    thread.join()


def test_attention_kernels_come_back_with_the_last_to_leave() -> None:
    first, second = math_attention(), math_attention()
    assert torch.backends.mha.get_fastpath_enabled()
    for enter in (first.__enter__, second.__enter__):
        enter()
        assert not torch.backends.mha.get_fastpath_enabled()
    first.__exit__(None, None, None)
    assert not torch.backends.mha.get_fastpath_enabled()
    second.__exit__(None, None, None)
    assert torch.backends.mha.get_fastpath_enabled()


def test_exception_in_one_thread_leaves_the_others_alone() -> None:
    model = network().train()
    la = fitted("kron", model)
    expected = la(INPUTS)

    def task(number: int) -> Tensor | None:
        if number % 2:
            with pytest.raises(RuntimeError):
                la(INPUTS[:, :3])
            return None
        return la(INPUTS)

    with untouched(model):
        for result in at_once(task):
            assert result is None or torch.equal(result, expected)
