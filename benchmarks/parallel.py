"""Fit and evaluation on one process and on several, one torch thread each.

Every world starts its processes anew; all see the same data. A fit is repeated at half of its
samples: what is moved between processes must not depend on how many there are. Bytes are those that
a rank hands over in sums, broadcasts and gatherings; memory is the peak of every rank's process.
With GPUs there are rows for as many ranks as there are of these, over NCCL.

    python -m benchmarks.parallel --images cifar10.zip --weights resnet20.pt
"""

from __future__ import annotations

import argparse
import datetime
import multiprocessing
import tempfile
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import wraps
from multiprocessing.queues import Queue
from pathlib import Path
from statistics import median
from typing import Any

import torch
import torch.distributed
from torch.distributed import distributed_c10d

from benchmarks.common.cases import build_case
from benchmarks.common.tables import machine, machine_line, ratio, seconds, settings, table, write
from benchmarks.common.worker import measured
from benchmarks.common.workers import GIGABYTE
from laplace_debiased import DebiasedLaplace, evaluate

MEGABYTE = 1e6


@dataclass(frozen=True)
class Row:
    """One call on one world.

    Attributes:
        call: "fit", "fit, half of the samples", "evaluate".
        backend: "gloo" or "nccl".
        world: number of processes.
        wall_s: median over repetitions of the slowest rank's seconds.
        moved_mb: bytes that rank 0 handed over, 10⁶.
        peak_gb: largest peak of a rank's resident memory, 10⁹ bytes.
    """

    call: str
    backend: str
    world: int
    wall_s: float
    moved_mb: float
    peak_gb: float


class Traffic:
    """Counts the bytes that this process hands to the others."""

    def __init__(self) -> None:
        self.bytes = 0
        for name, position in (("all_reduce", 0), ("broadcast", 0), ("all_gather", 1)):
            counted = self._counted(getattr(distributed_c10d, name), position)
            for module in (torch.distributed, distributed_c10d):
                setattr(module, name, counted)

    def _counted(self, function: Callable[..., Any], position: int) -> Callable[..., Any]:
        @wraps(function)
        def call(*args: Any, **kwargs: Any) -> Any:
            self.bytes += args[position].nbytes
            return function(*args, **kwargs)

        return call


