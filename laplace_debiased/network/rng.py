"""Keep the user's random number generators as they were.

A loader that shuffles or augments, and a Fisher that samples labels, all draw from global
generators. Inside these guards they draw from a seed of ours; outside nothing has moved.
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
import torch

from laplace_debiased.checks import generator_seed
from laplace_debiased.network.interrupts import unbroken

T = TypeVar("T")


@dataclass(frozen=True)
class RngState:
    """A snapshot of every global generator (torch, numpy's legacy one, ``random``), and of others.

    Attributes:
        cuda: one state per device; None where CUDA was not initialised.
        extra: generators that are not global (a loader's ``generator=``) with their states.
    """

    cpu: torch.Tensor
    cuda: tuple[torch.Tensor, ...] | None
    numpy: dict[str, Any] | tuple[Any, ...]
    python: tuple[Any, ...]
    extra: tuple[tuple[torch.Generator, torch.Tensor], ...] = ()

    @classmethod
    def capture(cls, generators: Iterable[torch.Generator] = ()) -> RngState:
        """Read the present state of all global generators, and of ``generators``."""
        initialised = torch.cuda.is_initialized()
        return cls(
            cpu=torch.get_rng_state(),
            cuda=tuple(torch.cuda.get_rng_state_all()) if initialised else None,
            numpy=np.random.get_state(),
            python=random.getstate(),
            extra=tuple((generator, generator.get_state()) for generator in generators),
        )

    def restore(self) -> None:
        """Put every generator back to this state."""
        torch.set_rng_state(self.cpu)
        if self.cuda is not None:
            torch.cuda.set_rng_state_all(self.cuda)
        elif torch.cuda.is_initialized():
            # Initialised since the snapshot: its first state is the one that its own seed gives.
            for generator in torch.cuda.default_generators:
                generator.manual_seed(generator.initial_seed())
        np.random.set_state(self.numpy)
        random.setstate(self.python)
        for generator, state in self.extra:
            generator.set_state(state)


def derived_seed(seed: int, *purpose: str | int) -> int:
    """Seed of a stream of its own for ``purpose``, in [0, 2^63): equal inputs give equal seeds."""
    text = repr((int(seed), *purpose)).encode()
    return int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "big") >> 1


def _seed_all(seed: int, generators: Iterable[torch.Generator]) -> None:
    # torch.manual_seed would queue the seed for a CUDA that is not initialised yet, and so
    # outlive the guard; the generators are seeded one by one instead.
    torch.default_generator.manual_seed(seed)
    if torch.cuda.is_initialized():
        for generator in torch.cuda.default_generators:
            generator.manual_seed(seed)
    np.random.seed(seed % 2**32)
    random.seed(seed)
    for generator in generators:
        generator.manual_seed(seed)


@unbroken
def preserved_rng(
    seed: int | None = None, *, generators: Iterable[torch.Generator] = ()
) -> Iterator[None]:
    """Restore all random number generators on exit, also when an exception passes through.

    Guards torch's CPU generator, its CUDA generators (where CUDA is initialised), numpy's global
    generator, ``random``, and the ``generators`` given (a loader's). Not safe across threads, as
    the generators are global. ``seed`` is for all of them in the block; None leaves them as is.

    Raises:
        TypeError: ``seed`` is not an integer.
        ValueError: ``seed`` lies outside -2**63..2**64 - 1.
    """
    generators = tuple(generators)
    state = RngState.capture(generators)
    try:
        if seed is not None:
            _seed_all(generator_seed(seed), generators)
        yield
    finally:
        state.restore()


def guarded_iter(
    make: Callable[[], Iterable[T]],
    seed: int,
    *,
    generators: Iterable[torch.Generator] = (),
) -> Iterator[T]:
    """Iterate over ``make()`` on a random stream of its own, which begins at ``seed``.

    Between two items the caller's generators are in place; the stream of the iteration goes on
    where it stopped. So the items do not depend on what the caller draws, nor the caller's draws
    on the items, and an early stop or an exception leaves nothing behind.
    """
    generators = tuple(generators)
    iterator: Iterator[T] | None = None
    own: RngState | None = None
    while True:
        with preserved_rng(seed if own is None else None, generators=generators):
            if own is not None:
                own.restore()
            if iterator is None:
                iterator = iter(make())
            try:
                item = next(iterator)
            except StopIteration:
                return
            own = RngState.capture(generators)
        yield item


@unbroken
def undrawn_on_failure(generator: torch.Generator | None, device: torch.device) -> Iterator[None]:
    """Where an exception passes through, what was drawn inside has not been drawn."""
    source = generator
    if source is None:
        on_gpu = device.type == "cuda"
        source = (
            torch.cuda.default_generators[device.index or 0]
            if on_gpu
            else (torch.default_generator)
        )
    before = source.get_state()
    try:
        yield
    except BaseException:
        source.set_state(before)
        raise
