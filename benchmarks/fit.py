"""Time and memory of a fit: ours, laplace-torch's KronLaplace and curvlinops' EKFAC.

All see the same m samples through the same loader, with the exact loss Hessian (type 2), each in a
process of its own; calls take turns. Two comparisons are between equals: Kronecker magnitudes with
KronLaplace, and exact magnitudes (two passes) with EKFAC. Where two methods compute the same matrix
their traces are compared.

    python -m benchmarks.fit --images cifar10.zip --weights resnet20.pt
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

from benchmarks.common.tables import (
    Summary,
    machine,
    machine_line,
    number,
    ratio,
    settings,
    table,
    write,
)
from benchmarks.common.workers import Limits, Measurement, NoResult, Worker

FACTORY = "benchmarks.common.fits:Fit"
BASELINES = {
    "laplace-torch KronLaplace": None,
    "ours, two_batch, kfac": "laplace-torch KronLaplace",
    "ours, single, kfac": "laplace-torch KronLaplace",
    "curvlinops EKFAC": None,
    "ours, single, ggn": "curvlinops EKFAC",
    "ours, cross_fit, ggn": "curvlinops EKFAC",
}
"""What each method is compared with."""

SAME_MATRIX = ("ours, single, kfac", "ours, single, ggn")
"""Methods that compute the matrix of their baseline."""


@dataclass(frozen=True)
class FitResult:
    """One method.

    Attributes:
        method: its name.
        summary: time and memory.
        trace: trace of the curvature, summed over the m samples.
    """

    method: str
    summary: Summary
    trace: float | None


def measure(options: argparse.Namespace) -> list[FitResult]:
    """All methods, in turns."""
    limits = Limits(options.time_limit, options.memory_limit)
    arguments = {
        "name": options.case,
        "n_fit": options.samples,
        "images": options.images and str(options.images),
        "weights": options.weights and str(options.weights),
    }
    calls: dict[str, list[Measurement]] = {method: [] for method in options.methods}
    failures: dict[str, str] = {}
    with ExitStack() as stack:
        workers = {
            method: stack.enter_context(Worker(FACTORY, options.threads, limits))
            for method in options.methods
        }
        for method, worker in workers.items():
            worker.prepare(method=method, **arguments)
        for _ in range(options.repetitions):
            for method, worker in workers.items():
                if method in failures:
                    continue
                try:
                    calls[method].append(worker.call("fit", batch=options.batch))
                except NoResult as outcome:
                    failures[method] = str(outcome)
    return [
        FitResult(
            method,
            Summary.of(calls[method], failures.get(method)),
            calls[method][-1].values["trace"] if calls[method] else None,
        )
        for method in options.methods
    ]


def markdown(results: Sequence[FitResult], options: argparse.Namespace) -> str:
    """The report."""
    by_name = {result.method: result for result in results}
    header = ["fit", "s", "GB", "compared with", "time", "CPU time", "added memory", "trace"]
    rows = []
    for result in results:
        other = by_name.get(BASELINES[result.method] or "")
        mine, theirs = result.summary, other.summary if other else Summary()
        rows.append(
            [
                result.method,
                mine.time_cell(),
                mine.memory_cell(),
                other.method if other else "",
                ratio(mine.wall_s, theirs.wall_s) if other else "",
                ratio(mine.cpu_s, theirs.cpu_s) if other else "",
                ratio(mine.added_gb, theirs.added_gb) if other else "",
                number(result.trace, ".5g"),
            ]
        )
    weights = "trained on CIFAR-10" if options.weights else "random weights"
    case = f"ResNet-20 ({weights})" if options.case == "resnet20" else options.case
    return "\n\n".join(
        [
            "# Curvature fits",
            f"{machine_line(machine(options.threads))} {case}, m = {options.samples} samples in "
            f"batches of {options.batch}, exact loss Hessian (type 2). Medians of "
            f"{options.repetitions} interleaved runs; each method in a process of its own.",
            table(header, rows),
            "Times are elapsed seconds (CPU seconds of all threads), construction included; "
            "memory is the peak of the whole process in GB (its increase during the call). Ratios "
            "are ours over the baseline's: below 1 is better. The trace is that of the curvature, "
            "summed "
            f"over the samples; {_agreement(by_name)}",
        ]
    )


def _agreement(by_name: dict[str, FitResult]) -> str:
    """How well traces agree where the matrices are the same."""
    parts = []
    for method in SAME_MATRIX:
        baseline = by_name.get(BASELINES[method] or "")
        mine = by_name.get(method)
        if mine and baseline and mine.trace is not None and baseline.trace is not None:
            gap = abs(mine.trace / baseline.trace - 1.0)
            parts.append(f"`{method}` against {baseline.method} {gap:.0e}")
    pairs = ", ".join(parts) or "none measured"
    return f"where two methods compute the same matrix, their relative difference is: {pairs}."


def parser() -> argparse.ArgumentParser:
    """Command line."""
    result = argparse.ArgumentParser(prog="python -m benchmarks.fit", description=__doc__)
    result.formatter_class = argparse.RawDescriptionHelpFormatter
    add = result.add_argument
    add("--case", default="resnet20", help="mlp, cnn or resnet20")
    add("--methods", nargs="+", choices=list(BASELINES), default=list(BASELINES))
    add("--images", type=Path, help="ImageFolder, or a zip of it, with train/ and test/")
    add("--weights", type=Path, help="state dict of the ResNet-20")
    add("--samples", type=int, default=512, help="samples whose curvature is computed, m")
    add("--batch", type=int, default=64, help="batch size of the loader")
    add("--repetitions", type=int, default=5)
    add("--threads", type=int, default=2)
    add("--time-limit", type=float, default=600.0, help="seconds for one fit")
    add("--memory-limit", type=float, default=10.0, help="resident GB of one process")
    add("--output", type=Path, default=Path("benchmarks/results"))
    return result


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure and write the report."""
    options = parser().parse_args(arguments)
    results = measure(options)
    report = markdown(results, options)
    write(options.output, "fit", report, settings(options) | {"results": results})
    print(report)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
