"""The demo: an over-confident network on the digits, and what a small curvature budget makes of it.

Eight of scikit-learn's ten digits train a small CNN past the point where its confidence is honest.
Then temperature scaling, laplace-torch's Kronecker posterior and ours are tuned on the same
validation split and scored on a clean, a noisy and a rotated test split and on the two digits that
were held out.
"""

from __future__ import annotations

import json
import textwrap
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from laplace_debiased.demo.comparison import compare
from laplace_debiased.demo.data import N_TRAIN, load_splits
from laplace_debiased.demo.figures import plot_reliability, plot_spectrum
from laplace_debiased.demo.network import train_network
from laplace_debiased.demo.report import as_dict, notes, tables
from laplace_debiased.demo.results import Comparison
from laplace_debiased.demo.spectra import Spectrum, measure_spectrum
from laplace_debiased.network.rng import preserved_rng

__all__ = ["DemoOptions", "Measurements", "measure", "run_demo"]

_EPOCHS, _QUICK_EPOCHS = 50, 10
_QUICK_TRAIN, _QUICK_OTHERS = 160, 32
_NOTE_WIDTH = 100


@dataclass(frozen=True)
class DemoOptions:
    """What the demo does.

    Attributes:
        output: folder for tables, numbers and figures; made if need be.
        n_samples: curvature budget m.
        n_draws: draws of it; tables show mean and standard error over them.
        seed: of the splits, the network and the draws.
        quick: a smoke test in seconds: few epochs, few images, one draw. Its numbers mean
            nothing.
        progress_bar: show progress on the standard error stream.

    Raises:
        ValueError: for a value out of range.
    """

    output: Path = Path("demo-output")
    n_samples: int = 64
    n_draws: int = 5
    seed: int = 0
    quick: bool = False
    progress_bar: bool = True

    def __post_init__(self) -> None:
        most = (_QUICK_TRAIN if self.quick else N_TRAIN) // 2
        if not 2 <= self.n_samples <= most:
            raise ValueError(
                f"samples must lie between 2 and {most}, half of the training split; "
                f"got {self.n_samples}."
            )
        if self.n_draws < 1:
            raise ValueError(f"draws must be at least 1; got {self.n_draws}.")
        if not 0 <= self.seed < 2**32:
            raise ValueError(f"seed must lie between 0 and 2**32 - 1; got {self.seed}.")

    @property
    def epochs(self) -> int:
        """Epochs of training."""
        return _QUICK_EPOCHS if self.quick else _EPOCHS

    @property
    def draws_made(self) -> int:
        """Draws of the budget: one in a quick run."""
        return 1 if self.quick else self.n_draws


def run_demo(options: DemoOptions, echo: Callable[[str], None] = print) -> Comparison:
    """Run the comparison and write ``results.md``, ``results.json`` and two figures.

    Args:
        options: what to do.
        echo: takes the tables and what was written, one text at a time.

    Returns:
        The numbers.

    Raises:
        OSError: if the output folder cannot be written; before any work is done.
    """
    options.output.mkdir(parents=True, exist_ok=True)
    measurements = measure(options)
    comparison = measurements.comparison
    for table in tables(comparison):
        echo(table.text(comparison) + "\n")
    for note in notes(comparison):
        echo(textwrap.fill(note, _NOTE_WIDTH, initial_indent="* ", subsequent_indent="  "))
    shown = [comparison.row(key) for key in ("map", "temperature", "laplace", "ours")]
    figures = {
        "reliability.png": plot_reliability(shown, "noisy"),
        "eigenvalues.png": plot_spectrum(measurements.spectrum),
    }
    for name, figure in figures.items():
        figure.savefig(options.output / name)
    _write_results(comparison, _settings(options), options.output, list(figures))
    echo(f"\nWritten to {options.output}: results.md, results.json, {', '.join(figures)}")
    return comparison


@dataclass(frozen=True, eq=False)
class Measurements:
    """All numbers of a run: the tables', and those of the figure of eigenvalues."""

    comparison: Comparison
    spectrum: Spectrum


def measure(options: DemoOptions) -> Measurements:
    """Do all of the demo's work and write nothing.

    Everything but times depends on the options alone, and the global random number generators are
    left as they were.
    """
    with preserved_rng(options.seed), _one_thread():
        splits = load_splits(options.seed)
        if options.quick:
            splits = splits.truncated(_QUICK_TRAIN, _QUICK_OTHERS)
        model = train_network(
            splits.train,
            epochs=options.epochs,
            seed=options.seed,
            progress_bar=options.progress_bar,
        )
        comparison = compare(
            model,
            splits,
            n_samples=options.n_samples,
            n_draws=options.draws_made,
            seed=options.seed,
            progress_bar=options.progress_bar,
        )
        spectrum = measure_spectrum(
            model,
            splits,
            n_samples=options.n_samples,
            n_batches=options.draws_made,
            seed=options.seed,
        )
    return Measurements(comparison, spectrum)


def _settings(options: DemoOptions) -> dict[str, Any]:
    return {
        "seed": options.seed,
        "n_samples": options.n_samples,
        "n_draws": options.draws_made,
        "epochs": options.epochs,
        "quick": options.quick,
    }


@contextmanager
def _one_thread() -> Iterator[None]:
    """Run torch on one thread: on tensors this small, several mostly wait for each other."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _write_results(
    comparison: Comparison, settings: dict[str, Any], output: Path, figures: list[str]
) -> None:
    parts = [
        "# Digits: calibration from a small curvature budget",
        *(table.markdown(comparison) for table in tables(comparison)),
        "## How to read this",
        "\n".join(f"* {note}" for note in notes(comparison)),
        *(f"![{Path(name).stem}]({name})" for name in figures),
    ]
    (output / "results.md").write_text("\n\n".join(parts) + "\n", encoding="utf-8")
    numbers = json.dumps(as_dict(comparison, settings), indent=2, allow_nan=False)
    (output / "results.json").write_text(numbers + "\n", encoding="utf-8")
