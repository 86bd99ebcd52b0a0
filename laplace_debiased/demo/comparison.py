"""The demo's rows: every method fitted, tuned and scored by the same procedure."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from laplace_debiased.calibration import Evaluation, evaluate, fit_temperature
from laplace_debiased.demo.data import DigitSplits, Split, drawn_indices
from laplace_debiased.demo.posteriors import HostPosterior, Jacobians, OurPosterior, Posterior
from laplace_debiased.demo.results import Comparison, References, Row, Scores
from laplace_debiased.network.rng import derived_seed


def compare(
    model: nn.Module,
    splits: DigitSplits,
    *,
    n_samples: int,
    n_draws: int,
    seed: int,
    progress_bar: bool,
) -> Comparison:
    """Fit, tune and score every method; those that draw ``n_samples`` do so ``n_draws`` times.

    Tuning sees the validation split alone. laplace-torch leaves an attribute ``output_size`` on the
    network; nothing else of it is changed.
    """
    budget = _Budget(model, splits.train, n_samples, Jacobians.of(model))
    seeds = [derived_seed(seed, "draw", index) for index in range(n_draws)]
    methods = _methods(budget)
    total = 2 + sum(n_draws if method.drawn else 1 for method in methods)
    with tqdm(total=total, desc="posteriors", disable=not progress_bar) as progress:
        exact, dense = _timed(budget.exact, seed), _timed(budget.dense, seed)
        references = References.of(exact[0], dense[0], splits)
        rows = _baselines(model, splits, references)
        for method in methods:
            scores = []
            for draw_seed in seeds if method.drawn else seeds[:1]:
                progress.set_postfix_str(method.name)
                scores.append(_score(*_timed(method.fit, draw_seed), splits, references))
                progress.update()
            rows.append(Row(method.key, method.name, tuple(scores)))
        reference_rows = []
        for key, name, fitted in (
            ("reference", "Kronecker, exact magnitudes", exact),
            ("reference_dense", "dense GGN", dense),
        ):
            progress.set_postfix_str(name)
            scored = (_score(*fitted, splits, references),)
            reference_rows.append(Row(key, f"{name}, all {budget.n_data}", scored))
            progress.update()
    return Comparison(
        rows=tuple(rows),
        references=tuple(reference_rows),
        tuned_prior=references.tuned_prior,
        n_samples=n_samples,
        n_data=budget.n_data,
        n_params=sum(parameter.numel() for parameter in model.parameters()),
    )


@dataclass(frozen=True, eq=False)
class _Method:
    """A posterior to compare: names, whether it draws a budget, and its fit by seed."""

    key: str
    name: str
    drawn: bool
    fit: Callable[[int], Posterior]


def _methods(budget: _Budget) -> list[_Method]:
    m = budget.n_samples
    host_all = f"laplace-torch, all {budget.n_data}"
    return [
        _Method("laplace_all", host_all, False, budget.host_all),
        _Method("laplace", f"laplace-torch, {m}", True, budget.host),
        _Method("laplace_rescaled", f"laplace-torch, {m}, scaled to N", True, budget.host_rescaled),
        _Method("ours_single", f"ours, {m}, single + ggn (biased)", True, budget.ours_single),
        _Method(
            "ours_paper", f"ours, {m}, two_batch + kfac (paper)", True, budget.ours_as_in_paper
        ),
        _Method("ours_uniform", f"ours, {m}, uniform sampling", True, budget.ours_uniform),
        _Method("ours", f"ours, {m}, default", True, budget.ours),
    ]


@dataclass(frozen=True, eq=False)
class _Budget:
    """How each method is fitted, given the seed of its draw."""

    model: nn.Module
    train: Split
    n_samples: int
    jacobians: Jacobians

    @property
    def n_data(self) -> int:
        return len(self.train)

    def host_all(self, seed: int) -> Posterior:
        return HostPosterior.fit_kron(self.model, self.train, self.jacobians)

    def host(self, seed: int) -> HostPosterior:
        batch = self.train.subset(drawn_indices(self.train, self.n_samples, seed))
        return HostPosterior.fit_kron(self.model, batch, self.jacobians)

    def host_rescaled(self, seed: int) -> Posterior:
        return self.host(seed).rescaled(self.n_data)

    def ours_as_in_paper(self, seed: int) -> Posterior:
        return self._ours(seed, scheme="two_batch", magnitudes="kfac")

    def ours_single(self, seed: int) -> Posterior:
        return self._ours(seed, scheme="single", magnitudes="ggn")

    def ours(self, seed: int) -> Posterior:
        return self._ours(seed)

    def ours_uniform(self, seed: int) -> Posterior:
        return self._ours(seed, sampling="uniform")

    def _ours(self, seed: int, **options: Any) -> Posterior:
        return OurPosterior.fit(self.model, self.train, self.n_samples, seed, **options)

    def exact(self, seed: int) -> Posterior:
        options = {"scheme": "single", "magnitudes": "ggn"}
        return OurPosterior.fit(self.model, self.train, None, seed, **options)

    def dense(self, seed: int) -> Posterior:
        return HostPosterior.fit_dense(self.model, self.train, self.jacobians)


def _timed(fit: Callable[[int], Posterior], seed: int) -> tuple[Posterior, float]:
    start = time.perf_counter()
    posterior = fit(seed)
    return posterior, time.perf_counter() - start


def _score(
    posterior: Posterior, fit_seconds: float, splits: DigitSplits, references: References
) -> Scores:
    """Tune on the validation split, then predict everything else."""
    start = time.perf_counter()
    prior = posterior.tuned_prior(splits.validation)
    clean = posterior.predict(splits.test, prior)
    seconds = fit_seconds + time.perf_counter() - start
    return Scores(
        evaluations=_evaluations(clean, lambda s: posterior.repredict(s, prior), splits),
        distances=references.distances(lambda p: posterior.repredict(splits.test, p)),
        prior_precision=prior,
        seconds=seconds,
    )


def _baselines(model: nn.Module, splits: DigitSplits, references: References) -> list[Row]:
    """The network itself, and temperature scaling on the validation split."""

    def scored(key: str, name: str, calibrate: Callable[[], float]) -> Row:
        start = time.perf_counter()
        temperature = calibrate()

        def predict(split: Split) -> Tensor:
            with torch.no_grad():
                return torch.softmax(model(split.inputs) / temperature, dim=-1)

        clean = predict(splits.test)
        seconds = time.perf_counter() - start
        return Row(
            key,
            name,
            (
                Scores(
                    evaluations=_evaluations(clean, predict, splits),
                    distances=references.distances(lambda _: clean),
                    prior_precision=None,
                    seconds=seconds,
                ),
            ),
        )

    return [
        scored("map", "MAP", lambda: 1.0),
        scored(
            "temperature",
            "temperature scaling",
            lambda: fit_temperature(model, splits.validation.loader()).temperature,
        ),
    ]


def _evaluations(
    clean: Tensor, predict: Callable[[Split], Tensor], splits: DigitSplits
) -> dict[str, Evaluation]:
    """Scores per test split; out-of-distribution detection beside the clean one."""
    found = {"clean": evaluate(clean, splits.test.labels, ood_probs=predict(splits.ood))}
    for name, split in splits.shifts.items():
        if name not in found:
            found[name] = evaluate(predict(split), split.labels)
    return found
