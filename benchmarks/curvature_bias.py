"""How large is the mini-batch bias of the curvature, and where?

For pairs of disjoint batches of 64: the own batch's top eigenvectors of the generalized
Gauss-Newton matrix, with the curvature along them on that batch, on the other one, and on reference
data. Two problems:

* scikit-learn's digits (default), small convolutional networks trained here in seconds
  (``--digits network:noise:seed``). Depth, and noise on the images, give every sample directions
  of its own, and with them comes the bias at the top;
* CIFAR-10 and a trained ResNet-20 (``--data`` and ``--weights``). Cost per reference sample: nine
  backward passes and one for the gradient, 1.6 GFLOP, and 2·10·P = 5.4 MFLOP per direction. For
  the 180 directions of five pairs that is 2.6 GFLOP; forward mode would take 30. The default of
  1,000 reference samples, drawn uniformly from the training images, is 2.6 TFLOP.

    python -m benchmarks.curvature_bias --output benchmark-output
    python -m benchmarks.curvature_bias --data cifar10.zip --weights resnet20.pt
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import TensorDataset

from benchmarks.common.bias_problems import (
    N_DIGITS_TRAIN,
    DigitsCase,
    Problem,
    cifar_problem,
    digits_problem,
)
from benchmarks.common.digits import NETWORKS
from laplace_debiased.diagnostics import (
    DirectionalProfile,
    DirectionalQuadratic,
    Eigenpairs,
    batch_size_sweep,
    directional_quadratic,
    disjoint_batches,
    eigenspace_overlap,
    plot_eigenspaces,
    plot_profiles,
    top_eigenpairs,
)

LIKELIHOOD = "classification"
REFERENCE_BATCH = 64


@dataclass(frozen=True)
class Measurement:
    """The profiles of all pairs of batches, with both batches' eigenpairs."""

    problem: Problem
    profiles: tuple[DirectionalProfile, ...]
    eigenpairs: tuple[tuple[Eigenpairs, Eigenpairs], ...]
    n_reference: int
    seconds: float


def measure(problem: Problem, options: argparse.Namespace) -> Measurement:
    """Eigenpairs of every batch; all pairs' directions in one walk through the reference."""
    start = time.perf_counter()
    generator = torch.Generator().manual_seed(options.seed)
    dataset = TensorDataset(problem.images, problem.labels)
    batches = [
        disjoint_batches(dataset, options.batch_size, generator) for _ in range(options.pairs)
    ]
    # The first pair is the figure's and shows more of the spectrum.
    wanted = [max(options.k, options.top)] + [options.top] * (options.pairs - 1)
    pairs = [
        (_eigenpairs(problem, own, k), _eigenpairs(problem, other, options.top))
        for k, (own, other) in zip(wanted, batches, strict=True)
    ]
    chosen = torch.randperm(len(dataset), generator=generator)[: options.reference_samples]
    reference = _quadratic(
        problem,
        [(problem.images[i], problem.labels[i]) for i in chosen.split(REFERENCE_BATCH)],
        torch.cat([own.vectors for own, _ in pairs], 1),
    )
    stops = torch.tensor([own.vectors.shape[1] for own, _ in pairs]).cumsum(0)
    columns = torch.arange(int(stops[-1])).tensor_split(stops[:-1])
    profiles = tuple(
        DirectionalProfile.of(
            *(_quadratic(problem, [batch], own.vectors) for batch in data),
            reference.select(part),
            own.vectors,
        )
        for (own, _), data, part in zip(pairs, batches, columns, strict=True)
    )
    return Measurement(problem, profiles, tuple(pairs), len(chosen), time.perf_counter() - start)


def _eigenpairs(problem: Problem, batch: object, k: int) -> Eigenpairs:
    return top_eigenpairs(problem.model, LIKELIHOOD, batch, k)


def _quadratic(
    problem: Problem, batches: Sequence[object], directions: Tensor
) -> DirectionalQuadratic:
    return directional_quadratic(
        problem.model, LIKELIHOOD, batches, directions, derivatives="reverse"
    )


def figures_of(measurement: Measurement, top: int) -> dict[str, list[float]]:
    """What the table shows, one number per pair of batches."""
    rows: dict[str, list[float]] = {}
    for profile, (own, other) in zip(measurement.profiles, measurement.eigenpairs, strict=True):
        assert profile.reference is not None
        reference = profile.reference.curvature.mean
        biased = (profile.own.curvature.mean / reference)[:top]
        fresh = (profile.other.curvature.mean / reference)[:top]
        kept = profile.reference.slope.mean[:top].sum() / profile.own.slope.mean[:top].sum()
        for name, value in (
            ("own/ref, rank 1", biased[0]),
            ("own/ref, median of top 5", biased[:5].median()),
            (f"own/ref, median of top {top}", biased.median()),
            (f"other/ref, median of top {top}", fresh.median()),
            (f"slope kept by ref, top {top}", kept),
            (
                f"eigenspace overlap, top {top}",
                eigenspace_overlap(own.vectors[:, :top], other.vectors[:, :top]),
            ),
            (
                f"eigenvalue own/other, median of top {top}",
                (own.values[:top] / other.values[:top]).median(),
            ),
        ):
            rows.setdefault(name, []).append(float(value))
    return rows


