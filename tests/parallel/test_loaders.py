"""Loaders and networks as training loops leave them, and streams that every rank has its own of."""

from __future__ import annotations

import sys
from typing import Any

import pytest
import torch
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, DistributedSampler, IterableDataset, TensorDataset

from laplace_debiased.data.loaders import whole_loader
from tests.parallel.cases import INPUTS, LABELS, Case, N, loader, numbers
from tests.parallel.crowd import Failure, run

DATA = TensorDataset(INPUTS, LABELS)


class Stream(IterableDataset):
    """Batches of its own on every rank."""

    def __init__(self, batches: list[Any]) -> None:
        self.batches = batches

    def __iter__(self) -> Any:
        return iter(self.batches)


def share_of(rank: int, world: int) -> list[Any]:
    """Uneven shares of the batches, the last rank's empty: 4, 2, 0 of world 3."""
    batches = list(loader(4))
    if rank == world - 1 and world > 2:
        return []
    cut = 4
    return batches[:cut] if rank == 0 else batches[cut:]


def prepared(**kwargs: Any) -> Any:
    from accelerate import Accelerator

    return Accelerator(cpu=True).prepare(DataLoader(DATA, 5, **kwargs))


def attempts(rank: int, world: int, with_accelerate: bool) -> dict[str, Any]:
    """Fits from all kinds of loaders."""
    sampled = DistributedSampler(DATA, shuffle=True)
    loaders: dict[str, Any] = {
        "sampler": (DataLoader(DATA, 5, sampler=sampled), {"n_samples": None}),
        "sampler, a budget": (DataLoader(DATA, 5, sampler=sampled), {"n_samples": 17}),
        "streams": (share_of(rank, world), {"n_samples": None, "n_data": 40}),
        "own streams": (
            DataLoader(Stream(share_of(rank, world)), batch_size=None),
            {"n_samples": None, "n_data": 40},
        ),
        "one rank's stream": (
            list(loader(4)) if rank == world - 1 else [],
            {"n_samples": None, "n_data": 40},
        ),
    }
    if with_accelerate:
        loaders["prepared"] = prepared(), {"n_samples": None}
        loaders["prepared, shuffled"] = prepared(shuffle=True), {"n_samples": 17}
    found = {}
    for name, (data, arguments) in loaders.items():
        la = Case().posterior()
        la.fit(data, **arguments)
        found[name] = numbers(la)
    wrapped = DistributedDataParallel(Case().posterior()._target.model)
    la = type(Case().posterior())(wrapped)
    assert la.model is wrapped.module
    la.fit(loader(), n_samples=17)
    found["ddp"] = numbers(la)
    found["n_data"] = refused(lambda: Case().posterior().fit(share_of(rank, 2)))
    return found


def refused(call: Any) -> Any:
    try:
        return call()
    except ValueError as error:
        return Failure(error)


@pytest.mark.parametrize("world", [2, 3])
def test_every_sample_counts_once(world: int) -> None:
    """23 samples on 2 or 3 ranks: what pads repeats some."""
    with_accelerate = "accelerate" in sys.modules or _has_accelerate()
    budget, whole = Case().fitted(), Case(arguments={"n_samples": None}).fitted()
    stream = Case().posterior()
    stream.fit(list(loader(4)), n_samples=None, n_data=40)
    expected = {
        "sampler": whole,
        "sampler, a budget": budget,
        "streams": stream,
        "own streams": stream,
        "one rank's stream": stream,
        "prepared": whole,
        "prepared, shuffled": budget,
        "ddp": budget,
    }
    for theirs in run(world, attempts, world, with_accelerate):
        assert "pass n_data" in theirs.pop("n_data").message
        assert len(theirs) == (8 if with_accelerate else 6)
        for name, found in theirs.items():
            for what, value in numbers(expected[name]).items():
                torch.testing.assert_close(
                    found[what],
                    value,
                    rtol=1e-10,
                    atol=1e-10,
                    msg=lambda text, at=f"{what} of {name}": f"{at}: {text}",
                )


def _has_accelerate() -> bool:
    from importlib.util import find_spec

    return find_spec("accelerate") is not None


def test_distributed_sampler_is_read_whole_in_one_process_too() -> None:
    sampler = DistributedSampler(DATA, num_replicas=4, rank=1)
    whole = whole_loader(DataLoader(DATA, 5, sampler=sampler), "train_loader")
    assert [len(y) for _, y in whole] == [5, 5, 5, 5, 3]
    assert torch.cat([y for _, y in whole]).equal(LABELS)
    plain = loader()
    assert whole_loader(plain, "train_loader") is plain


def test_prepared_streams_are_refused() -> None:
    pytest.importorskip("accelerate")
    stream = DataLoader(Stream(list(range(N))), batch_size=2)
    from accelerate.data_loader import prepare_data_loader

    ready = prepare_data_loader(stream, num_processes=2, process_index=0, put_on_device=False)
    with pytest.raises(ValueError, match=r"train_loader is a stream that Accelerate prepared"):
        Case().posterior().fit(ready, n_data=N)


def cut_up(rank: int) -> str:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import distribute_module

    la = Case().posterior()
    mesh = init_device_mesh("cpu", (2,))
    distribute_module(la._target.model, mesh)
    for call in (lambda: la.fit(loader()), lambda: type(la)(la._target.model)):
        with pytest.raises(ValueError, match="cut up over processes") as caught:
            call()
    return str(caught.value)


def test_weights_that_are_cut_up_are_refused_with_the_remedy() -> None:
    for text in run(2, cut_up):
        assert "full_state_dict=True" in text
