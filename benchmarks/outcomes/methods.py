"""Ways to predict: fitted once on training samples, chosen on one half of the test images."""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from laplace import KronLLLaplace
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset

from benchmarks.outcomes.problems import Problem
from laplace_debiased import DebiasedLaplace
from laplace_debiased.calibration.comparing import ways_to_predict
from laplace_debiased.posterior.predicting import informed_probabilities

Answer = Any
"""Probabilities [m, C], or a pair of them and the mutual information [m]."""

Predict = Callable[[Tensor], dict[str, Answer]]
"""From a batch of inputs to answers by the name of the row."""

SAMPLES = 256
OURS = "all weights: the five lines"
BASELINES = {
    "map": "MAP",
    "temperature": "temperature scaling",
    "prior_only": "prior only (no curvature)",
    "last_layer": "last layer",
    "posterior": OURS,
}


@dataclass(frozen=True, eq=False)
class Method:
    """One fit that gives one or more rows.

    Attributes:
        name: of its row, or of the last of its rows.
        fit: fits on a problem's training samples.
        choose: from the fit and validation inputs and labels to what predicts, and settings that
            were chosen.
    """

    name: str
    fit: Callable[[Problem], Any]
    choose: Callable[[Any, DataLoader], tuple[Predict, dict[str, float]]]


def _five_lines(problem: Problem) -> Any:
    la = DebiasedLaplace(problem.model)
    la.fit(problem.train, n_samples=min(SAMPLES, len(problem.train.dataset)), n_data=problem.n_data)  # type: ignore[arg-type]
    return la


def _choose_with_baselines(la: Any, validation: DataLoader) -> tuple[Predict, dict[str, float]]:
    la.optimize_prior_precision(method="gridsearch", val_loader=validation)
    ways = ways_to_predict(la, validation)
    chosen = {"prior": float(la.prior_precision), "prior only": ways.prior}

    def predict(x: Tensor) -> dict[str, Answer]:
        return {BASELINES[key]: answer for key, answer in ways.answers(x).items()}

    return predict, chosen


def _ours(name: str, samples: int = SAMPLES, **options: Any) -> Method:
    def fit(problem: Problem) -> Any:
        la = DebiasedLaplace(problem.model, **options)
        budget = min(samples, len(problem.train.dataset))  # type: ignore[arg-type]
        la.fit(problem.train, n_samples=budget, n_data=problem.n_data)
        return la

    def choose(la: Any, validation: DataLoader) -> tuple[Predict, dict[str, float]]:
        la.optimize_prior_precision(val_loader=validation)
        # Tuned anew for the other half before it is asked again.
        prior, link = la.prior_precision.clone(), la.tuned_link_approx

        def predict(x: Tensor) -> dict[str, Answer]:
            la.prior_precision, la.tuned_link_approx = prior, link
            return {name: informed_probabilities(la, x)}

        return predict, {"prior": float(prior)}

    return Method(name, fit, choose)


def _host(problem: Problem) -> Any:
    la = KronLLLaplace(problem.model, "classification")
    la.fit(problem.train)
    la.optimize_prior_precision()  # its default: the marginal likelihood
    return la


def _choose_nothing(la: Any, validation: DataLoader) -> tuple[Predict, dict[str, float]]:
    return lambda x: {HOST.name: la(x).detach()}, {"prior": float(la.prior_precision)}


HOST = Method("laplace-torch's last layer, its defaults", _host, _choose_nothing)

METHODS = (
    Method(OURS, _five_lines, _choose_with_baselines),
    HOST,
    _ours("K-FAC, one batch", scheme="single", magnitudes="kfac"),
    _ours("two_batch, kfac (the paper)", scheme="two_batch", magnitudes="kfac"),
    _ours("low rank, 64 samples", samples=64, hessian_structure="lowrank"),
)


@dataclass(frozen=True, eq=False)
class Outcome:
    """Predictions of one method on all test images, each chosen for by the other half.

    Attributes:
        answers: by row, then by set ("outside" among them): answers batch by batch.
        labels: of the same test images, batch by batch.
        chosen: settings per half.
        seconds: of the fit, and of both choices.
    """

    answers: dict[str, dict[str, list[Answer]]]
    labels: list[Tensor]
    chosen: list[dict[str, float]]
    seconds: dict[str, float]


def run(method: Method, problem: Problem, batch: int, seed: int) -> Outcome:
    """Fit once, choose on either half of the test images, predict the other one."""
    start = time.perf_counter()
    fitted = method.fit(problem)
    seconds = {"fit": time.perf_counter() - start, "choice": 0.0}
    answers: dict[str, dict[str, list[Answer]]] = {}
    labels: list[Tensor] = []
    chosen: list[dict[str, float]] = []
    halves = problem.halves(seed)
    for validation, test in (halves, halves[::-1]):
        clean = problem.sets["clean"]
        loader = DataLoader(
            TensorDataset(clean[validation], problem.labels[validation]), batch_size=batch
        )
        start = time.perf_counter()
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "the best prior precision", UserWarning)
            predict, settings = method.choose(fitted, loader)
        seconds["choice"] += time.perf_counter() - start
        chosen.append(settings)
        labels += list(problem.labels[test].split(batch))
        for name, inputs in _inputs(problem, test):
            for part in inputs.split(batch):
                with torch.no_grad():
                    found = predict(part)
                for row, answer in found.items():
                    answers.setdefault(row, {}).setdefault(name, []).append(answer)
    return Outcome(answers, labels, chosen, seconds)


def _inputs(problem: Problem, test: Tensor) -> Iterator[tuple[str, Tensor]]:
    for name, inputs in problem.sets.items():
        yield name, inputs[test]
    share = test[test < len(problem.outside)]
    yield "outside", problem.outside[share]
