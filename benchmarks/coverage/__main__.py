"""Coverage of real networks, seconds and memory of a fit on a few samples and of a prediction.

    python -m benchmarks.coverage --before PATH --output benchmarks/results/coverage.md

``--before`` names a checkout of an earlier commit, which is asked for its coverage in a process of
its own; without it that column is empty. Weights are random.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from dataclasses import asdict, dataclass
from pathlib import Path

from benchmarks.common.tables import machine, machine_line
from benchmarks.common.workers import GIGABYTE, Limits, Measurement, NoResult, Worker

FACTORY = "benchmarks.coverage.subject:Subject"


@dataclass(frozen=True)
class Row:
    """One network.

    Attributes:
        name: of it.
        trainable: parameter entries that require gradients.
        before: share of them that the earlier commit covers, or None.
        covered: share covered now, or None.
        reasons: entries left out, by reason.
        fit_s: seconds of the fit, or None.
        predict_s: seconds of the prediction, or None.
        peak_gb: largest resident memory of the process, 10⁹ bytes.
        failure: why there is no figure, or None.
    """

    name: str
    trainable: int | None = None
    before: float | str | None = None
    covered: float | None = None
    reasons: dict[str, int] | None = None
    fit_s: float | None = None
    predict_s: float | None = None
    peak_gb: float | None = None
    failure: str | None = None


def before(checkout: str | None, name: str) -> float | str | None:
    """What an earlier commit covers, or why that is not known."""
    if checkout is None:
        return None
    code = "import sys, runpy; sys.path.insert(0, sys.argv[1]); import laplace_debiased; " \
        "sys.path.pop(0); sys.path.insert(0, ''); " \
        "runpy.run_module('benchmarks.coverage.subject', run_name='__main__')"  # fmt: skip
    command = [sys.executable, "-c", code, checkout, name]
    try:
        run = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    except subprocess.TimeoutExpired:
        return "not in 120 s"
    if run.returncode != 0:
        return "fails: " + run.stderr.strip().splitlines()[-1][:80]
    return float(json.loads(run.stdout.strip().splitlines()[-1]))


def measure(name: str, options: argparse.Namespace) -> Row:
    """One row, in processes of its own."""
    earlier = before(options.before, name)
    calls: dict[str, Measurement] = {}
    failure = None
    limits = Limits(options.time_limit, options.memory_limit)
    with Worker(FACTORY, options.threads, limits) as worker:
        try:
            worker.prepare(name=name)
            calls["fit"] = worker.call("fit", n_samples=options.samples)
            calls["predict"] = worker.call("predict", batch=options.batch)
        except NoResult as outcome:
            failure = str(outcome)
    if "fit" not in calls:
        return Row(name, before=earlier, failure=failure)
    found = calls["fit"].values
    return Row(
        name,
        found["trainable"],
        earlier,
        found["covered"] / found["trainable"],
        found["reasons"],
        calls["fit"].wall_s,
        calls["predict"].wall_s if "predict" in calls else None,
        max(call.rss_peak_bytes for call in calls.values()) / GIGABYTE,
        failure,
    )


def _share(value: float | str | None) -> str:
    return f"{100 * value:.2f} %" if isinstance(value, float) else value or ""


def _seconds(value: float | None) -> str:
    return "" if value is None else f"{value:.1f}"


def markdown(rows: list[Row], options: argparse.Namespace) -> str:
    """The report."""
    lines = [
        "# Coverage of real networks",
        "",
        f"{machine_line(machine(options.threads))} Random weights; {options.samples} samples of "
        f"curvature, a prediction of {options.batch} samples (of the causal language model its "
        f"last position), {options.threads} threads, a process each.",
        "",
        "| network | trainable entries | by module type | by operation | left out | fit, s "
        "| predict, s | peak, GB |",
        "|---|---:|---:|---:|---|---:|---:|---:|",
    ]
    for row in rows:
        reasons = sorted((row.reasons or {}).items(), key=lambda item: -item[1])
        left = row.failure or "; ".join(f"{count:,}: {why}" for why, count in reasons[:2])
        trainable = "" if row.trainable is None else f"{row.trainable:,}"
        peak = "" if row.peak_gb is None else f"{row.peak_gb:.1f}"
        lines.append(
            f"| {row.name} | {trainable} | {_share(row.before)} | {_share(row.covered)} | {left} "
            f"| {_seconds(row.fit_s)} | {_seconds(row.predict_s)} | {peak} |"
        )
    return "\n".join(lines) + "\n"


def parser() -> argparse.ArgumentParser:
    """Options of the command line."""
    from benchmarks.coverage.networks import CASES

    found = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    found.add_argument("--networks", nargs="*", choices=list(CASES), default=list(CASES))
    found.add_argument("--before", help="checkout of an earlier commit")
    found.add_argument("--samples", type=int, default=8)
    found.add_argument("--batch", type=int, default=4)
    found.add_argument("--threads", type=int, default=2)
    found.add_argument("--time-limit", type=float, default=180.0, help="seconds of a call")
    found.add_argument("--memory-limit", type=float, default=12.0, help="of a process, 10⁹ bytes")
    found.add_argument("--output", type=Path, default=Path("benchmarks/results/coverage.md"))
    return found


def main() -> None:
    """Measure every network, and write the table after each."""
    options = parser().parse_args()
    rows: list[Row] = []
    for name in options.networks:
        rows.append(measure(name, options))
        print(rows[-1], flush=True)
        options.output.parent.mkdir(parents=True, exist_ok=True)
        options.output.write_text(markdown(rows, options))
        data = json.dumps([asdict(row) for row in rows], indent=1)
        options.output.with_suffix(".json").write_text(data + "\n")


if __name__ == "__main__":
    main()
