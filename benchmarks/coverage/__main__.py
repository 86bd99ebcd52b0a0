"""Coverage of real networks, seconds and memory of a fit on a few samples and of a prediction.

    python -m benchmarks.coverage --before PATH --output docs/coverage.md

``--before`` names a checkout of an earlier commit, which is asked for its coverage in a process of
its own; without it that column is empty. Weights are random.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

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


def coverages(checkout: str | None, names: Sequence[str]) -> dict[str, dict[str, Any]]:
    """Coverage of networks without a fit, in a process of its own.

    Args:
        checkout: of an earlier commit; None for this one.
        names: of the networks.
    """
    code = "import sys, runpy; sys.path.insert(0, sys.argv[1]); import laplace_debiased; " \
        "sys.path[0] = ''; sys.argv = ['', *sys.argv[2:]]; " \
        "runpy.run_module('benchmarks.coverage.subject', run_name='__main__')"  # fmt: skip
    command = [sys.executable, "-c", code, checkout or "", *names]
    run = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    found = [json.loads(line) for line in run.stdout.splitlines() if line.startswith("{")]
    return {entry["name"]: entry for entry in found}


def measure(name: str, options: argparse.Namespace) -> Row:
    """Fit and predict in a process of its own."""
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
        return Row(name, failure=failure)
    row = from_coverage(name, calls["fit"].values)
    return replace(
        row,
        fit_s=calls["fit"].wall_s,
        predict_s=calls["predict"].wall_s if "predict" in calls else None,
        peak_gb=max(call.rss_peak_bytes for call in calls.values()) / GIGABYTE,
        failure=failure,
    )


def from_coverage(name: str, found: dict[str, Any]) -> Row:
    """A row without a fit."""
    if "failure" in found:
        return Row(name, failure=found["failure"])
    trainable = found["trainable"]
    return Row(name, trainable, None, found["covered"] / trainable, found["reasons"])


def _share(value: float | str | None) -> str:
    return f"{100 * value:.2f} %" if isinstance(value, float) else value or ""


def _seconds(value: float | None) -> str:
    return "" if value is None else f"{value:.1f}"


def _costs(options: argparse.Namespace) -> str:
    return (
        f"Fits of {options.samples} samples of curvature, predictions of {options.batch} samples "
        f"(of the causal language model the last position), a process each."
    )


def markdown(rows: list[Row], options: argparse.Namespace) -> str:
    """The report."""
    lines = [
        "# Coverage of real networks",
        "",
        f"{machine_line(machine(options.threads))} Random weights.",
        *([] if options.coverage_only else [_costs(options)]),
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
    found.add_argument("--coverage-only", action="store_true", help="no fit, no prediction")
    found.add_argument("--samples", type=int, default=8)
    found.add_argument("--batch", type=int, default=4)
    found.add_argument("--threads", type=int, default=2)
    found.add_argument("--time-limit", type=float, default=180.0, help="seconds of a call")
    found.add_argument("--memory-limit", type=float, default=12.0, help="of a process, 10⁹ bytes")
    found.add_argument("--output", type=Path, default=Path("docs/coverage.md"))
    return found


def main() -> None:
    """Measure every network, and write the table after each."""
    options = parser().parse_args()
    earlier: dict[str, Any] = {}
    if options.before is not None:
        earlier = coverages(options.before, options.networks)
    now = coverages(None, options.networks) if options.coverage_only else {}
    rows: list[Row] = []
    for name in options.networks:
        row = from_coverage(name, now[name]) if options.coverage_only else measure(name, options)
        if name in earlier:
            past = from_coverage(name, earlier[name])
            row = replace(row, before=past.failure or past.covered)
        rows.append(row)
        print(row, flush=True)
        options.output.parent.mkdir(parents=True, exist_ok=True)
        options.output.write_text(markdown(rows, options))
        data = json.dumps([asdict(row) for row in rows], indent=1)
        options.output.with_suffix(".json").write_text(data + "\n")


if __name__ == "__main__":
    main()
