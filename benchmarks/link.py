"""What a link costs: its error at every prior, and its seconds beside the others'.

The public CIFAR-10 ResNet-20 with the fit of the README's five lines. The reference averages the
softmax in float64 over ten scrambled Sobol sequences of 2^14 points each (scipy), through an
eigenvalue root: none of it is the library's. An error is KL(reference ‖ link) per image.

    python -m benchmarks.link --images cifar10.npz --weights resnet20.pt
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import median
from typing import Any

import torch
from scipy.stats import norm, qmc
from torch import Tensor

from benchmarks.common.tables import machine_line, seconds, settings, table, write
from benchmarks.outcomes.problems import public_resnet
from laplace_debiased import DebiasedLaplace

LINKS: dict[str, dict[str, Any]] = {
    "mc": {"link_approx": "mc"},
    "probit": {"link_approx": "probit"},
    "100 random draws": {"link_approx": "mc", "n_samples": 100},
}
SEQUENCES, POINTS = 10, 14


def reference(mean: Tensor, covariance: Tensor) -> Tensor:
    """E[softmax(f)] [m, C] for f ~ N(μ [m, C], Σ [m, C, C]), to about 1e-6."""
    mean, covariance = mean.double(), covariance.double()
    values, vectors = torch.linalg.eigh(covariance)
    # Largest directions first: they get the best coordinates of the sequence.
    root = (vectors * values.clamp_min(0.0).sqrt().unsqueeze(-2)).flip(-1)
    total = torch.zeros_like(mean)
    for seed in range(SEQUENCES):
        points = qmc.Sobol(mean.shape[1], seed=seed + 1000).random_base2(POINTS)
        normal = torch.from_numpy(norm.ppf(points.clip(1e-12, 1 - 1e-12)))
        for row in range(len(mean)):
            total[row] += torch.softmax(mean[row] + normal @ root[row].T, -1).mean(0)
    return total / SEQUENCES


def divergences(exact: Tensor, given: Tensor) -> Tensor:
    """KL(exact ‖ given) [m] in nats."""
    return torch.nn.functional.kl_div(given.double().log(), exact, reduction="none").sum(-1)


def error_rows(la: Any, inputs: Tensor, priors: Sequence[float]) -> list[dict[str, Any]]:
    """Mean and largest error of every link at every prior."""
    rows = []
    for prior in priors:
        la.prior_precision = prior
        exact = reference(*la._glm_predictive_distribution(inputs))
        found: dict[str, Any] = {"prior": prior}
        for name, options in LINKS.items():
            errors = divergences(exact, la(inputs, **options))
            found[name] = {"mean": float(errors.mean()), "largest": float(errors.max())}
        rows.append(found)
        print(found, flush=True)
    return rows


def timed(calls: dict[str, Callable[[], Any]], repetitions: int) -> dict[str, float]:
    """Medians of seconds; calls take turns."""
    elapsed: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(repetitions):
        for name, call in calls.items():
            start = time.perf_counter()
            call()
            elapsed[name].append(time.perf_counter() - start)
    return {name: median(found) for name, found in elapsed.items()}


def markdown(record: dict[str, Any]) -> str:
    """Both tables."""
    head = ("prior precision", *LINKS)
    rows = [
        [f"{row['prior']:g}"]
        + [f"{1e3 * row[k]['mean']:.3f} ({1e3 * row[k]['largest']:.2f})" for k in LINKS]
        for row in record["errors"]
    ]
    text = "# Links\n\nKL in 1e-3 nats per image, mean (largest), from an exact average:\n\n"
    text += table(head, rows)
    rows = [[name, seconds(value)] for name, value in record["seconds"].items()]
    text += "\n\n" + table(("call, medians of calls that take turns", "seconds"), rows)
    return f"{text}\n\n{machine_line(record['machine'])}"


def parsed(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The options of a run."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.link", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--images", type=Path, required=True, help=".npz: Xtr, Ytr, Xte, Yte")
    parser.add_argument("--weights", type=Path, required=True, help="state dict")
    parser.add_argument("--samples", type=int, default=256, help="of the fit")
    parser.add_argument("--n-images", type=int, default=200, help="for errors")
    parser.add_argument("--batch", type=int, default=256, help="for seconds")
    parser.add_argument("--repetitions", type=int, default=5)
    parser.add_argument("--decades", type=int, nargs=2, default=(-4, 8), help="of the prior")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--output", type=Path, default=Path("benchmarks/results"))
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, print and write."""
    options = parsed(arguments)
    torch.set_num_threads(options.threads)
    problem = public_resnet(20, options.weights, options.images)
    la = DebiasedLaplace(problem.model)
    la.fit(problem.train, n_samples=options.samples, n_data=problem.n_data)
    inputs = problem.sets["clean"]
    first, last = options.decades
    priors = [10.0**power for power in range(first, last + 1)]
    record = settings(options)
    record["errors"] = error_rows(la, inputs[: options.n_images], priors)
    la.prior_precision = 1e4
    batch = inputs[: options.batch]
    calls = {
        f"la(x), {len(batch)} images, {name}": lambda name=name: la(batch, **LINKS[name])
        for name in ("mc", "probit")
    }
    record["seconds"] = timed(calls, options.repetitions)
    text = markdown(record)
    print(text)
    write(options.output, "link", text, record)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
