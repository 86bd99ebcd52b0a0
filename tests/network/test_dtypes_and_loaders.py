"""Precisions, automatic casts, and loaders of every kind."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, IterableDataset, TensorDataset

from laplace_debiased.calibration import evaluate
from laplace_debiased.factory import DebiasedLaplace
from tests.tolerances import assert_same, relative_error
from tests.untouched import untouched
from tests.zoo import Problem, problem

POSTERIORS = [(s, h) for s in ("all", "last_layer") for h in ("kron", "lowrank")]
P = problem("mlp", dtype=torch.float32)


def fitted(p: Problem, subset: str = "all", structure: str = "kron", **fit: Any) -> Any:
    la = DebiasedLaplace(p.model, "classification", subset, structure)
    la.fit(fit.pop("loader", p.loader()), **fit)
    return la


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("subset", "structure"), POSTERIORS)
def test_any_precision_keeps_factors_of_single_precision_or_better(
    subset: str, structure: str, dtype: torch.dtype
) -> None:
    p = problem("mlp", dtype=torch.float32)
    exact = fitted(p, subset, structure)
    model = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)).to(dtype)
    model.load_state_dict(p.model.state_dict())
    q = Problem(model, p.x.to(dtype), p.y, p.likelihood)
    with untouched(q.model):
        la = fitted(q, subset, structure)
        probs = la(q.x)
    wide = torch.float64 if dtype is torch.float64 else torch.float32
    assert la.mean.dtype == wide
    assert float(la.log_marginal_likelihood()) == pytest.approx(
        float(exact.log_marginal_likelihood()), rel=2e-2
    )
    tolerance = {torch.float64: 1e-5, torch.float16: 5e-3, torch.bfloat16: 4e-2}[dtype]
    assert probs.dtype is dtype  # as a prediction of the model itself
    assert relative_error(probs.to(wide), exact(p.x)) < tolerance


@pytest.mark.parametrize("cast", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("subset", "structure"), POSTERIORS)
def test_automatic_casts_around_change_nothing(
    subset: str, structure: str, cast: torch.dtype
) -> None:
    expected = fitted(P, subset, structure)
    with torch.autocast("cpu", dtype=cast):
        la = fitted(P, subset, structure)
        probs = la(P.x)
        g = torch.Generator().manual_seed(0)
        sampled = la(P.x, pred_type="nn", link_approx="mc", n_samples=3, generator=g)
        la.optimize_prior_precision(val_loader=P.loader(), grid_size=3)
        assert torch.is_autocast_enabled("cpu")
    assert probs.dtype is sampled.dtype is torch.float32
    assert torch.equal(probs, expected(P.x))
    g = torch.Generator().manual_seed(0)
    assert_same(sampled, expected(P.x, pred_type="nn", link_approx="mc", n_samples=3, generator=g))
    expected.optimize_prior_precision(val_loader=P.loader(), grid_size=3)
    assert torch.equal(la.prior_precision, expected.prior_precision)


@pytest.mark.parametrize(("subset", "structure"), POSTERIORS)
def test_inference_tensors_from_a_loader_are_taken(subset: str, structure: str) -> None:
    with torch.inference_mode():
        inferred = [(x.clone(), y.clone()) for x, y in P.loader()]
        la = fitted(P, subset, structure, loader=inferred, n_data=26)
        probs = la(inferred[0][0])
    expected = fitted(P, subset, structure, loader=list(P.loader()), n_data=26)
    assert torch.equal(probs, expected(P.x[:5]))


class Stream(IterableDataset):
    """Samples in order, without a length."""

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        info = torch.utils.data.get_worker_info()
        step, start = (1, 0) if info is None else (info.num_workers, info.id)
        yield from zip(P.x[start::step], P.y[start::step], strict=True)


class Batches:
    """An iterable of batches that is no DataLoader."""

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        return iter(P.loader())


LOADERS = {
    "stream": lambda: DataLoader(Stream(), batch_size=5),
    "stream with workers": lambda: DataLoader(Stream(), batch_size=5, num_workers=2),
    "list of batches": lambda: list(P.loader()),
    "iterable": Batches,
    "pinned": lambda: DataLoader(TensorDataset(P.x, P.y), batch_size=5, pin_memory=True),
    "workers": lambda: DataLoader(TensorDataset(P.x, P.y), batch_size=5, num_workers=2),
    "persistent workers": lambda: DataLoader(
        TensorDataset(P.x, P.y), batch_size=5, num_workers=1, persistent_workers=True
    ),
    "samples, not batches": lambda: DataLoader(
        [(P.x[i : i + 5], P.y[i : i + 5]) for i in range(0, 26, 5)], batch_size=None
    ),
    "shuffled": lambda: DataLoader(TensorDataset(P.x, P.y), batch_size=5, shuffle=True),
}


@pytest.mark.filterwarnings("ignore:.*pin_memory.*")
@pytest.mark.parametrize("name", LOADERS)
def test_loaders_of_every_kind_give_the_same_curvature(name: str) -> None:
    loader = LOADERS[name]()
    la = DebiasedLaplace(P.model, scheme="single")
    with untouched(P.model):
        la.fit(loader, n_data=26)
    expected = DebiasedLaplace(P.model, scheme="single")
    expected.fit(P.loader())
    assert_same(la.H.to_matrix(), expected.H.to_matrix())
    assert la.n_data == 26


@pytest.mark.parametrize("name", ["stream", "list of batches", "iterable"])
def test_a_loader_without_a_length_needs_n_data(name: str) -> None:
    with pytest.raises(ValueError, match="pass n_data"):
        DebiasedLaplace(P.model).fit(LOADERS[name]())


@pytest.mark.parametrize("structure", ["kron", "lowrank"])
def test_a_model_in_channels_last_fits_predicts_and_loads_as_any_other(structure: str) -> None:
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(12, 3, 6, 6, generator=generator)
    labels = torch.randint(0, 3, (12,), generator=generator)
    loader = DataLoader(TensorDataset(images, labels), batch_size=4)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        layers = nn.Conv2d(3, 4, 3, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(144, 3)
    models = nn.Sequential(*layers), copy.deepcopy(nn.Sequential(*layers))
    plain, last = (DebiasedLaplace(model, hessian_structure=structure) for model in models)
    plain.fit(loader)
    last.model.to(memory_format=torch.channels_last)
    last.fit(loader)
    torch.testing.assert_close(last(images), plain(images))
    torch.testing.assert_close(last.mean, plain.mean)
    again = DebiasedLaplace(last.model, hessian_structure=structure)
    again.load_state_dict(last.state_dict())
    torch.testing.assert_close(again(images), plain(images))


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int16])
@pytest.mark.parametrize(("subset", "structure"), POSTERIORS)
def test_labels_of_any_integer_type_are_fitted_tuned_and_scored(
    subset: str, structure: str, dtype: torch.dtype
) -> None:
    def tuned(p: Problem, **tuning: Any) -> Any:
        la = fitted(p, subset, structure, n_samples=16)
        la.optimize_prior_precision(val_loader=p.loader(), grid_size=3, **tuning)
        return la

    def nll(probs: Tensor, y: Tensor) -> Tensor:
        return -probs.gather(1, y[:, None]).log().mean()

    narrow = Problem(P.model, P.x, P.y.to(dtype), P.likelihood)
    la, expected = tuned(narrow), tuned(P)
    assert torch.equal(la(P.x), expected(P.x))
    assert evaluate(la, narrow.loader()) == evaluate(expected, P.loader())
    own = tuned(narrow, loss=nll).tuning_result.losses
    assert own == pytest.approx(tuned(P, loss=nll).tuning_result.losses)
    options = {"pred_type": "nn", "n_samples": 2}
    assert tuned(narrow, **options).tuning_result == tuned(P, **options).tuning_result
