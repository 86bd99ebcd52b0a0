"""One solve of the Newton system early in training, by textbook and by debiased CG."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from matplotlib.axes import Axes
from torch import Tensor, nn

from benchmarks.common.digits import network
from benchmarks.optimise.digits import BATCH, LOSS, endless_batches, mean_loss
from laplace_debiased.optim import Termination, debiased_cg, model_quadratic

STEP_RATES = (0.05, 0.1, 0.2, 0.4)


@dataclass(frozen=True)
class OneStep:
    """Full training loss (mean over samples) before and after one solve, by draw [draws]."""

    network: str
    lr: float
    seed: int
    before: float
    single: list[float]
    debiased: list[float]

    @property
    def ratio(self) -> float:
        """Mean over the draws after textbook CG, over that after debiased CG."""
        return float(np.mean(self.single) / np.mean(self.debiased))


def one_step(
    data: tuple[Tensor, Tensor], name: str, seed: int, lr: float, draws: int = 5
) -> OneStep:
    """Three epochs of SGD, then one solve: damping 1e-4, 40 CG iterations, 128 samples in all.

    The draws differ in the samples alone. Both solves make 40 products with 128 samples.
    """
    X, y = data
    model = network(name, seed)
    _three_epochs(model, data, seed, lr)
    rule = Termination(40, relative_residual=0.0)
    single: list[float] = []
    debiased: list[float] = []
    for draw in range(draws):
        generator = torch.Generator().manual_seed(1000 * seed + draw)
        index = torch.randperm(len(y), generator=generator)[: 2 * BATCH]
        both, own, other = (
            model_quadratic(model, LOSS, [(X[i], y[i])], damping=1e-4)
            for i in (index, index[:BATCH], index[BATCH:])
        )
        for losses, pair in ((single, (both, None)), (debiased, (own, other))):
            x = debiased_cg(*pair, termination=rule, keep_vectors=False).solution
            losses.append(mean_loss(_moved(model, x), data))
    return OneStep(name, lr, seed, mean_loss(model, data), single, debiased)


def _three_epochs(model: nn.Module, data: tuple[Tensor, Tensor], seed: int, lr: float) -> None:
    optimizer = torch.optim.SGD(model.parameters(), lr=lr)
    batches = endless_batches(data, 32, seed)
    for _ in range(3 * (len(data[1]) // 32)):
        X, y = next(batches)
        optimizer.zero_grad()
        LOSS(model(X), y).backward()
        optimizer.step()


def _moved(model: nn.Module, displacement: Tensor) -> nn.Module:
    moved = copy.deepcopy(model)
    start = nn.utils.parameters_to_vector(moved.parameters()).detach()
    nn.utils.vector_to_parameters(start + displacement, moved.parameters())
    return moved


def table(results: Sequence[OneStep]) -> str:
    """Markdown: one line per run, then a summary per network and learning rate."""
    lines = [
        "| network | SGD lr | seed | loss before | after textbook CG | after debiased CG |"
        " ratio of means | ratio of medians |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for r in results:
        medians = np.median(r.single) / np.median(r.debiased)
        lines.append(
            f"| {r.network} | {r.lr:g} | {r.seed} | {r.before:.3f} | {np.mean(r.single):.3g} | "
            f"{np.mean(r.debiased):.3g} | {r.ratio:.1f} | {medians:.1f} |"
        )
    lines += [
        "",
        "| network | SGD lr | geometric mean of the ratios | runs at 5 or more | runs above 1 |",
        "|---|---|---|---|---|",
    ]
    for name, lr in dict.fromkeys((r.network, r.lr) for r in results):
        ratios = np.array([r.ratio for r in results if (r.network, r.lr) == (name, lr)])
        lines.append(
            f"| {name} | {lr:g} | {np.exp(np.log(ratios).mean()):.1f} | "
            f"{(ratios >= 5).sum()} of {len(ratios)} | {(ratios > 1).sum()} of {len(ratios)} |"
        )
    return "\n".join(lines)


def plot_steps(axes: Axes, steps: Sequence[OneStep]) -> None:
    """Losses before and after, by learning rate; all steps are of one network."""
    for shift, kind, color in ((0.93, "single", "tab:red"), (1.07, "debiased", "tab:blue")):
        places = [r.lr * shift for r in steps for _ in getattr(r, kind)]
        losses = [loss for r in steps for loss in getattr(r, kind)]
        axes.plot(places, losses, "o", color=color, alpha=0.5, markersize=4, label=f"{kind} CG")
    axes.plot([r.lr for r in steps], [r.before for r in steps], "k_", markersize=14, label="before")
    axes.set(xscale="log", yscale="log", xlabel="learning rate of three epochs of SGD")
    axes.set(ylabel="mean training loss after one solve", title=steps[0].network)
    axes.set_xticks(STEP_RATES, [f"{rate:g}" for rate in STEP_RATES])
    axes.minorticks_off()
    axes.legend(fontsize=8)
