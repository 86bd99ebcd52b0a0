"""What takes more than a minute says so early, once, with what would make it cheap."""

from __future__ import annotations

import itertools
import warnings

import pytest
import torch
from torch.utils.data import DataLoader, TensorDataset

from laplace_debiased import DebiasedLaplace
from laplace_debiased.network import forecast
from laplace_debiased.network.forecast import Forecast, spoken
from tests.zoo import mlp


@pytest.fixture
def slow(monkeypatch) -> None:
    """A clock that moves on by five seconds whenever it is read."""
    ticks = itertools.count(0, 5)
    monkeypatch.setattr(forecast, "now", lambda: float(next(ticks)))


def fitted(n_classes: int, **options: object):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model, x = mlp(n_classes), torch.randn(24, 4)
    data = TensorDataset(x, torch.arange(24) % n_classes)
    la = DebiasedLaplace(model, sampling="uniform", byte_budget=1, **options)
    return la, DataLoader(data, batch_size=6), x


def said(call) -> list[str]:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        call()
    return [str(w.message) for w in caught if "will take about" in str(w.message)]


def test_the_estimate_is_that_of_all_the_work(monkeypatch) -> None:
    clock = [0.0]
    monkeypatch.setattr(forecast, "now", lambda: clock[0])
    work = Forecast("this", 100, "Do less.")
    work.begin()
    clock[0] = 1.0
    assert not said(lambda: work.done(1))  # too early to tell
    clock[0] = 6.0
    assert said(lambda: work.done(4)) == ["this will take about 2 minutes. Do less."]
    clock[0] = 50.0
    assert not said(lambda: work.done(1))


def test_short_work_is_silent(monkeypatch) -> None:
    clock = [0.0]
    monkeypatch.setattr(forecast, "now", lambda: clock[0])
    work = Forecast("this", 10, "Do less.")
    work.begin()
    for _ in range(10):
        clock[0] += 5.9
        assert not said(lambda: work.done(1))


def test_durations_are_spoken() -> None:
    assert [spoken(s) for s in (61, 480, 9000)] == ["61 seconds", "8 minutes", "2.5 hours"]


@pytest.mark.parametrize(
    ("n_classes", "columns", "advice"), [(9, None, "columns=2"), (70, "auto", "n_samples")]
)
def test_a_long_fit_says_what_makes_it_cheap(slow, n_classes, columns, advice) -> None:
    la, loader, _ = fitted(n_classes, columns=columns)
    (message,) = said(lambda: la.fit(loader, n_samples=None))
    assert message.startswith("this fit will take about")
    assert advice in message


@pytest.mark.parametrize(("n_outputs", "advice"), [(None, "n_outputs=32"), (16, "last_layer")])
def test_a_long_prediction_says_once_what_makes_it_cheap(slow, n_outputs, advice) -> None:
    la, loader, x = fitted(70, n_outputs=n_outputs)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        la.fit(loader, n_samples=None)
    (message,) = said(lambda: la(x, link_approx="probit"))
    assert message.startswith("moments of 24 samples will take about")
    assert advice in message
    assert not said(lambda: la(x, link_approx="probit"))


def test_what_takes_a_moment_says_nothing() -> None:
    la, loader, x = fitted(70)
    assert not said(lambda: (la.fit(loader, n_samples=None), la(x)))
