"""Summaries of repeated calls, and results as markdown and JSON."""

from __future__ import annotations

import argparse
import json
import os
import platform
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from statistics import median
from typing import Any

from benchmarks.common.workers import GIGABYTE, Measurement


@dataclass(frozen=True)
class Summary:
    """Repetitions of one call, or why there are none.

    Attributes:
        wall_s: median of elapsed seconds.
        cpu_s: median of seconds of all threads.
        peak_gb: largest resident memory of the process, 10⁹ bytes.
        added_gb: largest increase of it during a call, 10⁹ bytes.
        repetitions: how many calls.
        failure: None, or why there is no figure.
    """

    wall_s: float | None = None
    cpu_s: float | None = None
    peak_gb: float | None = None
    added_gb: float | None = None
    repetitions: int = 0
    failure: str | None = None

    @classmethod
    def of(cls, calls: Sequence[Measurement], failure: str | None = None) -> Summary:
        """Summarise calls; with a failure, nothing else is said."""
        if failure is not None or not calls:
            return cls(failure=failure or "not run")
        return cls(
            median(call.wall_s for call in calls),
            median(call.cpu_s for call in calls),
            max(call.rss_peak_bytes for call in calls) / GIGABYTE,
            max(call.rss_peak_bytes - call.rss_before_bytes for call in calls) / GIGABYTE,
            len(calls),
        )

    def time_cell(self) -> str:
        """Elapsed and CPU seconds, or the failure."""
        if self.wall_s is None or self.cpu_s is None:
            return str(self.failure)
        return f"{seconds(self.wall_s)} ({seconds(self.cpu_s)})"

    def memory_cell(self) -> str:
        """Peak memory and its increase during the call."""
        if self.peak_gb is None or self.added_gb is None:
            return "–"
        return f"{self.peak_gb:.2f} (+{self.added_gb:.2f})"


def seconds(value: float) -> str:
    """Three digits, no exponent."""
    return f"{value:.0f}" if value >= 100 else f"{value:.3g}" if value >= 0.001 else f"{value:.4f}"


def ratio(numerator: float | None, denominator: float | None) -> str:
    """A ratio to two or three digits, "–" where one side is missing."""
    if numerator is None or denominator is None:
        return "–"
    value = numerator / denominator
    return f"{value:.0f}" if value >= 100 else f"{value:.1f}" if value >= 10 else f"{value:.2f}"


def number(value: float | None, form: str = ".1e") -> str:
    """A formatted number, "–" for None."""
    return "–" if value is None else format(value, form)


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A markdown table; the first column left, the others right."""
    rule = [":---"] + ["---:"] * (len(header) - 1)
    return "\n".join("| " + " | ".join(row) + " |" for row in (header, rule, *rows))


def machine(threads: int) -> dict[str, Any]:
    """What the figures depend on; no names of hosts."""
    packages = ("torch", "laplace-torch", "curvlinops-for-pytorch")
    return {
        "cores": len(os.sched_getaffinity(0)),
        "architecture": platform.machine(),
        "threads": threads,
        "python": platform.python_version(),
        "versions": {name: version(name) for name in packages},
    }


def machine_line(facts: dict[str, Any]) -> str:
    """One sentence of :func:`machine`."""
    versions = ", ".join(f"{name} {number}" for name, number in facts["versions"].items())
    return (
        f"{facts['cores']} CPU cores ({facts['architecture']}), {facts['threads']} torch "
        f"thread(s), Python {facts['python']}, {versions}; float32, no accelerator."
    )


def settings(options: argparse.Namespace, **more: Any) -> dict[str, Any]:
    """The machine, and the options of a run without paths, for its record."""
    plain = {k: v for k, v in vars(options).items() if k not in ("images", "weights", "output")}
    return {"machine": machine(options.threads), "options": plain | more}


def write(folder: Path, name: str, markdown: str, results: dict[str, Any]) -> None:
    """Write ``<name>.md`` and ``<name>.json``."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"{name}.md").write_text(markdown.rstrip() + "\n")
    text = json.dumps(results, indent=1, default=_plain)
    (folder / f"{name}.json").write_text(text + "\n")


def _plain(value: Any) -> Any:
    return asdict(value)
