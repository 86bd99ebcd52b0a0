"""The sample that a file holds belongs to nobody, and the network takes it."""

from __future__ import annotations

import copy
from collections import UserDict
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from laplace_debiased import DebiasedLaplace
from laplace_debiased.network.probe import Probe, _made_up

CPU, GPU = torch.device("cpu"), torch.device("cuda")


def rows(*shape: int) -> Tensor:
    generator = torch.Generator().manual_seed(3)
    return 5 + 2 * torch.randn(*shape, generator=generator)


def test_real_entries_are_like_those_of_the_batch_and_none_of_them() -> None:
    x = rows(16, 3, 20, 20)
    sample = _made_up(x, CPU)
    assert sample.shape == (1, 3, 20, 20)
    assert sample.dtype == x.dtype
    assert sample.untyped_storage().nbytes() == sample.numel() * 4, "the batch is not kept"
    # 1,200 entries: standard errors of .06 and .04
    assert abs(float(sample.mean()) - 5) < 0.3
    assert abs(float(sample.std()) - 2) < 0.2
    assert not bool(torch.isin(sample, x).any())
    assert float(torch.corrcoef(torch.stack([sample.flatten(), x[0].flatten()]))[0, 1]) < 0.15
    assert torch.equal(sample, _made_up(x, CPU))


def test_few_entries_leave_no_figure() -> None:
    assert torch.equal(_made_up(rows(1, 15), CPU), _made_up(100 * rows(1, 15), CPU))


def test_integers_are_their_smallest_and_flags_are_set() -> None:
    tokens = torch.tensor([[7, 3, 9], [4, 8, 5]])
    mask = torch.tensor([[1, 1, 0], [1, 1, 1]])
    made = _made_up(UserDict(tokens=tokens, mask=mask, on=mask.bool(), more=(None, [mask])), GPU)
    assert type(made) is dict
    assert type(made["more"]) is tuple
    assert made["more"][0] is None
    assert torch.equal(made["tokens"], torch.full((1, 3), 3))
    for flags in (made["mask"], made["on"], made["more"][1][0]):
        assert flags.shape == (1, 3)
        assert bool((flags == 1).all())
    assert made["on"].dtype is torch.bool


@pytest.mark.parametrize("other", ["a name", 3, object()])
def test_what_is_no_tensor_is_not_written_down(other: Any) -> None:
    assert _made_up((rows(4, 2), other), CPU) is None


def test_what_may_be_an_index_is_not_tried_on_a_gpu() -> None:
    categories = torch.cat([rows(5, 3), torch.arange(5.0)[:, None]], dim=1)
    for inputs in (categories, torch.tensor([[-1], [4]])):
        assert _made_up(inputs, GPU) is None
        assert _made_up(inputs, CPU) is not None
    assert _made_up(rows(5, 3), GPU) is not None


class Categories(nn.Module):
    """Reads its first column as an index."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.linear = nn.Embedding(2, 4), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(self.table(x[:, 0].long()) + x[:, 1:])


class Strict(nn.Module):
    """Has an error of its own for what it was not made for."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(5, 3)

    def forward(self, x: Tensor) -> Tensor:
        if bool((x < 0).any()):
            raise KeyboardInterruptOfTheUser
        return self.linear(x)


class KeyboardInterruptOfTheUser(Exception):  # noqa: N818
    """No kind of error that the library knows."""


class Logarithm(Strict):
    """Not finite for what it was not made for."""

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x.log())


@pytest.mark.parametrize("kind", [Categories, Strict, Logarithm])
def test_a_network_that_refuses_it_has_none_and_loads(kind: type[nn.Module]) -> None:
    torch.manual_seed(0)
    model = kind()
    # Normal entries of mean 40 and deviation 30: some are negative, and hardly one is 0 or 1.
    x = torch.cat([torch.tensor([[0.0], [1.0]] * 6), 10 * rows(12, 4).abs()], dim=1)
    x = x if kind is Categories else x.flip(1) + 0.01
    la: Any = DebiasedLaplace(model)
    la.fit(DataLoader(TensorDataset(x, torch.arange(12) % 3), batch_size=6))
    assert la.fitted.probe is not None
    assert la.fitted.probe.for_file is None
    state = la.state_dict()
    assert state["probe"] is None
    again: Any = DebiasedLaplace(copy.deepcopy(model))
    again.load_state_dict(state)
    assert torch.equal(again(x), la(x))


def test_a_file_holds_the_made_up_sample_alone_in_tensors_of_its_own() -> None:
    x, model = rows(12, 4), nn.Linear(4, 3)
    probe = Probe.of(model, x, may_mix=False)
    assert probe is not None
    assert probe.for_file is not None
    assert torch.equal(probe.inputs, x[:1])
    assert not bool(torch.isin(probe.for_file.inputs, x).any())
    la: Any = DebiasedLaplace(model)
    la.fit(DataLoader(TensorDataset(x, torch.arange(12) % 3), batch_size=6))
    state, kept = la.state_dict(), la.fitted.probe.for_file
    assert torch.equal(state["probe[0]"], kept.inputs)
    for tensor in (state["probe[0]"], state["probe[1]"]):
        tensor.zero_()
    assert bool(kept.inputs.any())
    assert bool(kept.outputs.any())


def test_out_of_memory_passes(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*_: Any) -> Tensor:
        raise torch.OutOfMemoryError

    monkeypatch.setattr("laplace_debiased.network.probe._outputs", fails)
    with pytest.raises(torch.OutOfMemoryError):
        Probe.drawn(nn.Linear(4, 3), rows(12, 4))
