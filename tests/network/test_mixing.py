"""Networks whose samples depend on each other, or on chance, whatever the batches."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from laplace_debiased.curvature import operation_coverage
from laplace_debiased.curvature.inspection import inspected
from laplace_debiased.factory import DebiasedLaplace
from tests.untouched import untouched

G = torch.Generator().manual_seed(0)
X, Y = torch.randn(24, 4, generator=G), torch.arange(24) % 3


class Centred(nn.Module):
    """Takes the batch's mean out, so that samples depend on each other."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.head = nn.Linear(4, 5), nn.Linear(5, 3)

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.first(x)
        return self.head(torch.tanh(hidden - 0.5 * hidden.mean(0, keepdim=True)))


class Named(Centred):
    def forward(self, x: Tensor, scale: Tensor) -> Tensor:  # type: ignore[override]
        return super().forward(x * scale)


class OneAtATime(nn.Module):
    """Takes no batch of two."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        (_,) = x
        return self.head(x)


def named(samples: list[tuple[Tensor, Tensor]]) -> dict[str, Tensor]:
    x, y = (torch.stack(parts) for parts in zip(*samples, strict=True))
    return {"x": x, "scale": torch.ones(len(x), 1), "labels": y}


@pytest.mark.parametrize("size", [1, 16])
@pytest.mark.parametrize("kind", [Centred, Named])
def test_samples_that_mix_are_found_at_any_batch_size(kind: type[Centred], size: int) -> None:
    loader = DataLoader(
        TensorDataset(X, Y), batch_size=size, collate_fn=named if kind is Named else None
    )
    model = kind()
    la = DebiasedLaplace(model)
    with untouched(model):
        la.fit(loader, n_samples=None)
    assert set(la.coverage.gaps) == {"first.weight", "first.bias"}
    low_rank = DebiasedLaplace(model, hessian_structure="lowrank")
    with untouched(model), pytest.raises(ValueError, match="when another joins its batch"):
        low_rank.fit(loader, n_samples=None)


class Crowded(Centred):
    """Mixes samples where there are more than two."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) if len(x) > 2 else self.head(torch.tanh(self.first(x)))


class Scaled(Centred):
    """Scales by the largest entry of a batch, which may well be another sample's."""

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.first(x)
        return self.head(hidden / hidden.detach().abs().max())


@pytest.mark.parametrize("options", [{}, {"hessian_structure": "lowrank"}])
@pytest.mark.parametrize("kind", [Crowded, Scaled])
def test_samples_that_mix_in_larger_batches_only(kind: type[Centred], options: Any) -> None:
    model = kind()
    la = DebiasedLaplace(model, **options)
    mixes = "mixes the samples of a batch|when another joins its batch"
    with untouched(model), pytest.raises(ValueError, match=mixes):
        la.fit(DataLoader(TensorDataset(X, Y), batch_size=8))


def test_a_backbone_that_mixes_samples_is_found_for_a_last_layer() -> None:
    la = DebiasedLaplace(Centred(), subset_of_weights="last_layer")
    with pytest.raises(ValueError, match="mixes the samples of a batch"):
        la.fit(DataLoader(TensorDataset(X, Y), batch_size=8))


@pytest.mark.parametrize("structure", ["kron", "lowrank"])
def test_a_network_of_one_sample_at_a_time_is_still_taken(structure: str) -> None:
    la = DebiasedLaplace(OneAtATime(), hessian_structure=structure)
    la.fit(DataLoader(TensorDataset(X, Y)), n_samples=None)
    assert la.coverage.gaps == {}


class Noisy(OneAtATime):
    """Adds noise in evaluation too."""

    def forward(self, x: Tensor) -> Tensor:
        return self.head(nn.functional.dropout(x))


@pytest.mark.parametrize("structure", ["kron", "lowrank"])
def test_a_network_that_is_stochastic_in_evaluation_is_refused(structure: str) -> None:
    model = Noisy()
    la = DebiasedLaplace(model, hessian_structure=structure)
    with untouched(model), pytest.raises(ValueError, match=r"stochastic.*self\.training"):
        la.fit(DataLoader(TensorDataset(X, Y), batch_size=8))


class SortedByLength(nn.Module):
    """Computes with its samples in the order of a key, and gives the outputs back in theirs."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.head = nn.Linear(4, 5), nn.Linear(5, 3)

    def forward(self, x: Tensor) -> Tensor:
        order = x[:, 0].argsort(descending=True)
        hidden = torch.tanh(self.first(x[order]))
        return self.head(hidden[order.argsort()])


@pytest.mark.parametrize("descending", [True, False])
def test_layers_that_read_a_sorted_batch_are_left_out_whatever_the_order(descending: bool) -> None:
    order = X[:, 0].argsort(descending=descending)
    la = DebiasedLaplace(SortedByLength())
    la.fit([(X[order], Y[order])], n_samples=None, n_data=24)
    assert la.coverage.covered == ("head.weight", "head.bias")
    assert "first dimension is not the batch" in la.coverage.excluded["first.weight"]
    together = la(X)
    alone = torch.cat([la(x[None]) for x in X])
    assert torch.allclose(together, alone, atol=1e-5)


class SortedOnly(nn.Module):
    """Takes batches in descending order of a key, as packed sequences may be."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.head = nn.Linear(4, 5), nn.Linear(5, 3)

    def forward(self, x: Tensor) -> Tensor:
        if bool((x[:, 0].diff() > 0).any()):
            raise RuntimeError("sorted batches only")
        return self.head(torch.tanh(self.first(x)))


def test_a_network_that_takes_sorted_batches_only_is_covered() -> None:
    order = X[:, 0].argsort(descending=True)
    la = DebiasedLaplace(SortedOnly(), scheme="single", strict=True)
    la.fit([(X[order], Y[order])], n_samples=None, n_data=24)
    assert len(la.coverage.covered) == 4


def test_many_outputs_in_half_precision_do_not_overflow_in_the_look_at_the_order() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 16), nn.ReLU(), nn.Linear(16, 70_000)).half()
    assert not inspected(model, operation_coverage(model), X.half()).excluded
