"""The command line: ``laplace-debiased`` and ``python -m laplace_debiased``."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from laplace_debiased._version import __version__

_USAGE_ERROR, _INTERRUPTED = 2, 130


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command.

    Args:
        arguments: what follows the program's name; ``sys.argv`` by default.

    Returns:
        The exit status: 0; 2 for bad arguments and failures that have a message; 130 after an
        interrupt.

    Raises:
        SystemExit: from argparse, with status 2 for arguments that cannot be parsed and 0 after
            ``--help`` and ``--version``.
    """
    parser = _parser()
    given = parser.parse_args(arguments)
    try:
        # Imported here: help and version need neither data nor plots.
        from laplace_debiased.demo import run_demo

        run_demo(
            given.output,
            given.samples,
            given.seed,
            quick=given.quick,
            progress_bar=not given.no_progress,
        )
    except (ValueError, RuntimeError, OSError) as error:
        print(f"{parser.prog}: error: {' '.join(str(error).split())}", file=sys.stderr)
        return _USAGE_ERROR
    except KeyboardInterrupt:
        print(f"{parser.prog}: interrupted", file=sys.stderr)
        return _INTERRUPTED
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="laplace-debiased",
        description="Calibrated uncertainty from a small curvature budget.",
    )
    parser.add_argument("--version", action="version", version=f"%(prog)s {__version__}")
    commands = parser.add_subparsers(title="commands", required=True, metavar="command")
    demo = commands.add_parser(
        "demo",
        help="a network trained on the digits, turned into calibrated predictions",
        description="Train a small network on scikit-learn's digits, compare its posterior with "
        "what it has to beat, and write tables and figures.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    demo.add_argument(
        "--output", type=Path, default=Path("demo-output"), help="folder for tables and figures"
    )
    demo.add_argument(
        "--samples", type=int, default=64, metavar="M", help="curvature budget in training samples"
    )
    demo.add_argument("--seed", type=int, default=0, help="seed of data, network and draw")
    demo.add_argument(
        "--quick", action="store_true", help="a smoke test in seconds; its numbers mean nothing"
    )
    demo.add_argument("--no-progress", action="store_true", help="no progress bars")
    return parser
