"""Results of the predictive benchmark, and their report in markdown."""

from __future__ import annotations

import argparse
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from benchmarks.common.tables import Summary, machine, machine_line, number, ratio, table

TITLES = {
    "mlp": "MLP",
    "cnn": "CNN",
    "resnet20": "ResNet-20",
    "last10": "last layer, D = 512",
    "last100": "last layer, D = 512",
    "last1000": "last layer, D = 512",
}


@dataclass(frozen=True)
class Prediction:
    """One case at one batch size.

    Attributes:
        case: name of the case.
        batch: samples per call.
        ours: this library.
        reference: laplace-torch.
        difference: largest absolute difference of a probability, where both gave some.
        matmul_share: our speed over that of a large matrix product in the same process.
    """

    case: str
    batch: int
    ours: Summary
    reference: Summary
    difference: float | None
    matmul_share: float | None


@dataclass(frozen=True)
class Tuning:
    """One grid search.

    Attributes:
        case: name of the case.
        points: grid points of ours.
        images: validation samples of ours.
        ours: the whole search.
        reference_wall_s: laplace-torch's elapsed seconds, scaled to as many points and images.
        reference_cpu_s: its seconds of all threads, scaled likewise.
        reference_batch: batch size at which it was fastest.
        reference_points: grid points that were measured.
        reference_images: images that were measured.
        reference_failure: why there is no figure, or None.
        grid_point: our best grid point.
        refined: our refined prior precision.
        loss: validation loss there, in nats.
        brute_force: loss by plain predictions at each prior precision that was checked.
        fresh_refined: loss by plain predictions at the refined prior precision.
        loss_difference: largest difference of the sweep's losses to brute force.
    """

    case: str
    points: int
    images: int
    ours: Summary
    reference_wall_s: float | None
    reference_cpu_s: float | None
    reference_batch: int | None
    reference_points: int
    reference_images: int
    reference_failure: str | None
    grid_point: float
    refined: float
    loss: float
    brute_force: dict[float, float]
    fresh_refined: float | None
    loss_difference: float | None

    @property
    def brute_force_point(self) -> float | None:
        """The prior precision of the lowest loss by brute force."""
        return min(self.brute_force, key=self.brute_force.__getitem__, default=None)


def growth(rows: Sequence[Prediction]) -> float | None:
    """Exponent k of CPU time ∝ batch^k over our three largest batches, by least squares."""
    pairs = [(math.log(r.batch), math.log(r.ours.cpu_s)) for r in rows if r.ours.cpu_s][-3:]
    if len(pairs) < 2:
        return None
    xs, ys = zip(*pairs, strict=True)
    x, y = sum(xs) / len(xs), sum(ys) / len(ys)
    return sum((a - x) * (b - y) for a, b in pairs) / sum((a - x) ** 2 for a in xs)


def markdown(results: dict[str, dict[str, Any]], options: argparse.Namespace) -> str:
    """The report."""
    facts = machine(options.threads)
    source = "is trained on CIFAR-10" if options.weights else "has random weights"
    parts = [
        "# Predictions and tuning against laplace-torch",
        f"{machine_line(facts)} One Kronecker posterior, fitted by each library on the same "
        f"{options.samples} samples and scaled to the same N. ResNet-20 {source}; the other "
        "networks are random. Medians of "
        f"{options.repetitions} interleaved runs; each library in a process of its own, stopped at "
        f"{options.memory_limit:g} GB (10⁹ bytes) or {options.time_limit:g} s a call.",
        "## Predictive probabilities",
        _prediction_table(results),
        "Times are elapsed seconds (CPU seconds of all threads); memory is the peak of the whole "
        "process in GB (its increase during the call); the largest difference of a probability is "
        "float32's (in float64 they agree to 1e-9: a test holds them there); work is "
        "GFLOP per sample, counted from the formula, and its share of the speed of a "
        "1024×1024 matrix product.",
        _growth_lines(results),
    ]
    tunings = [result["tuning"] for result in results.values() if result["tuning"]]
    if tunings:
        parts += ["## Grid search for the prior precision", _tuning_table(tunings)]
        parts += [_tuning_note(tunings[0], options)]
        parts += ["### Against brute force", _brute_force_table(tunings)]
        parts += [
            "Brute force: predictions at each prior, one by one, each with a fresh metric. Losses "
            "are mean negative log-likelihoods in nats."
        ]
    return "\n\n".join(part for part in parts if part)


