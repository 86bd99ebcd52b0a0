"""Random state is guarded: inside a seed of ours, outside nothing moved."""

import random

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader, RandomSampler

from laplace_debiased.network.rng import RngState, derived_seed, guarded_iter, preserved_rng


def draw() -> tuple[float, float, float]:
    return torch.rand(()).item(), float(np.random.rand()), random.random()


def peek() -> tuple[float, float, float]:
    state = RngState.capture()
    values = draw()
    state.restore()
    return values


def test_global_generators_are_restored_after_draws():
    before = peek()
    with preserved_rng():
        draw()
    assert peek() == before


def test_global_generators_are_restored_when_an_exception_passes():
    before = peek()

    def fail() -> None:
        with preserved_rng(3):
            draw()
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail()
    assert peek() == before


def test_seed_decides_the_draws_inside():
    with preserved_rng(3):
        first = draw()
    with preserved_rng(3):
        again = draw()
    with preserved_rng(4):
        other = draw()
    assert first == again
    assert all(a != b for a, b in zip(first, other, strict=True))


def test_no_seed_goes_on_from_the_callers_state():
    expected = peek()
    with preserved_rng():
        assert draw() == expected


def test_further_generators_are_seeded_and_restored():
    generator = torch.Generator().manual_seed(99)
    before = generator.get_state()
    with preserved_rng(3, generators=[generator]):
        torch.rand(5, generator=generator)
    assert torch.equal(generator.get_state(), before)


@pytest.mark.skipif(torch.cuda.is_available(), reason="the queue is emptied at once with CUDA")
def test_no_seed_is_queued_for_a_cuda_that_is_not_initialised():
    def queued() -> list[int]:
        return [id(call) for call in torch.cuda._lazy_seed_tracker.get_calls() if call]

    torch.manual_seed(torch.initial_seed())
    before = queued()
    with preserved_rng(3):
        pass
    assert queued() == before


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
def test_cuda_generators_are_seeded_and_restored():
    torch.cuda.init()
    before = torch.cuda.get_rng_state_all()
    with preserved_rng(3):
        first = torch.rand(4, device="cuda")
    with preserved_rng(3):
        again = torch.rand(4, device="cuda")
    assert torch.equal(first, again)
    assert all(map(torch.equal, before, torch.cuda.get_rng_state_all()))


def test_derived_seeds_differ_by_purpose_and_fit_every_generator():
    seeds = {derived_seed(s, p) for s in (-1, 0, 1, 2**70) for p in ("walk", "draw", 0, 1)}
    assert len(seeds) == 16
    assert all(0 <= s < 2**63 for s in seeds)


def test_guarded_items_do_not_depend_on_the_consumers_draws():
    def make():
        return (draw() for _ in range(4))

    quiet = list(guarded_iter(make, 5))
    noisy = []
    for item in guarded_iter(make, 5):
        noisy.append(item)
        draw()
        torch.manual_seed(0)
    assert quiet == noisy


def test_consumers_draws_do_not_depend_on_guarded_items():
    with preserved_rng(11):
        expected = [draw() for _ in range(3)]
    with preserved_rng(11):
        assert [draw() for _ in guarded_iter(lambda: (draw() for _ in range(3)), 5)] == expected


def test_early_stop_and_exception_leave_the_state_alone():
    def broken():
        draw()
        yield 1
        draw()
        raise KeyError("half-way")

    before = peek()
    for _ in guarded_iter(broken, 5):
        break
    assert peek() == before
    with pytest.raises(KeyError, match="half-way"):
        list(guarded_iter(broken, 5))
    assert peek() == before


def test_shuffled_loader_repeats_under_a_seed_and_its_own_generator_is_untouched():
    data = torch.arange(20)
    own = torch.Generator().manual_seed(1)
    loader = DataLoader(data, batch_size=5, sampler=RandomSampler(data, generator=own))
    before = own.get_state()
    first, again = (
        torch.cat(list(guarded_iter(lambda: loader, 7, generators=[own]))) for _ in range(2)
    )
    assert torch.equal(first, again)
    assert torch.equal(own.get_state(), before)
