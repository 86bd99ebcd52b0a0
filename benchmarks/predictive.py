"""Predictions and tuning against laplace-torch: time, memory, and the same numbers.

Both libraries fit the same Kronecker posterior (one batch, Kronecker magnitudes) on the same
samples, each in a process of its own; calls take turns. Then

* ``la(x)`` at growing batch sizes: time, peak memory, largest difference of a probability;
* a grid search for the prior precision: ours in full; laplace-torch's at a few grid points on a few
  images, at the batch size that suits it best, scaled to the full number of both;
* our grid search against brute force: plain predictions at every prior, each with a fresh metric.

    python -m benchmarks.predictive --images cifar10.zip --weights resnet20.pt

Without images and weights, ResNet-20 is random and sees noise.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from benchmarks.common.predictive_report import Prediction, Tuning, markdown
from benchmarks.common.tables import Summary, seconds, settings, write
from benchmarks.common.workers import Limits, Measurement, NoResult, Worker

OURS = "benchmarks.common.posteriors:ours"
REFERENCE = "benchmarks.common.posteriors:reference"
BATCHES = {
    "mlp": (8, 64, 256),
    "cnn": (8, 32, 64, 128, 256),
    "resnet20": (8, 32, 64, 128, 256),
    "last10": (8, 64, 256),
    "last100": (8, 64, 256),
    "last1000": (8, 64, 256),
}

BRUTE_FORCE = {"resnet20": 20}
"""Grid points to check by brute force, where not all; each is a pass over the validation set."""


def measure_case(name: str, options: argparse.Namespace) -> dict[str, Any]:
    """All figures of one case, from one pair of workers."""
    limits = Limits(options.time_limit, options.memory_limit)
    arguments = {
        "name": name,
        "n_fit": options.samples,
        "n_validation": max(options.validation, max(_batches(name, options))),
        "images": options.images and str(options.images),
        "weights": options.weights and str(options.weights),
    }
    with (
        Worker(OURS, options.threads, limits) as ours,
        Worker(REFERENCE, options.threads, limits) as reference,
    ):
        ours.prepare(**arguments)
        failure = _attempt(reference, "prepare", **arguments)[1]
        facts = ours.call("facts").values
        predictions = _predictions(name, ours, reference, facts, failure, options)
        tuning = None
        if name in options.tuning:
            tuning = _tuning(name, ours, reference, arguments, options)
    return {"facts": facts, "predictions": predictions, "tuning": tuning}


def _batches(name: str, options: argparse.Namespace) -> Sequence[int]:
    return options.batches or BATCHES.get(name, (8, 64, 256))


def _attempt(
    worker: Worker, method: str, /, **arguments: Any
) -> tuple[Measurement | None, str | None]:
    """A measurement, or why there is none."""
    try:
        if method == "prepare":
            return worker.prepare(**arguments), None
        return worker.call(method, **arguments), None
    except NoResult as outcome:
        return None, str(outcome)


def _predictions(
    name: str,
    ours: Worker,
    reference: Worker,
    facts: dict[str, Any],
    reference_failure: str | None,
    options: argparse.Namespace,
) -> list[Prediction]:
    """Batch sizes in ascending order; a library that failed is not asked for larger ones."""
    failures: dict[str, str | None] = {ours.factory: None, reference.factory: reference_failure}
    rows = []
    for batch in sorted(_batches(name, options)):
        calls: dict[str, list[Measurement]] = {ours.factory: [], reference.factory: []}
        before = dict(failures)
        for _ in range(options.repetitions):
            for worker in (ours, reference):
                if failures[worker.factory] is not None:
                    continue
                call, failures[worker.factory] = _attempt(worker, "predict", batch=batch)
                calls[worker.factory] += [call] if call is not None else []
        mine, theirs = (
            Summary.of(calls[f], "not tried" if before[f] is not None else failures[f])
            for f in (ours.factory, reference.factory)
        )
        wall = mine.wall_s
        speed = None if wall is None else batch * facts["flop_per_sample"] / wall
        share = None if speed is None else speed / facts["matmul_flop_per_s"]
        rows.append(Prediction(name, batch, mine, theirs, _difference(*calls.values()), share))
        _log(f"{name}, batch {batch}: ours {mine.time_cell()}, laplace-torch {theirs.time_cell()}")
    return rows


def _difference(ours: list[Measurement], reference: list[Measurement]) -> float | None:
    if not ours or not reference:
        return None
    pairs = zip(
        ours[-1].values["probabilities"], reference[-1].values["probabilities"], strict=True
    )
    return max(abs(p - q) for left, right in pairs for p, q in zip(left, right, strict=True))


def _tuning(
    name: str,
    ours: Worker,
    reference: Worker,
    arguments: dict[str, Any],
    options: argparse.Namespace,
) -> Tuning:
    images, points, batch = options.validation, options.grid_points, options.tuning_batch
    call = ours.call_untimed("grid_search", batch=batch, images=images, points=points)
    found = call.values
    _log(f"{name}, grid search: {seconds(call.wall_s)} s")
    wall, cpu, best_batch, failure = _reference_tuning(name, reference, arguments, options)
    count = options.brute_force or BRUTE_FORCE.get(name, points)
    checked = _checked_points(found["prior_precisions"], found["best_grid_point"], count)

    call_fresh = ours.call_untimed(
        "fresh_losses",
        prior_precisions=[*checked, found["prior_precision"]],
        batch=batch,
        images=images,
    )
    *losses, refined_loss = call_fresh.values["losses"]
    fresh = dict(zip(checked, losses, strict=True))
    _log(f"{name}, brute force at {len(checked)} points: {seconds(call_fresh.wall_s)} s")
    swept = dict(zip(found["prior_precisions"], found["losses"], strict=True))
    return Tuning(
        case=name,
        points=points,
        images=images,
        ours=Summary.of([call]),
        reference_wall_s=wall,
        reference_cpu_s=cpu,
        reference_batch=best_batch,
        reference_points=options.reference_points,
        reference_images=options.reference_images,
        reference_failure=failure,
        grid_point=found["best_grid_point"],
        refined=found["prior_precision"],
        loss=found["loss"],
        brute_force=fresh,
        fresh_refined=refined_loss,
        loss_difference=max(abs(swept[prior] - loss) for prior, loss in fresh.items()),
    )


def _reference_tuning(
    name: str, reference: Worker, arguments: dict[str, Any], options: argparse.Namespace
) -> tuple[float | None, float | None, int | None, str | None]:
    """Scaled seconds (wall, CPU), the fastest batch size, and why there is none."""
    points, images = options.reference_points, options.reference_images
    scale = (options.grid_points / points) * (options.validation / images)
    calls: dict[int, Measurement] = {}
    failure = None
    with ExitStack() as stack:
        if reference.stopped is not None:  # at a limit, by a batch that was too large
            fresh = Worker(reference.factory, reference.threads, reference.limits)
            reference = stack.enter_context(fresh)
            failure = _attempt(reference, "prepare", **arguments)[1]
        for batch in [] if failure else sorted(options.reference_batches):
            call, failure = _attempt(
                reference, "grid_search", batch=batch, images=images, points=points
            )
            if call is None:
                break
            calls[batch] = call
            _log(f"{name}, laplace-torch's grid search, batch {batch}: {seconds(call.wall_s)} s")
    if not calls:
        return None, None, None, failure
    best = min(calls, key=lambda batch: calls[batch].cpu_s)
    return calls[best].wall_s * scale, calls[best].cpu_s * scale, best, None


def _checked_points(grid: Sequence[float], best: float, count: int) -> list[float]:
    """The best grid point, two on either side, and an even spread of the rest."""
    center = list(grid).index(best)
    chosen = {i for i in range(center - 2, center + 3) if 0 <= i < len(grid)}
    rest = [i for i in range(len(grid)) if i not in chosen]
    wanted = min(max(count - len(chosen), 0), len(rest))
    chosen |= {rest[(k * len(rest)) // wanted] for k in range(wanted)}
    return [grid[i] for i in sorted(chosen)]


def _log(message: str) -> None:
    print(message, file=sys.stderr, flush=True)


def parser() -> argparse.ArgumentParser:
    """Command line."""
    result = argparse.ArgumentParser(prog="python -m benchmarks.predictive", description=__doc__)
    result.formatter_class = argparse.RawDescriptionHelpFormatter
    add = result.add_argument
    add("--cases", nargs="+", default=list(BATCHES), help="mlp, cnn, resnet20, last<C>")
    add("--batches", nargs="+", type=int, help="batch sizes, in place of each case's own")
    add("--tuning", nargs="*", default=["mlp", "cnn", "resnet20"], help="cases to tune")
    add("--images", type=Path, help="ImageFolder, or a zip of it, with train/ and test/")
    add("--weights", type=Path, help="state dict of the ResNet-20")
    add("--samples", type=int, default=64, help="samples that posteriors are fitted on")
    add("--repetitions", type=int, default=5)
    add("--threads", type=int, default=2)
    add("--time-limit", type=float, default=120.0, help="seconds for one call")
    add("--memory-limit", type=float, default=10.0, help="resident GB of one process")
    add("--validation", type=int, default=1000, help="validation samples of the grid search")
    add("--grid-points", type=int, default=100)
    add("--tuning-batch", type=int, default=100, help="batch size of our grid search")
    add("--reference-points", type=int, default=2, help="grid points for laplace-torch")
    add("--reference-images", type=int, default=8, help="validation samples for laplace-torch")
    add("--reference-batches", nargs="+", type=int, default=[1, 4, 8], help="the fastest counts")
    add("--brute-force", type=int, help="grid points to check, in place of all (ResNet-20: 20)")
    add("--output", type=Path, default=Path("benchmarks/results"))
    return result


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure all cases; the report is rewritten after each."""
    options = parser().parse_args(arguments)
    results: dict[str, dict[str, Any]] = {}
    trained, real = options.weights is not None, options.images is not None
    for name in options.cases:
        results[name] = measure_case(name, options)
        report = markdown(results, options)
        record = settings(options, trained_weights=trained, real_images=real)
        write(options.output, "predictive", report, record | results)
    print(report)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
