"""The demo: an over-confident network on the digits, and what a small curvature budget makes of it.

Eight of scikit-learn's ten digits train a small CNN past the point where its confidence is honest.
A posterior from a few of its training samples is then compared with what it has to beat, on a clean
test split with the two other digits as inputs from elsewhere, and on noisy and rotated splits.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import TensorDataset

from laplace_debiased.calibration import Comparison, compare
from laplace_debiased.demo.digits import (
    HEAVY_NOISE_STD,
    HELD_OUT_DIGITS,
    N_TRAIN,
    ROTATION_DEGREES,
    batches,
    load_splits,
    train_network,
)
from laplace_debiased.factory import DebiasedLaplace
from laplace_debiased.network.rng import preserved_rng

_QUICK_TRAIN, _QUICK_OTHERS = 160, 32


@dataclass(frozen=True)
class DemoOptions:
    """What the demo does.

    Attributes:
        output: folder for tables, numbers and figures; made if need be.
        n_samples: curvature budget m.
        seed: of the splits, the network and the draws.
        quick: a smoke test in seconds: few epochs, few images. Its numbers mean nothing.
        progress_bar: show progress on the standard error stream.

    Raises:
        ValueError: for a value out of range.
    """

    output: Path = Path("demo-output")
    n_samples: int = 64
    seed: int = 0
    quick: bool = False
    progress_bar: bool = True

    def __post_init__(self) -> None:
        most = _QUICK_TRAIN if self.quick else N_TRAIN
        if not 2 <= self.n_samples <= most:
            raise ValueError(
                f"samples must lie between 2 and {most}, the size of the training split; "
                f"got {self.n_samples}."
            )
        if not 0 <= self.seed < 2**32:
            raise ValueError(f"seed must lie between 0 and 2**32 - 1; got {self.seed}.")


@dataclass(frozen=True, eq=False)
class DemoResult:
    """What a run found.

    Attributes:
        comparisons: by test split: "clean" (with inputs from elsewhere), "noisy", "rotated".
        bias: how far a single batch's curvature is off, in words.
        about: what has to be known to read the tables.
    """

    comparisons: dict[str, Comparison]
    bias: str
    about: str

    def texts(self) -> Iterator[str]:
        """Everything, one text at a time; tables are Markdown."""
        yield self.about
        for name, comparison in self.comparisons.items():
            yield f"{name.capitalize()} test split\n\n{comparison!r}"
        yield self.bias


def run_demo(options: DemoOptions, echo: Callable[[str], None] = print) -> DemoResult:
    """Run the comparison and write ``results.md``, ``results.json`` and a figure for every split.

    Args:
        options: what to do.
        echo: takes the tables and what was written, one text at a time.

    Returns:
        The numbers.

    Raises:
        OSError: if the output folder cannot be written; before any work is done.
    """
    options.output.mkdir(parents=True, exist_ok=True)
    result = measure(options)
    for text in result.texts():
        echo(text + "\n")
    figures = []
    for name, comparison in result.comparisons.items():
        figures.append(f"{name}.png")
        comparison.plot().savefig(options.output / figures[-1])
    links = [f"![{Path(name).stem}]({name})" for name in figures]
    text = "\n\n".join(["# Digits", *result.texts(), *links])
    (options.output / "results.md").write_text(text + "\n", encoding="utf-8")
    numbers: dict[str, Any] = {
        "seed": options.seed,
        "n_samples": options.n_samples,
        "quick": options.quick,
        **{name: comparison.to_dict() for name, comparison in result.comparisons.items()},
    }
    (options.output / "results.json").write_text(json.dumps(numbers, indent=2) + "\n")
    echo(f"Written to {options.output}: results.md, results.json, {', '.join(figures)}")
    return result


def measure(options: DemoOptions) -> DemoResult:
    """Do all of the demo's work and write nothing.

    Everything depends on the options alone, and the global random number generators are left as
    they were.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # on tensors this small, several mostly wait for each other
    try:
        with preserved_rng(options.seed), warnings.catch_warnings():
            # Of the last layer, where its prior helps nothing: the table shows it.
            warnings.filterwarnings("ignore", "the best prior precision", UserWarning)
            return _measured(options)
    finally:
        torch.set_num_threads(threads)


def _measured(options: DemoOptions) -> DemoResult:
    seed, progress_bar = options.seed, options.progress_bar
    splits = load_splits(seed)
    if options.quick:
        for name, split in splits.items():
            first = slice(_QUICK_TRAIN if name == "train" else _QUICK_OTHERS)
            splits[name] = TensorDataset(*split[first])
    train, validation = splits["train"], batches(splits["validation"])
    epochs = 10 if options.quick else 50
    model = train_network(train, epochs=epochs, seed=seed, progress_bar=progress_bar)
    la = DebiasedLaplace(model)
    la.fit(batches(train), n_samples=options.n_samples, seed=seed)
    la.optimize_prior_precision(val_loader=validation)
    comparisons = {
        name: compare(
            la,
            validation,
            batches(splits[name]),
            ood_loader=batches(splits["ood"]) if name == "clean" else None,
            seed=seed,
            progress_bar=progress_bar,
        )
        for name in ("clean", "noisy", "rotated")
    }
    about = (
        f"A small CNN, over-trained on {len(train)} noisy digits 0 to 7; a posterior from "
        f"{options.n_samples} of them, tuned on {len(splits['validation'])} others. Inputs from "
        f"elsewhere: the digits {' and '.join(map(str, HELD_OUT_DIGITS))}. Noisy: standard "
        f"deviation {HEAVY_NOISE_STD:g} of 16 grey levels. Rotated: by {ROTATION_DEGREES:g} "
        "degrees to either side."
    )
    return DemoResult(comparisons, str(la.bias_report()), about)
