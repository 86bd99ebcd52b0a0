"""Train a small network with SGD, Adam and NewtonCG at equal cost, and say who wins.

Two questions, on scikit-learn's digits (8×8 images, 10 classes) and small convolutional
networks:

* **One step** (``--one-step`` for this one alone): early in training, which loss does one solve of
  the Newton system lead to, by textbook CG on 128 samples or by debiased CG on 64 + 64?
  On every network of ``--networks``.
* **Training** (``--training`` for this one alone): which loss does a run reach, at equal cost in
  gradients of single samples, on a network of 6,090 parameters? Every method's setting, one of
  four, is chosen by mean validation loss over seeds of its own; the results are those of others.

Costs are those of ``StepReport.sample_gradients``: a gradient counts 1 per sample, a
curvature-vector product 2, a forward pass 1/3. Running times are reported next to them.

    python -m benchmarks.optimise --output benchmark-output
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

import torch
from matplotlib.figure import Figure

from benchmarks.common.digits import NETWORKS
from benchmarks.optimise import one_step, training
from benchmarks.optimise.digits import Digits


def plot(steps: Sequence[one_step.OneStep], runs: Sequence[training.Run]) -> Figure:
    """Loss after one solve by draw, a panel per network; training loss against cost by run."""
    names = list(dict.fromkeys(step.network for step in steps))
    n_panels = len(names) + bool(runs)
    figure = Figure(figsize=(4.8 * n_panels, 4.2), layout="constrained")
    panels = list(figure.subplots(1, n_panels, squeeze=False)[0])
    for name in names:
        one_step.plot_steps(panels.pop(0), [step for step in steps if step.network == name])
    if runs:
        training.plot_runs(panels.pop(0), runs)
    return figure


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("--output", type=Path, default=Path("benchmark-output"))
    parser.add_argument("--seeds", type=int, default=5, help="runs per method and setting")
    parser.add_argument("--epochs", type=float, default=30.0, help="cost of a training run")
    parser.add_argument(
        "--networks",
        nargs="+",
        choices=list(NETWORKS),
        default=[training.NETWORK],
        help="of the single solves",
    )
    parser.add_argument("--one-step", action="store_true", help="only the single solves")
    parser.add_argument("--training", action="store_true", help="only the training runs")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    digits, report = Digits.load(), ["# Debiased conjugate gradients as an optimiser"]
    steps: list[one_step.OneStep] = []
    runs: list[training.Run] = []
    if not arguments.training:
        # Nothing is tuned here, so the validation part may train as well.
        X, y = (torch.cat(pair) for pair in zip(digits.train, digits.validation, strict=True))
        steps = [
            one_step.one_step((X, y), name, seed, lr)
            for name in arguments.networks
            for lr in one_step.STEP_RATES
            for seed in range(arguments.seeds)
        ]
        report += ["## One solve, damping 1e-4, 40 iterations, 5 draws", one_step.table(steps)]
    if not arguments.one_step:
        methods = [training.choose(name, digits, arguments.epochs) for name in training.METHODS]
        seeds = range(arguments.seeds)
        runs = [
            training.train(method, digits, s, arguments.epochs) for method in methods for s in seeds
        ]
        title = f"## Training at the cost of {arguments.epochs:g} epochs, {len(seeds)} seeds"
        report += [title, training.table(runs)]
    text = "\n\n".join(report)
    arguments.output.mkdir(parents=True, exist_ok=True)
    results = {"one_step": [asdict(s) for s in steps], "training": [asdict(r) for r in runs]}
    (arguments.output / "optimise.json").write_text(json.dumps(results, indent=1))
    (arguments.output / "optimise.md").write_text(text + "\n")
    plot(steps, runs).savefig(arguments.output / "optimise.png", dpi=150)
    print(text)


if __name__ == "__main__":
    main()
