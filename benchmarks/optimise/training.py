"""Whole training runs at equal cost, each method at the best of four settings."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from matplotlib.axes import Axes
from torch import nn

from benchmarks.common.digits import network
from benchmarks.optimise.digits import (
    BATCH,
    LOSS,
    N_TRAIN,
    Digits,
    accuracy,
    endless_batches,
    mean_loss,
)
from laplace_debiased.optim import MiniBatches, NewtonCG, Termination

NETWORK = "pooled-relu"
TUNING_SEEDS = range(100, 102)


@dataclass(frozen=True)
class Method:
    """An optimiser with one setting."""

    name: str
    setting: dict[str, Any]

    @property
    def label(self) -> str:
        """Name and setting, for tables."""
        return f"{self.name} ({', '.join(f'{k}={v:g}' for k, v in self.setting.items())})"


# Four settings each; Newton steps have line search and damping rule on, as by default.
METHODS: dict[str, tuple[dict[str, float], ...]] = {
    "SGD": tuple({"lr": lr, "momentum": 0.9} for lr in (0.01, 0.03, 0.1, 0.3)),
    "Adam": tuple({"lr": lr} for lr in (1e-3, 3e-3, 1e-2, 3e-2)),
    "NewtonCG single": tuple(
        {"iterations": k, "damping": d} for k in (3, 10) for d in (1e-1, 1e-2)
    ),
    "NewtonCG debiased": tuple(
        {"iterations": k, "damping": d} for k in (3, 10) for d in (1e-1, 1e-2)
    ),
}


def stepper(method: Method, model: nn.Module, batches: Iterator[Any]) -> Callable[[], float]:
    """A function that takes one step and returns its cost in gradients of one sample."""
    setting = method.setting
    if method.name in ("SGD", "Adam"):
        kind = torch.optim.SGD if method.name == "SGD" else torch.optim.Adam
        optimizer = kind(model.parameters(), **setting)

        def first_order() -> float:
            X, y = next(batches)
            optimizer.zero_grad()
            LOSS(model(X), y).backward()
            optimizer.step()
            return float(len(y))

        return first_order

    newton = NewtonCG(
        model.parameters(),
        model,
        LOSS,
        damping=setting["damping"],
        termination=Termination(int(setting["iterations"])),
    )

    def second_order() -> float:
        one, two = next(batches), next(batches)
        if method.name == "NewtonCG single":
            X, y = (torch.cat(parts) for parts in zip(one, two, strict=True))
            newton.step(lambda: MiniBatches((X, y)))
        else:
            newton.step(lambda: MiniBatches(one, two))
        report = newton.last_step
        assert report is not None
        return report.sample_gradients

    return second_order


@dataclass(frozen=True)
class Run:
    """One training run; the curves [k] are taken whenever another epoch's cost is spent."""

    label: str
    seed: int
    cost: list[float]
    train_loss: list[float]
    test_loss: list[float]
    validation_loss: float
    test_accuracy: float
    n_steps: int
    seconds: float


def train(method: Method, digits: Digits, seed: int, epochs: float) -> Run:
    """Train until ``epochs`` times the training set's gradients are spent."""
    model = network(NETWORK, seed)
    step = stepper(method, model, endless_batches(digits.train, BATCH, seed))
    spent, seconds, n_steps = 0.0, 0.0, 0
    cost: list[float] = []
    train_loss: list[float] = []
    test_loss: list[float] = []
    while True:
        if not cost or spent - cost[-1] >= N_TRAIN or spent >= epochs * N_TRAIN:
            cost.append(spent)
            train_loss.append(mean_loss(model, digits.train))
            test_loss.append(mean_loss(model, digits.test))
        if spent >= epochs * N_TRAIN:
            break
        start = time.perf_counter()
        spent += step()
        seconds += time.perf_counter() - start
        n_steps += 1
    return Run(
        method.label,
        seed,
        [c / N_TRAIN for c in cost],
        train_loss,
        test_loss,
        mean_loss(model, digits.validation),
        accuracy(model, digits.test),
        n_steps,
        seconds,
    )


def choose(name: str, digits: Digits, epochs: float) -> Method:
    """The setting with the least mean validation loss over the tuning seeds."""
    methods = [Method(name, setting) for setting in METHODS[name]]
    means = np.array(
        [
            np.mean([train(method, digits, seed, epochs).validation_loss for seed in TUNING_SEEDS])
            for method in methods
        ]
    )
    # A run that diverged is no candidate.
    return methods[int(np.argmin(np.where(np.isfinite(means), means, np.inf)))]


def table(runs: Sequence[Run]) -> str:
    """Markdown: mean ± standard deviation over seeds by method, best training loss first."""
    labels = sorted(
        {run.label for run in runs},
        key=lambda label: np.mean([r.train_loss[-1] for r in runs if r.label == label]),
    )
    lines = [
        "| method | train loss | test loss | test accuracy | steps | seconds |",
        "|---|---|---|---|---|---|",
    ]
    for label in labels:
        mine = [run for run in runs if run.label == label]
        columns = (
            _spread([run.train_loss[-1] for run in mine]),
            _spread([run.test_loss[-1] for run in mine]),
            _spread([run.test_accuracy for run in mine]),
            f"{np.mean([run.n_steps for run in mine]):.0f}",
            f"{np.mean([run.seconds for run in mine]):.1f}",
        )
        lines.append(f"| {label} | {' | '.join(columns)} |")
    return "\n".join(lines)


def _spread(numbers: Sequence[float]) -> str:
    spread = f" ± {np.std(numbers, ddof=1):.4f}" if len(numbers) > 1 else ""
    return f"{np.mean(numbers):.4f}{spread}"


def plot_runs(axes: Axes, runs: Sequence[Run]) -> None:
    for color, label in enumerate(dict.fromkeys(run.label for run in runs)):
        for number, run in enumerate(r for r in runs if r.label == label):
            name = label if number == 0 else None
            axes.plot(run.cost, run.train_loss, color=f"C{color}", alpha=0.6, label=name)
    axes.set(yscale="log", xlabel="cost in epochs of gradients", ylabel="mean training loss")
    axes.legend(fontsize=8)
