"""All benchmarks at small settings, one after the other: ``python -m benchmarks`` (some minutes).

Each one alone, at full size, is ``python -m benchmarks.<name> --help``.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

SMALL: dict[str, tuple[str, ...]] = {
    "predictive": (
        *("--cases", "mlp", "cnn", "last10", "last100", "--batches", "8", "16", "--tuning", "mlp"),
        *("--repetitions", "3", "--validation", "200", "--grid-points", "20"),
        *("--memory-limit", "4", "--time-limit", "60"),
    ),
    "fit": ("--case", "cnn", "--samples", "64", "--repetitions", "2"),
    "parallel": ("--case", "mlp", "--samples", "64", "--validation", "64", "--repetitions", "1"),
    "curvature_bias": ("--pairs", "2", "--k", "40"),
    "optimise": ("--one-step", "--seeds", "2"),
    "outcomes": ("--limit", "100", "--draws", "1", "--epochs", "5"),
    "thousand_classes": ("--parts", "language", "--tiny", "--sequences", "4"),
    "budget": ("--cases", "linear:8", "--threads", "1"),
    "fidelity": ("--problem", "digits", "--budgets", "128", "--draws", "2"),
}
"""Module and its arguments; each also takes ``--output``."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the benchmarks; a failing one does not keep the others from running."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument("--only", nargs="+", choices=list(SMALL), default=list(SMALL))
    parser.add_argument("--output", type=Path, default=Path("benchmark-output"))
    options = parser.parse_args(arguments)
    failed = []
    for name in options.only:
        print(f"== {name}", flush=True)
        start = time.monotonic()
        command = [sys.executable, "-W", "ignore", "-m", f"benchmarks.{name}", *SMALL[name]]
        status = subprocess.run([*command, "--output", str(options.output)], check=False).returncode
        print(f"== {name}: {time.monotonic() - start:.0f} s, status {status}\n", flush=True)
        failed += [name] if status else []
    if failed:
        print(f"failed: {', '.join(failed)}", file=sys.stderr)
    return 1 if failed else 0


if __name__ == "__main__":
    raise SystemExit(main())