def rank_at_work(
    rank: int, meeting: str, world: int, backend: str, options: Any, out: Queue
) -> None:
    """One process: every call as often as it is asked for."""
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    device = torch.device("cuda", rank) if backend == "nccl" else torch.device("cpu")
    if backend == "nccl":
        torch.cuda.set_device(device)
    if world > 1 or backend == "nccl":
        torch.distributed.init_process_group(
            backend,
            init_method=f"file://{meeting}",
            rank=rank,
            world_size=world,
            timeout=datetime.timedelta(seconds=options.time_limit),
        )
    case = build_case(
        options.case,
        options.samples,
        options.validation,
        options.images and str(options.images),
        options.weights and str(options.weights),
    )
    model, traffic = case.model.to(device), Traffic()
    train = case.fit_loader(options.batch)
    validation = case.validation_loader(options.batch)
    part = "all" if case.last_layer is None else "last_layer"
    la = DebiasedLaplace(model, "classification", part, sampling="uniform")

    def fit(n_samples: int) -> dict[str, Any]:
        la.fit(train, n_samples=n_samples, n_data=case.n_data)
        return {}

    def score() -> dict[str, Any]:
        evaluate(la, validation)
        return {}

    calls: dict[str, Callable[[], dict[str, Any]]] = {
        "fit": lambda: fit(options.samples),
        "fit, half of the samples": lambda: fit(options.samples // 2),
        "evaluate": score,
    }
    for name, call in calls.items():
        for repetition in range(options.repetitions + 1):
            if torch.distributed.is_initialized():
                torch.distributed.barrier()
            before = traffic.bytes
            found = measured(call)
            if repetition:  # the first one warms up
                moved = traffic.bytes - before
                out.put((rank, name, found["wall_s"], moved, found["rss_peak_bytes"]))
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


def measure_world(world: int, backend: str, options: argparse.Namespace) -> list[Row]:
    """All calls on one world.

    Raises:
        RuntimeError: if a rank fails or takes too long.
    """
    context = multiprocessing.get_context("spawn")
    out: Queue = context.Queue()
    with tempfile.TemporaryDirectory() as folder:
        meeting = str(Path(folder, "meeting"))
        processes = [
            context.Process(target=rank_at_work, args=(rank, meeting, world, backend, options, out))
            for rank in range(world)
        ]
        for process in processes:
            process.start()
        n_calls = 3
        deadline = time.monotonic() + options.time_limit
        try:
            found = [
                out.get(timeout=max(0.0, deadline - time.monotonic()))
                for _ in range(n_calls * options.repetitions * world)
            ]
        finally:
            for process in processes:
                process.join(10)
                process.kill()
    return [_row(name, backend, world, found) for name in dict.fromkeys(f[1] for f in found)]


def _row(name: str, backend: str, world: int, found: list[tuple[Any, ...]]) -> Row:
    by_rank: dict[int, list[float]] = {}
    for rank, call, wall, _, _ in found:
        if call == name:
            by_rank.setdefault(rank, []).append(wall)
    slowest = [max(walls) for walls in zip(*by_rank.values(), strict=True)]
    return Row(
        name,
        backend,
        world,
        median(slowest),
        median(f[3] for f in found if f[1] == name and f[0] == 0) / MEGABYTE,
        max(f[4] for f in found if f[1] == name) / GIGABYTE,
    )


def measure(options: argparse.Namespace) -> list[Row]:
    """All worlds on the CPU, and on GPUs where there are some."""
    rows = [row for world in options.worlds for row in measure_world(world, "gloo", options)]
    if torch.cuda.is_available():
        n_gpus = torch.cuda.device_count()
        worlds = sorted({1, n_gpus})
        rows += [row for world in worlds for row in measure_world(world, "nccl", options)]
    return rows


def markdown(rows: Sequence[Row], options: argparse.Namespace) -> str:
    """The report."""
    first = {(row.call, row.backend): row for row in reversed(rows)}
    header = [
        "call",
        "processes",
        "s",
        "times as fast as the first",
        "MB moved",
        "peak GB per rank",
    ]
    cells = [
        [
            row.call,
            f"{row.world} ({row.backend})",
            seconds(row.wall_s),
            ratio(first[row.call, row.backend].wall_s, row.wall_s),
            f"{row.moved_mb:.2f}",
            f"{row.peak_gb:.2f}",
        ]
        for row in sorted(rows, key=lambda row: (row.call, row.backend, row.world))
    ]
    return "\n\n".join(
        [
            "# Many processes",
            f"{machine_line(machine(1))} {options.case}, m = {options.samples} samples in batches "
            f"of {options.batch}, {options.validation} samples evaluated; medians of "
            f"{options.repetitions} runs, of the slowest rank.",
            table(header, cells),
            "MB moved are what rank 0 hands over; a ring passes on up to twice as much.",
        ]
    )


def parser() -> argparse.ArgumentParser:
    """Command line."""
    result = argparse.ArgumentParser(prog="python -m benchmarks.parallel", description=__doc__)
    result.formatter_class = argparse.RawDescriptionHelpFormatter
    add = result.add_argument
    add("--case", default="resnet20", help="mlp, cnn, resnet20 or last<C>")
    add("--worlds", type=int, nargs="+", default=[1, 2])
    add("--images", type=Path, help="ImageFolder, or a zip of it, with train/ and test/")
    add("--weights", type=Path, help="state dict of the ResNet-20")
    add("--samples", type=int, default=512, help="samples whose curvature is computed, m")
    add("--validation", type=int, default=512, help="samples that are evaluated")
    add("--batch", type=int, default=64, help="batch size of the loaders")
    add("--repetitions", type=int, default=3)
    add("--time-limit", type=float, default=1800.0, help="seconds for one world")
    add("--output", type=Path, default=Path("benchmarks/results"))
    return result


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure and write the report."""
    options = parser().parse_args(arguments)
    options.threads = 1
    rows = measure(options)
    report = markdown(rows, options)
    write(options.output, "parallel", report, settings(options) | {"results": rows})
    print(report)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
