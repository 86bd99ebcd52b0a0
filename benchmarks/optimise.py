"""Train a small network with SGD, Adam and NewtonCG at equal cost, and say who wins.

Two questions, on scikit-learn's digits (8×8 images, 10 classes) and a convolutional network of
6,090 parameters:

* **One step** (``--one-step`` for this one alone): early in training, which loss does one solve of
  the Newton system lead to, by textbook CG on 128 samples or by debiased CG on 64 + 64?
* **Training** (``--training`` for this one alone): which loss does a run reach, at equal cost in
  gradients of single samples? Every method's setting, one of four, is chosen by mean validation
  loss over seeds of its own; the results are those of other seeds.

Costs are those of ``laplace_debiased.optim.cost``: a gradient counts 1 per sample, a
curvature-vector product 2, a forward pass 1/3. Running times are reported next to them.

    python -m benchmarks.optimise --output benchmark-output
"""

import argparse
import copy
import json
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from sklearn.datasets import load_digits
from torch import Tensor, nn

from laplace_debiased.optim import (
    MiniBatches,
    NewtonCG,
    Termination,
    debiased_cg,
    model_quadratic,
)

LOSS = nn.CrossEntropyLoss()
BATCH = 64
N_TRAIN, N_VALIDATION = 1097, 300
TUNING_SEEDS = range(100, 102)
STEP_RATES = (0.05, 0.1, 0.2, 0.4)


@dataclass(frozen=True)
class Digits:
    """Images [n, 1, 8, 8] in [0, 1] and labels [n] of each part."""

    train: tuple[Tensor, Tensor]
    validation: tuple[Tensor, Tensor]
    test: tuple[Tensor, Tensor]

    @classmethod
    def load(cls) -> "Digits":
        """Shuffle with a fixed seed and cut."""
        images, labels = load_digits(return_X_y=True)
        order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))
        X = torch.tensor(images, dtype=torch.float32).view(-1, 1, 8, 8)[order] / 16
        y = torch.tensor(labels)[order]
        cuts = [N_TRAIN, N_VALIDATION, len(y) - N_TRAIN - N_VALIDATION]
        return cls(*zip(X.split(cuts), y.split(cuts), strict=True))


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


def network(seed: int) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return nn.Sequential(
            nn.Conv2d(1, 16, 3, padding=1),
            nn.ReLU(),
            nn.MaxPool2d(2),
            nn.Conv2d(16, 32, 3, padding=1),
            nn.ReLU(),
            nn.MaxPool2d(2),
            nn.Flatten(),
            nn.Linear(128, 10),
        )


