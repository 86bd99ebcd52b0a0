"""The demo: an over-confident network on the digits, and what a small curvature budget makes of it.

Eight of scikit-learn's ten digits train a small CNN past the point where its confidence is honest.
A posterior from a few of its training samples is then compared with what it has to beat, on a clean
test split with the two other digits as inputs from elsewhere, and on noisy and rotated splits.
"""

from __future__ import annotations

import json
import warnings
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


def run_demo(
    output: Path, n_samples: int, seed: int, *, quick: bool, progress_bar: bool
) -> dict[str, Comparison]:
    """Run the comparison; print it, and write ``results.md``, ``results.json`` and figures.

    Everything depends on the arguments alone, and the global random number generators are left as
    they were.

    Args:
        output: folder for tables, numbers and figures; made if need be.
        n_samples: curvature budget m.
        seed: of the splits, the network and the draws.
        quick: a smoke test in seconds: few epochs, few images. Its numbers mean nothing.
        progress_bar: show progress on the standard error stream.

    Returns:
        By test split: "clean" (with inputs from elsewhere), "noisy", "rotated".

    Raises:
        ValueError: for a value out of range.
        OSError: if the output folder cannot be written; before any work is done.
    """
    most = _QUICK_TRAIN if quick else N_TRAIN
    if not 2 <= n_samples <= most:
        raise ValueError(
            f"samples must lie between 2 and {most}, the size of the training split; got "
            f"{n_samples}."
        )
    if not 0 <= seed < 2**32:
        raise ValueError(f"seed must lie between 0 and 2**32 - 1; got {seed}.")
    output.mkdir(parents=True, exist_ok=True)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # on tensors this small, several mostly wait for each other
    try:
        with preserved_rng(seed), warnings.catch_warnings():
            # Of the last layer, where its prior helps nothing: the table shows it.
            warnings.filterwarnings("ignore", "the best prior precision", UserWarning)
            comparisons, about, bias = _compared(n_samples, seed, quick, progress_bar)
    finally:
        torch.set_num_threads(threads)
    texts = [f"{k.capitalize()} test split\n\n{found!r}" for k, found in comparisons.items()]
    texts = [about, *texts, bias]
    print("\n\n".join(texts))
    figures = {name: f"{name}.png" for name in comparisons}
    for name, comparison in comparisons.items():
        comparison.plot().savefig(output / figures[name])
    text = "\n\n".join(["# Digits", *texts, *(f"![{k}]({v})" for k, v in figures.items())])
    (output / "results.md").write_text(text + "\n", encoding="utf-8")
    numbers: dict[str, Any] = {"seed": seed, "n_samples": n_samples, "quick": quick}
    numbers |= {name: comparison.to_dict() for name, comparison in comparisons.items()}
    (output / "results.json").write_text(json.dumps(numbers, indent=2) + "\n")
    print(f"\nWritten to {output}: results.md, results.json, {', '.join(figures.values())}")
    return comparisons


def _compared(
    n_samples: int, seed: int, quick: bool, progress_bar: bool
) -> tuple[dict[str, Comparison], str, str]:
    """Comparisons by test split; what has to be known to read them; the bias of one batch."""
    splits = load_splits(seed)
    if quick:
        for name, split in splits.items():
            first = slice(_QUICK_TRAIN if name == "train" else _QUICK_OTHERS)
            splits[name] = TensorDataset(*split[first])
    train, validation = splits["train"], batches(splits["validation"])
    epochs = 10 if quick else 50
    model = train_network(train, epochs=epochs, seed=seed, progress_bar=progress_bar)
    la = DebiasedLaplace(model)
    la.fit(batches(train), n_samples=n_samples, seed=seed)
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
        f"{n_samples} of them, tuned on {len(splits['validation'])} others. Inputs from "
        f"elsewhere: the digits {' and '.join(map(str, HELD_OUT_DIGITS))}. Noisy: standard "
        f"deviation {HEAVY_NOISE_STD:g} of 16 grey levels. Rotated: by {ROTATION_DEGREES:g} "
        "degrees to either side."
    )
    return comparisons, about, str(la.bias_report())
