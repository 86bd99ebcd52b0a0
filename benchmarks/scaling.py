"""What a fit costs on 1 to 1,024 processes: a calculation from figures of one process.

Only one process is measured, here: a default fit of a ResNet-50 (random weights, 1,000 classes,
224 pixels) gives the seconds of a sample in both walks, a decomposition of side 2,048 those of a
cube of its side. Shapes of layers give, exactly, what is summed and broadcast and how
decompositions divide. Other networks take the seconds in proportion to the multiplications of a
forward pass, and to Σ d³. ``--walk`` and ``--decomposition`` put other machines' in their place.

    python -m benchmarks.scaling --threads 2
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torchvision
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from benchmarks.common.cases import LayerShape, layer_shapes
from benchmarks.common.tables import machine, machine_line, seconds, table
from laplace_debiased import DebiasedLaplace
from laplace_debiased.parallel.jobs import owners

SIDE = 2_048
WORLDS = (1, 2, 8, 64, 1024)
MAX_RANK = 1_024
FLOAT = 4


@dataclass(frozen=True)
class Subject:
    """A network.

    Attributes:
        name: its name.
        layers: the covered ones, weights as matrices.
        forward: multiplications of a forward pass of one sample.
    """

    name: str
    layers: list[LayerShape]
    forward: float

    @property
    def sides(self) -> list[int]:
        """Sides of all factors."""
        return [side for layer in self.layers for side in (layer.outputs, layer.inputs)]


def subjects() -> list[Subject]:
    """The three networks; a LoRA has ranks of 16 on queries and values of 32 layers of 4,096."""
    found = []
    for name, kind in {"ResNet-50": "resnet50", "ViT-B/16": "vit_b_16"}.items():
        with torch.device("meta"):
            model = torchvision.models.get_model(kind).eval()
            shapes = _shapes(model)
        found.append(Subject(name, shapes, sum(shape.size for shape in shapes)))
    tokens = 512
    adapters = [LayerShape(tokens, *pair) for pair in ((16, 4096), (4096, 16)) for _ in range(64)]
    return [*found, Subject("7 B with LoRA, 512 tokens", adapters, 7e9 * tokens)]


def _shapes(model: nn.Module) -> list[LayerShape]:
    """Of attention, which is one call with its parameters, what its weights say."""
    shapes = layer_shapes(model, torch.zeros(1, 3, 224, 224, device="meta"))
    for module in model.modules():
        if isinstance(module, nn.MultiheadAttention):
            size = module.embed_dim
            shapes.append(LayerShape(197, 3 * size, size))
    return shapes


def summed_entries(subject: Subject, m: int, folds: int) -> int:
    """Numbers that a rank hands to the sums of both walks: factors and tables of every fold."""
    factors = 0
    for layer in subject.layers:
        for side in (layer.outputs, layer.inputs):
            rows = m // folds * layer.positions
            factors += min(rows * side, side * (side + 1) // 2)
    ranks = [
        (min(layer.outputs, MAX_RANK) + 1) * (min(layer.inputs, MAX_RANK) + 1)
        for layer in subject.layers
    ]
    return folds * (factors + sum(ranks))


def broadcast_entries(subject: Subject, folds: int) -> int:
    """Numbers of all eigenbases: one per fold, and the posterior's."""
    return (folds + 1) * sum(side * min(side, MAX_RANK) for side in subject.sides)


def makespan(subject: Subject, world: int, sets: int) -> float:
    """Σ d³ of the rank with the most to decompose."""
    costs = [float(side) ** 3 for side in subject.sides for _ in range(sets)]
    chosen = owners(costs, world)
    loads = [0.0] * world
    for cost, rank in zip(costs, chosen, strict=True):
        loads[rank] += cost
    return max(loads)


def rows(subject: Subject, reference: Subject, options: argparse.Namespace) -> list[list[str]]:
    """One row per world."""
    m, folds = options.samples, 2
    per_sample = options.walk * subject.forward / reference.forward
    per_cube = options.decomposition / SIDE**3
    moved = FLOAT * (summed_entries(subject, m, folds) + broadcast_entries(subject, folds))
    cells, first = [], 0.0
    for world in WORLDS:
        passes = -(-m // world) * per_sample
        decompositions = per_cube * makespan(subject, world, folds + 1)
        # A ring sends each byte of a sum twice, of a broadcast once; here: all twice.
        network = 0.0 if world == 1 else 2 * moved / (options.bandwidth * 1e9)
        total = passes + decompositions + network
        first = first or total
        bytes_cell = "–" if world == 1 else f"{moved / 1e6:,.0f}"
        parts = [seconds(passes), seconds(decompositions)]
        parts += ["–" if world == 1 else seconds(network), seconds(total)]
        speed = f"{first / total:.1f}"
        cells.append([subject.name, f"{world:,}", *parts, bytes_cell, speed])
    return cells


class Noise(Dataset[tuple[Tensor, int]]):
    """Random images of ImageNet's size; labels are not read."""

    def __init__(self, n: int) -> None:
        self._n = n

    def __len__(self) -> int:
        return self._n

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return torch.randn(3, 224, 224, generator=torch.Generator().manual_seed(index)), 0


def measured_walk(n: int) -> float:
    """Seconds of both walks per sample: the first is warmed up by a fit of its own."""
    torch.manual_seed(0)
    la = DebiasedLaplace(torchvision.models.resnet50().eval(), sampling="uniform")
    for samples in (2, n):
        la.fit(DataLoader(Noise(n), batch_size=8), n_samples=samples)
    report = la.fit_report
    return sum(report.stages[name] / count for name, count in report.samples.items())


def measured_decomposition() -> float:
    """Seconds of one symmetric matrix of side ``SIDE``, the best of three."""
    rows = torch.randn(2 * SIDE, SIDE, generator=torch.Generator().manual_seed(0))
    matrix, found = rows.mT @ rows, []
    for _ in range(3):
        start = time.perf_counter()
        torch.linalg.eigh(matrix)
        found.append(time.perf_counter() - start)
    return min(found)


def main(arguments: Sequence[str] | None = None) -> int:
    """Print the table."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.scaling", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--samples", type=int, default=16_384, help="m")
    parser.add_argument("--walk", type=float, help="seconds per sample; default: measured")
    parser.add_argument("--decomposition", type=float, help=f"of side {SIDE}; default: measured")
    parser.add_argument("--measured-samples", type=int, default=16)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--bandwidth", type=float, default=10.0, help="GB/s between processes")
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    if options.walk is None:
        options.walk = measured_walk(options.measured_samples)
    if options.decomposition is None:
        options.decomposition = measured_decomposition()
    reference, *others = subjects()
    header = ["network", "processes", "passes s", "decompositions s", "network s", "fit s"]
    cells = [row for one in (reference, *others) for row in rows(one, reference, options)]
    print(table([*header, "MB per rank", "times as fast"], cells))
    walk, side = seconds(options.walk), seconds(options.decomposition)
    print(f"\nResNet-50: {walk} s per sample in both walks; side {SIDE:,}: {side} s.")
    print(machine_line(machine(options.threads)))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