def _title(name: str) -> str:
    return TITLES.get(name, name)


def _prediction_table(results: dict[str, dict[str, Any]]) -> str:
    header = ["network", "parameters", "C", "batch", "laplace-torch, s", "ours, s"]
    header += ["faster", "faster (CPU)", "laplace-torch, GB", "ours, GB", "max abs Δp", "work"]
    rows = []
    for name, result in results.items():
        facts = result["facts"]
        for row in result["predictions"]:
            share = number(row.matmul_share, ".0%")
            rows.append(
                [
                    _title(name),
                    f"{facts['parameters']:,}",
                    f"{facts['classes']}",
                    f"{row.batch}",
                    row.reference.time_cell(),
                    row.ours.time_cell(),
                    ratio(row.reference.wall_s, row.ours.wall_s),
                    ratio(row.reference.cpu_s, row.ours.cpu_s),
                    row.reference.memory_cell(),
                    row.ours.memory_cell(),
                    number(row.difference),
                    f"{facts['flop_per_sample'] / 1e9:.2g} ({share})",
                ]
            )
    return table(header, rows)


def _growth_lines(results: dict[str, dict[str, Any]]) -> str:
    exponents = [
        f"{_title(name)} (C = {result['facts']['classes']}) {number(exponent, '.2f')}"
        for name, result in results.items()
        if (exponent := growth(result["predictions"])) is not None
    ]
    return (
        "Our CPU time grows with the batch size to the power (over the three largest batches; "
        "linear is 1, less where fixed costs dominate; laplace-torch's Jacobians need 2): "
        f"{', '.join(exponents)}."
    )


def _tuning_table(tunings: Sequence[Tuning]) -> str:
    header = ["network", "laplace-torch, s (scaled)", "ours, s", "faster", "faster (CPU)"]
    header += ["ours, GB", "laplace-torch's batch"]
    rows = []
    for t in tunings:
        scaled = Summary(t.reference_wall_s, t.reference_cpu_s, failure=t.reference_failure)
        rows.append(
            [
                _title(t.case),
                scaled.time_cell(),
                t.ours.time_cell(),
                ratio(t.reference_wall_s, t.ours.wall_s),
                ratio(t.reference_cpu_s, t.ours.cpu_s),
                t.ours.memory_cell(),
                number(t.reference_batch, "d"),
            ]
        )
    return table(header, rows)


def _tuning_note(t: Tuning, options: argparse.Namespace) -> str:
    sizes = ", ".join(map(str, sorted(options.reference_batches)))
    return (
        f"{t.points} grid points on {t.images:,} validation samples. Ours is measured in full, "
        f"with the refinement between grid points. laplace-torch's time is measured at "
        f"{t.reference_points} points on {t.reference_images} samples and scaled by "
        f"{t.points / t.reference_points:g} × {t.images / t.reference_images:g}, at the "
        f"fastest for it of the batch sizes {sizes}."
    )


def _brute_force_table(tunings: Sequence[Tuning]) -> str:
    header = ["network", "best grid point", "by brute force", "points checked"]
    header += ["largest loss difference", "loss there", "refined prior", "loss there, brute force"]
    rows = []
    for t in tunings:
        best = t.brute_force_point
        rows.append(
            [
                _title(t.case),
                f"{t.grid_point:.4g}",
                number(best, ".4g"),
                f"{len(t.brute_force)} of {t.points}",
                number(t.loss_difference),
                number(None if best is None else t.brute_force[best], ".7f"),
                f"{t.refined:.4g}",
                number(t.fresh_refined, ".7f"),
            ]
        )
    return table(header, rows)
