"""Outcomes: what users get from posteriors and baselines on trained networks.

python -m benchmarks.outcomes --problems digits survival
python -m benchmarks.outcomes --problems resnet20 --images cifar10.npz --weights20 resnet20.pt
python -m benchmarks.outcomes --problems resnet56 --images cifar10.npz --weights56 resnet56.pt
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

import torch
from tqdm import tqdm

from benchmarks.common.tables import machine, machine_line
from benchmarks.outcomes import report, survival
from benchmarks.outcomes.methods import METHODS, run
from benchmarks.outcomes.problems import Problem, digits, public_resnet


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the chosen problems; each writes Markdown, JSON and a figure."""
    options = _parse(arguments)
    torch.set_num_threads(options.threads)
    facts = machine(options.threads)
    for name in options.problems:
        if name == "survival":
            found = survival.measure(
                options.budget, options.draws, options.epochs, options.label_noise
            )
            text, results, drawn = (
                survival.markdown(found),
                found.to_dict(),
                survival.figure(found),
            )
        else:
            problem = _problem(name, options).on(options.device)
            methods = [m for m in METHODS[1:] if _is_wanted(m.name, options.only)]
            outcomes = [
                run(method, problem, options.batch, options.seed)
                for method in tqdm([METHODS[0], *methods], desc=problem.title)
            ]
            rows = report.rows_of(problem, outcomes)
            text, drawn = report.markdown(problem, rows), report.figure(problem, rows)
            results = {"problem": problem.title, "rows": [row.to_dict() for row in rows]}
        print(text, flush=True)
        line = machine_line(facts)
        if options.device.type == "cuda":
            line = line.replace("no accelerator", torch.cuda.get_device_name(options.device))
        written = f"{text}\n\n{line}"
        report.write(
            options.output, f"outcomes_{name}", written, {"machine": facts, **results}, drawn
        )
    return 0


def _is_wanted(name: str, only: Sequence[str] | None) -> bool:
    return only is None or any(part in name for part in only)


def _problem(name: str, options: argparse.Namespace) -> Problem:
    if name == "digits":
        return digits(options.limit)
    weights = options.weights20 if name == "resnet20" else options.weights56
    return public_resnet(int(name[-2:]), weights, options.images, options.limit)


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.outcomes", description=__doc__)
    known = ["digits", "resnet20", "resnet56", "survival"]
    parser.add_argument("--problems", nargs="+", choices=known, default=["digits", "survival"])
    parser.add_argument("--images", type=Path, help=".npz with Xtr, Ytr, Xte, Yte")
    parser.add_argument("--weights20", type=Path, help="state dict of the public ResNet-20")
    parser.add_argument("--weights56", type=Path, help="state dict of the public ResNet-56")
    parser.add_argument("--only", nargs="*", help="methods beside the five lines, by part of name")
    parser.add_argument("--limit", type=int, help="so many test images only")
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--seed", type=int, default=0, help="of the two halves")
    parser.add_argument("--budget", type=int, default=64, help="survival: samples of curvature")
    parser.add_argument("--draws", type=int, default=5, help="survival: draws of them")
    parser.add_argument("--epochs", type=int, default=30, help="survival: of training")
    parser.add_argument("--label-noise", type=float, default=0.1, help="survival: random labels")
    parser.add_argument("--device", type=torch.device, default=torch.device("cpu"))
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--output", type=Path, default=Path("benchmarks/results"))
    options = parser.parse_args(arguments)
    for name, weights in (("resnet20", options.weights20), ("resnet56", options.weights56)):
        if name in options.problems and (weights is None or options.images is None):
            parser.error(f"--problems {name} needs --images and --weights{name[-2:]}")
    return options


if __name__ == "__main__":
    raise SystemExit(main())