def _stated(values: Sequence[float]) -> str:
    sample = torch.tensor(values, dtype=torch.float64)
    if len(sample) < 2:
        return f"{float(sample[0]):.2f}"
    return f"{float(sample.mean()):.2f} ± {float(sample.std() / len(sample) ** 0.5):.2f}"


def report(measurements: Sequence[Measurement], options: argparse.Namespace) -> str:
    """Markdown: one column per problem, mean ± standard error over pairs of batches."""
    tables = [figures_of(measurement, options.top) for measurement in measurements]
    header = ["", *(m.problem.title for m in measurements)]
    lines = ["| " + " | ".join(header) + " |", "|" + "---|" * len(header)]
    for label, cells in (
        ("train / test accuracy", [_accuracies(m.problem) for m in measurements]),
        ("reference samples", [str(m.n_reference) for m in measurements]),
        *((name, [_stated(table[name]) for table in tables]) for name in tables[0]),
        ("seconds", [f"{m.seconds:.0f}" for m in measurements]),
    ):
        lines.append("| " + " | ".join([label, *cells]) + " |")
    title = (
        f"# Curvature bias of batches of {options.batch_size}\n\n"
        f"Generalized Gauss-Newton matrix, {options.pairs} pairs of disjoint batches, mean ±"
        " standard error over pairs.\n"
    )
    details = [
        f"\n{m.problem.title}, first pair, by decile of ranks:\n\n```\n"
        f"{m.profiles[0].summary()}\n```"
        for m in measurements
    ]
    return "\n".join([title, *lines, *details, ""])


def _accuracies(problem: Problem) -> str:
    return f"{problem.accuracy['train']:.3f} / {problem.accuracy['test']:.3f}"


def draw(measurements: Sequence[Measurement], options: argparse.Namespace, folder: Path) -> None:
    """The first pair's profiles side by side, and the first problem's eigenspaces."""
    profiles = {m.problem.title: m.profiles[0] for m in measurements}
    plot_profiles(profiles).savefig(folder / "profile.png", dpi=150)
    own, other = measurements[0].eigenpairs[0]
    plot_eigenspaces(own, other).savefig(folder / "eigenspaces.png", dpi=150)
    if options.sweep:
        problem = measurements[0].problem
        sweep = batch_size_sweep(
            problem.model,
            LIKELIHOOD,
            TensorDataset(problem.images, problem.labels),
            [(problem.images[i], problem.labels[i]) for i in _rows(problem, options).split(64)],
            options.sweep,
            k=options.top,
            pairs=options.pairs,
            seed=options.seed,
        )
        sweep.plot().savefig(folder / "batch_size.png", dpi=150)
        (folder / "batch_size.json").write_text(json.dumps(sweep.to_dict(), indent=1) + "\n")


def _rows(problem: Problem, options: argparse.Namespace) -> Tensor:
    generator = torch.Generator().manual_seed(options.seed + 1)
    return torch.randperm(len(problem.images), generator=generator)[: options.reference_samples]


def _sizes(text: str) -> tuple[int, ...]:
    return tuple(int(part) for part in text.split(",") if part)


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", type=Path, help="CIFAR-10 images: ImageFolder, or a zip of one")
    parser.add_argument("--weights", type=Path, help="state dict of the ResNet-20")
    parser.add_argument("--output", type=Path, default=Path("benchmark-output/curvature_bias"))
    parser.add_argument(
        "--digits",
        nargs="+",
        type=DigitsCase.parse,
        metavar="NETWORK[:NOISE[:SEED]]",
        default=[DigitsCase("deep-tanh"), DigitsCase("deep-tanh", 0.3), DigitsCase("shallow-relu")],
        help=f"among {', '.join(NETWORKS)}; noise is the standard deviation on images in [0, 1]",
    )
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--pairs", type=int, default=5, help="disjoint pairs of batches")
    parser.add_argument("--top", type=int, default=20, help="directions in the medians")
    parser.add_argument("--k", type=int, default=100, help="directions in the figure")
    parser.add_argument("--reference-samples", type=int, help="default: all digits, 1000 images")
    parser.add_argument("--sweep", type=_sizes, help="batch sizes; empty for none")
    parser.add_argument("--seed", type=int, default=0, help="of the batches")
    options = parser.parse_args(arguments)
    if (options.data is None) != (options.weights is None):
        parser.error("--data and --weights go together")
    if options.reference_samples is None:
        options.reference_samples = 1000 if options.data else N_DIGITS_TRAIN
    if options.sweep is None:
        options.sweep = () if options.data else (16, 64, 256)
    return options


def main(arguments: Sequence[str] | None = None) -> None:
    options = parse(arguments)
    options.output.mkdir(parents=True, exist_ok=True)
    problems = (
        [cifar_problem(options.data, options.weights)]
        if options.data
        else [digits_problem(case) for case in options.digits]
    )
    measurements = [measure(problem, options) for problem in problems]
    text = report(measurements, options)
    (options.output / "report.md").write_text(text)
    results: dict[str, Any] = {
        m.problem.title: {
            "accuracy": m.problem.accuracy,
            "reference_samples": m.n_reference,
            "pairs": figures_of(m, options.top),
            "first_pair": m.profiles[0].summary().to_dict(),
        }
        for m in measurements
    }
    (options.output / "results.json").write_text(json.dumps(results, indent=1) + "\n")
    draw(measurements, options, options.output)
    print(text)


if __name__ == "__main__":
    main()