def endless_batches(data: tuple[Tensor, Tensor], size: int, seed: int) -> Iterator[Any]:
    """Batches of exactly ``size``; each pass over the data is shuffled anew."""
    generator = torch.Generator().manual_seed(seed)
    X, y = data
    while True:
        order = torch.randperm(len(y), generator=generator)
        for index in order[: len(y) // size * size].split(size):
            yield X[index], y[index]


@torch.no_grad()
def mean_loss(model: nn.Module, data: tuple[Tensor, Tensor]) -> float:
    return float(LOSS(model(data[0]), data[1]))


@torch.no_grad()
def accuracy(model: nn.Module, data: tuple[Tensor, Tensor]) -> float:
    return float((model(data[0]).argmax(1) == data[1]).double().mean())


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
    model = network(seed)
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


@dataclass(frozen=True)
class OneStep:
    """Full training loss (mean over samples) before and after one solve, by draw [draws]."""

    lr: float
    seed: int
    before: float
    single: list[float]
    debiased: list[float]

    @property
    def ratio(self) -> float:
        """Mean over the draws after textbook CG, over that after debiased CG."""
        return float(np.mean(self.single) / np.mean(self.debiased))


def one_step(data: tuple[Tensor, Tensor], seed: int, lr: float, draws: int = 5) -> OneStep:
    """Three epochs of SGD, then one solve: damping 1e-4, 40 CG iterations, 128 samples in all.

    The draws differ in the samples alone. Both solves make 40 products with 128 samples.
    """
    X, y = data
    model = network(seed)
    _three_epochs(model, data, seed, lr)
    rule = Termination(40, relative_residual=0.0)
    single: list[float] = []
    debiased: list[float] = []
    for draw in range(draws):
        generator = torch.Generator().manual_seed(1000 * seed + draw)
        index = torch.randperm(len(y), generator=generator)[: 2 * BATCH]
        both, own, other = (
            model_quadratic(model, LOSS, [(X[i], y[i])], damping=1e-4)
            for i in (index, index[:BATCH], index[BATCH:])
        )
        for losses, pair in ((single, (both, None)), (debiased, (own, other))):
            x = debiased_cg(*pair, termination=rule, keep_vectors=False).solution
            losses.append(mean_loss(_moved(model, x), data))
    return OneStep(lr, seed, mean_loss(model, data), single, debiased)


def _three_epochs(model: nn.Module, data: tuple[Tensor, Tensor], seed: int, lr: float) -> None:
    optimizer = torch.optim.SGD(model.parameters(), lr=lr)
    batches = endless_batches(data, 32, seed)
    for _ in range(3 * (len(data[1]) // 32)):
        X, y = next(batches)
        optimizer.zero_grad()
        LOSS(model(X), y).backward()
        optimizer.step()


def _moved(model: nn.Module, displacement: Tensor) -> nn.Module:
    moved = copy.deepcopy(model)
    start = nn.utils.parameters_to_vector(moved.parameters()).detach()
    nn.utils.vector_to_parameters(start + displacement, moved.parameters())
    return moved


def one_step_table(results: Sequence[OneStep]) -> str:
    """Markdown: one line per run, and the share of runs where the ratio reaches 5."""
    lines = [
        "| SGD lr | seed | loss before | after textbook CG | after debiased CG | ratio of means |"
        " ratio of medians |",
        "|---|---|---|---|---|---|---|",
    ]
    for r in results:
        medians = np.median(r.single) / np.median(r.debiased)
        lines.append(
            f"| {r.lr:g} | {r.seed} | {r.before:.3f} | {np.mean(r.single):.3g} | "
            f"{np.mean(r.debiased):.3g} | {r.ratio:.1f} | {medians:.1f} |"
        )
    for lr in sorted({r.lr for r in results}):
        ratios = np.array([r.ratio for r in results if r.lr == lr])
        lines.append(
            f"\nlr {lr:g}: geometric mean of the ratios {np.exp(np.log(ratios).mean()):.1f}; "
            f"{(ratios >= 5).sum()} of {len(ratios)} runs reach 5, {(ratios > 1).sum()} exceed 1."
        )
    return "\n".join(lines)


def training_table(runs: Sequence[Run]) -> str:
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


def plot(steps: Sequence[OneStep], runs: Sequence[Run]) -> Figure:
    """Loss after one solve by draw, and training loss against cost by run."""
    figure = Figure(figsize=(5.5 * (bool(steps) + bool(runs)), 4.2), layout="constrained")
    panels = list(figure.subplots(1, bool(steps) + bool(runs), squeeze=False)[0])
    if steps:
        _plot_steps(panels.pop(0), steps)
    if runs:
        _plot_runs(panels.pop(0), runs)
    return figure


def _plot_steps(axes: Axes, steps: Sequence[OneStep]) -> None:
    for shift, kind, color in ((0.93, "single", "tab:red"), (1.07, "debiased", "tab:blue")):
        places = [r.lr * shift for r in steps for _ in getattr(r, kind)]
        losses = [loss for r in steps for loss in getattr(r, kind)]
        axes.plot(places, losses, "o", color=color, alpha=0.5, markersize=4, label=f"{kind} CG")
    axes.plot([r.lr for r in steps], [r.before for r in steps], "k_", markersize=14, label="before")
    axes.set(xscale="log", yscale="log", xlabel="learning rate of three epochs of SGD")
    axes.set(ylabel="mean training loss after one solve")
    axes.set_xticks(STEP_RATES, [f"{rate:g}" for rate in STEP_RATES])
    axes.minorticks_off()
    axes.legend(fontsize=8)


def _plot_runs(axes: Axes, runs: Sequence[Run]) -> None:
    for color, label in enumerate(dict.fromkeys(run.label for run in runs)):
        for number, run in enumerate(r for r in runs if r.label == label):
            name = label if number == 0 else None
            axes.plot(run.cost, run.train_loss, color=f"C{color}", alpha=0.6, label=name)
    axes.set(yscale="log", xlabel="cost in epochs of gradients", ylabel="mean training loss")
    axes.legend(fontsize=8)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("--output", type=Path, default=Path("benchmark-output"))
    parser.add_argument("--seeds", type=int, default=5, help="runs per method and setting")
    parser.add_argument("--epochs", type=float, default=30.0, help="cost of a training run")
    parser.add_argument("--one-step", action="store_true", help="only the single solves")
    parser.add_argument("--training", action="store_true", help="only the training runs")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    digits, report = Digits.load(), ["# Debiased conjugate gradients as an optimiser"]
    steps: list[OneStep] = []
    runs: list[Run] = []
    if not arguments.training:
        # Nothing is tuned here, so the validation part may train as well.
        X, y = (torch.cat(pair) for pair in zip(digits.train, digits.validation, strict=True))
        steps = [one_step((X, y), seed, lr) for lr in STEP_RATES for seed in range(arguments.seeds)]
        report += ["## One solve, damping 1e-4, 40 iterations, 5 draws", one_step_table(steps)]
    if not arguments.one_step:
        methods = [choose(name, digits, arguments.epochs) for name in METHODS]
        seeds = range(arguments.seeds)
        runs = [train(method, digits, s, arguments.epochs) for method in methods for s in seeds]
        title = f"## Training at the cost of {arguments.epochs:g} epochs, {len(seeds)} seeds"
        report += [title, training_table(runs)]
    text = "\n\n".join(report)
    arguments.output.mkdir(parents=True, exist_ok=True)
    results = {"one_step": [asdict(s) for s in steps], "training": [asdict(r) for r in runs]}
    (arguments.output / "optimise.json").write_text(json.dumps(results, indent=1))
    (arguments.output / "optimise.md").write_text(text + "\n")
    plot(steps, runs).savefig(arguments.output / "optimise.png", dpi=150)
    print(text)


if __name__ == "__main__":
    main()
