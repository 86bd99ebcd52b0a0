"""Run the fidelity benchmark: ``python -m benchmarks.fidelity --help``."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor
from torch.utils.data import DataLoader, SubsetRandomSampler
from tqdm import tqdm

from benchmarks.fidelity.measure import log_predictive, measure, swept
from benchmarks.fidelity.methods import (
    DEFAULTS,
    FISHERS,
    FOLDS,
    FULL_DATA,
    KRON,
    LOW_RANK,
    POOLS,
    SIZES,
    SPLITS,
    Method,
)
from benchmarks.fidelity.problems import Problem, digits, resnet20, small_mlp
from benchmarks.fidelity.references import dense_reference, kronecker_reference
from benchmarks.fidelity.report import markdown, read, write
from laplace_debiased.factory import DebiasedLaplace

_SUITES = {
    "defaults": DEFAULTS,
    "kron": KRON,
    "lowrank": LOW_RANK,
    "sizes": SIZES,
    "pools": POOLS,
    "splits": SPLITS,
    "folds": FOLDS,
    "fishers": FISHERS,
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one problem and write its table, JSON and figure."""
    options = _parse(arguments)
    torch.set_num_threads(options.threads)
    priors = torch.tensor(options.priors)
    if options.problem == "digits":
        problem = digits()
    elif options.problem == "digits_mlp":
        problem = digits(network=small_mlp, name="digits, MLP")
    else:
        problem = resnet20(
            options.images,
            options.weights,
            options.test_inputs,
            few_layers=options.problem == "resnet20_few",
        )
    references = {
        "Kronecker posterior with exact magnitudes on all data": kronecker_reference(
            problem, priors, options.cache
        )
    }
    if problem.dense:
        dense_cache = options.cache and options.cache.with_suffix(".dense")
        references["posterior with the dense GGN of all data"] = dense_reference(
            problem, priors, dense_cache
        )
    methods = _chosen([m for suite in options.suites for m in _SUITES[suite]], options.only)
    name = f"fidelity_{options.problem}" + (f"_{options.tag}" if options.tag else "")
    rows = read(options.output, name) if options.resume else []
    n_data = len(problem.train.dataset)  # type: ignore[arg-type]
    if options.full_data:
        rows += [
            measure(m.name, n_data, [0], _fitter(problem, m, n_data, priors), references)
            for m in _chosen(FULL_DATA, options.only)
        ]
    done = {(row.method, row.budget) for row in rows}
    for budget in options.budgets:
        for method in tqdm(methods, desc=f"m={budget}"):
            if (method.name, budget) in done:
                continue
            fit = _fitter(problem, method, budget, priors)
            rows.append(measure(method.name, budget, range(options.draws), fit, references))
            write(options.output, name, rows, options.priors, _notes(problem, options))
    print(markdown(rows, options.priors, next(iter(references))))
    return 0


def _fitter(
    problem: Problem, method: Method, samples_per_fit: int, priors: Tensor
) -> Callable[[int], Callable[[], Tensor]]:
    samples = min(samples_per_fit * method.samples_per_budget, len(problem.train.dataset))  # type: ignore[arg-type]

    def fit(seed: int) -> Callable[[], Tensor]:
        la = DebiasedLaplace(problem.model, **method.options)
        if method.overlap is None:
            budget = "auto" if method.automatic else samples
            la.fit(problem.train, n_samples=budget, seed=seed)
        else:
            directions, magnitudes = overlapping(problem.train, samples // 2, method.overlap, seed)
            la.fit(directions, magnitude_loader=magnitudes, seed=seed)
        return lambda: log_predictive(*swept(la, problem.test_inputs, priors))

    return fit


def overlapping(
    train: DataLoader, size: int, overlap: float, seed: int
) -> tuple[DataLoader, DataLoader]:
    """Two loaders of ``size`` samples each over one data set, with that share in common."""
    n_data = len(train.dataset)  # type: ignore[arg-type]
    order = torch.randperm(n_data, generator=torch.Generator().manual_seed(seed)).tolist()
    shift = size - round(overlap * size)
    return tuple(  # type: ignore[return-value]
        DataLoader(train.dataset, batch_size=64, sampler=SubsetRandomSampler(chosen))
        for chosen in (order[:size], order[shift : shift + size])
    )


def _chosen(methods: Sequence[Method], only: Sequence[str] | None) -> list[Method]:
    """The methods whose name holds one of the given parts; all without any."""
    return [m for m in methods if not only or any(part in m.name for part in only)]


def _notes(problem: Problem, options: argparse.Namespace) -> str:
    return (
        f"{problem.name}: fits draw from {len(problem.train.dataset)} training samples "  # type: ignore[arg-type]
        f"(N the same), probit predictive on {len(problem.test_inputs)} test inputs, "
        f"{options.draws} draws, {options.threads} threads."
    )


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.fidelity", description=__doc__)
    parser.add_argument(
        "--problem", choices=["digits", "digits_mlp", "resnet20", "resnet20_few"], default="digits"
    )
    parser.add_argument("--images", type=Path, help="ImageFolder (or a zip of it) for resnet20")
    parser.add_argument("--weights", type=Path, help="state dict for resnet20")
    parser.add_argument("--suites", nargs="+", choices=sorted(_SUITES), default=["kron"])
    parser.add_argument("--only", nargs="+", help="keep methods whose name holds one of these")
    parser.add_argument("--budgets", nargs="+", type=int, default=[16, 64, 256])
    parser.add_argument("--priors", nargs="+", type=float, default=None)
    parser.add_argument("--draws", type=int, default=8)
    parser.add_argument(
        "--full-data", action="store_true", help="add rows that use every training sample"
    )
    parser.add_argument("--test-inputs", type=int, default=300)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--cache", type=Path, help="keeps the reference fit between runs")
    parser.add_argument(
        "--resume", action="store_true", help="keep the rows that an earlier run has written"
    )
    parser.add_argument("--tag", default="", help="suffix of the result files")
    parser.add_argument("--output", type=Path, default=Path("benchmarks/results"))
    options = parser.parse_args(arguments)
    if options.problem.startswith("resnet20") and (
        options.images is None or options.weights is None
    ):
        parser.error(f"--problem {options.problem} needs --images and --weights")
    if options.priors is None:
        resnet = options.problem.startswith("resnet20")
        options.priors = [1.0, 10.0, 100.0] if resnet else [0.1, 1.0, 10.0]
    return options


if __name__ == "__main__":
    raise SystemExit(main())
