"""What a fit of few samples costs on large networks: seconds, memory and the saved file.

Each row is a process of its own: one fit, one prediction, one file. Weights and images are random;
``--sharpness`` makes the curvature as uneven as a trained network's.

    python -m benchmarks.budget --cases resnet18:8 resnet50:8 vit_b_16_64:8 linear:8 resnet18:256
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from benchmarks.common.tables import Summary, machine, machine_line, settings, table, write
from benchmarks.common.workers import GIGABYTE, Limits, Measurement, NoResult, Worker

FACTORY = "benchmarks.common.budgets:Budget"
BARS = {
    "linear:8": "0.5 s",
    "resnet18:8": "25 s",
    "resnet18:256": "300 s",
    "resnet50:8": "60 s",
    "vit_b_16_64:8": "150 s, 12 GB",
    "vit_b_16_224:8": "",
}
"""What a fit is to stay below, on two quiet cores; nothing is asked of a case without one."""


@dataclass(frozen=True)
class Cost:
    """One network with one budget.

    Attributes:
        case: network and samples, "resnet18:8".
        fit: of the fit.
        prediction: of one batch.
        stages: seconds of the fit by stage.
        samples: samples that passed through the network, by stage.
        file_share: bytes of the saved posterior over those of the weights, or None.
    """

    case: str
    fit: Summary
    prediction: Summary
    stages: dict[str, float]
    samples: dict[str, int]
    file_share: float | None


def measure(case: str, options: argparse.Namespace) -> Cost:
    """Fit, predict and save in one process."""
    network, samples = case.split(":")
    limits = Limits(options.time_limit, options.memory_limit)
    calls: dict[str, Measurement] = {}
    failure = None
    with Worker(FACTORY, options.threads, limits) as worker:
        try:
            worker.prepare(network=network, sharpness=options.sharpness)
            calls["fit"] = worker.call("fit", n_samples=int(samples))
            calls["predict"] = worker.call("predict", batch=options.batch)
            calls["save"] = worker.call("save")
        except NoResult as outcome:
            failure = str(outcome)
    summaries = [
        Summary.of([calls[name]]) if name in calls else Summary(failure=failure)
        for name in ("fit", "predict")
    ]
    values = calls["fit"].values if "fit" in calls else {"stages": {}, "samples": {}}
    share = None
    if "save" in calls:
        sizes = calls["save"].values
        share = sizes["file_bytes"] / sizes["weight_bytes"]
    return Cost(case, *summaries, values["stages"], values["samples"], share)


def markdown(costs: Sequence[Cost], options: argparse.Namespace) -> str:
    """The report."""
    header = ["network: samples", "fit, s", "GB", "bar", "stages, s", f"predict {options.batch}, s"]
    rows = [
        [
            cost.case,
            cost.fit.time_cell(),
            cost.fit.memory_cell(),
            BARS.get(cost.case, ""),
            ", ".join(f"{name} {seconds:.1f}" for name, seconds in cost.stages.items()) or "–",
            cost.prediction.time_cell(),
            cost.prediction.memory_cell(),
            "–" if cost.file_share is None else f"{cost.file_share:.2f}",
        ]
        for cost in costs
    ]
    return "\n\n".join(
        [
            "# What a budget costs",
            f"{machine_line(machine(options.threads))} Random weights (last layer times "
            f"{options.sharpness:g}) and images; all parameters, defaults but for the budget.",
            table([*header, "GB", "file / weights"], rows),
            "Seconds are elapsed (CPU seconds of all threads); memory is the peak of the whole "
            f"process in {GIGABYTE:.0e} bytes (its increase during the call).",
        ]
    )


def parser() -> argparse.ArgumentParser:
    """Command line."""
    result = argparse.ArgumentParser(prog="python -m benchmarks.budget", description=__doc__)
    result.formatter_class = argparse.RawDescriptionHelpFormatter
    add = result.add_argument
    add("--cases", nargs="+", default=list(BARS), help="network:samples")
    add("--sharpness", type=float, default=1.0, help="factor of the last layer's weights")
    add("--batch", type=int, default=4, help="inputs of the prediction")
    add("--threads", type=int, default=2)
    add("--time-limit", type=float, default=600.0, help="seconds for one call")
    add("--memory-limit", type=float, default=16.0, help="resident GB of one process")
    add("--output", type=Path, default=Path("benchmarks/results"))
    return result


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure and write the report."""
    options = parser().parse_args(arguments)
    costs: list[Cost] = []
    for case in options.cases:
        costs.append(measure(case, options))
        report = markdown(costs, options)
        write(options.output, "budget", report, settings(options) | {"results": costs})
    print(report)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
