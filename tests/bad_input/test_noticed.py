"""What is told by a warning, or works, where it was silent or failed in a stranger's hands."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from torch import nn

from laplace_debiased import DebiasedLaplace, directional_profile
from laplace_debiased.errors import MemoryExhaustedError, ModelCallError
from tests.bad_input.world import World, snapshot, world
from tests.untouched import equal


@pytest.fixture(scope="module")
def w() -> World:
    return world("classification")


def test_samples_that_two_batches_of_a_profile_share(w: World) -> None:
    with pytest.warns(UserWarning, match="3 of the 6 samples of other_batch"):
        directional_profile(
            w.model, "classification", (w.x[:6], w.y[:6]), (w.x[3:9], w.y[3:9]), k=2
        )


def test_a_prior_under_which_rounding_hides_the_curvature(
    w: World, recwarn: pytest.WarningsRecorder
) -> None:
    la = copy.deepcopy(w.la)
    la(w.x)
    assert not recwarn
    la.prior_precision = 1e-20
    with pytest.warns(UserWarning, match="so small a prior precision torch.float32 rounds away"):
        la(w.x)


def test_more_function_samples_than_memory_holds(w: World) -> None:
    before = snapshot(w.la)
    with pytest.raises(MemoryExhaustedError):
        w.la.functional_samples(w.x, n_samples=10**14)
    assert equal(snapshot(w.la), before)


def test_a_loss_of_the_mean_alone() -> None:
    regression = world("regression")
    regression.la.optimize_prior_precision(
        val_loader=regression.loader(), loss=nn.MSELoss(), grid_size=3
    )
    expected = (regression.model(regression.x) - regression.y).square().mean()
    losses = torch.tensor(regression.la.tuning_result.losses)
    torch.testing.assert_close(losses, expected.detach().expand_as(losses), check_dtype=False)


def test_a_file_for_a_model_that_was_cast(w: World, tmp_path: Path) -> None:
    for options in ({}, {"hessian_structure": "lowrank"}, {"subset_of_weights": "last_layer"}):
        la = w.posterior(**options)
        la.fit(w.loader())
        la.save(tmp_path / "posterior.pt")
        wide = copy.deepcopy(w.model).double()
        read = DebiasedLaplace.load(tmp_path / "posterior.pt", wide, check_weights=False)
        found = read(w.x.double())
        assert found.dtype is torch.float64
        torch.testing.assert_close(found, la(w.x).double(), rtol=1e-4, atol=1e-5)


def test_a_training_set_larger_than_what_the_loader_has(w: World) -> None:
    la = w.posterior(subset_of_weights="last_layer", hessian_structure="lowrank")
    la.fit(w.loader(), n_data=10**9)
    assert la.fitted.n_samples == len(w.x)


def test_bags_that_come_as_tokens_and_offsets(w: World) -> None:
    class Bags(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.bags, self.head = nn.EmbeddingBag(9, 4), nn.Linear(4, 3)

        def forward(
            self, tokens: torch.Tensor, offsets: torch.Tensor | None = None
        ) -> torch.Tensor:
            return self.head(self.bags(tokens, offsets))

    la = w.posterior(Bags())
    la.fit([(torch.arange(12).reshape(3, 4) % 9, w.y[:3])], n_data=3)
    with pytest.raises(ModelCallError, match=r"EmbeddingBag.*padding_idx"):
        la((torch.arange(8), torch.tensor([0, 4])))
