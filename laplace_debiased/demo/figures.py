"""The demo's figures. No pyplot state is touched; nothing is shown."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from torch import Tensor

from laplace_debiased.demo.results import Row
from laplace_debiased.demo.spectra import Spectrum

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

SMALLEST_SHOWN = 1e-5
"""Directions with less than this share of the largest full-data curvature are left out."""

_TOP, _MIDDLE, _LOW = "#D55E00", "#BBBBBB", "#0072B2"


def plot_reliability(rows: Sequence[Row], split: str) -> Figure:
    """Reliability diagrams side by side on one test split, each of the row's first draw.

    Args:
        rows: one panel each.
        split: "clean", "noisy" or "rotated".
    """
    figure = _figure(3.6 * len(rows), 5.0)
    for axis, row in zip(figure.subplots(1, len(rows), squeeze=False)[0], rows, strict=True):
        evaluation = row.draws[0].evaluations[split]
        evaluation.plot_reliability(axis)
        head = f"{row.name}\nNLL {evaluation.nll:.3f}, ECE {100 * (evaluation.ece or 0.0):.1f} %"
        axis.set_title(head, pad=24, fontsize="medium")
    n_samples = rows[0].draws[0].evaluations[split].n_samples
    figure.suptitle(f"Reliability on the {split} test split ({n_samples} images)")
    return figure


def plot_spectrum(spectrum: Spectrum) -> Figure:
    """Estimated eigenvalues against full-data directional curvature, one panel per estimate."""
    m, full = spectrum.n_samples, spectrum.full_data
    panels = (
        (spectrum.own_batch, f"single: the same {m} samples"),
        (spectrum.other_batch, f"two_batch: {m} other samples"),
        (spectrum.cross_fitted, f"cross_fit: the same {m} samples"),
    )
    figure = _figure(12.6, 5.0)
    axes = figure.subplots(1, len(panels), sharex=True, sharey=True)
    highest = float(full.max())
    limits = (SMALLEST_SHOWN * highest, 4 * highest)
    for axis, (estimate, title) in zip(axes, panels, strict=True):
        _scatter(axis, full, estimate, spectrum.ranks(), limits)
        axis.set_title(title, fontsize="medium")
    axes[0].set_ylabel("estimated eigenvalue")
    axes[1].set_xlabel("full-data curvature along the same direction (per-sample mean)")
    figure.suptitle(
        f"Directions from {m} samples ({len(full)} draws): estimated against full-data curvature"
    )
    return figure


def _scatter(
    axis: Axes, full: Tensor, estimate: Tensor, ranks: Tensor, limits: tuple[float, float]
) -> None:
    """One panel; directions are coloured by their rank in the batch that chose them."""
    n_params = ranks.shape[1]
    groups = (
        ("lower half", ranks >= n_params // 2, _LOW),
        ("between", (ranks < n_params // 2) & (ranks >= n_params // 10), _MIDDLE),
        ("top tenth", ranks < n_params // 10, _TOP),
    )
    for name, group, colour in groups:
        x, y = full[group], estimate[group]
        shown = x > limits[0]
        axis.plot(
            x[shown].numpy(),
            y[shown].clamp(*limits).numpy(),
            ".",
            color=colour,
            markersize=3.5,
            alpha=0.5,
            markeredgewidth=0,
            label=f"{name}: {float(y.sum() / x.sum()):.2f} of full-data curvature",
        )
    axis.plot(limits, limits, "--", color="0.2", linewidth=1)
    axis.set(xscale="log", yscale="log", xlim=limits, ylim=limits)
    handles, labels = axis.get_legend_handles_labels()
    axis.legend(
        handles[::-1],
        labels[::-1],
        title="rank in the batch that chose the directions",
        title_fontsize="small",
        fontsize="small",
        frameon=False,
        loc="upper left",
        markerscale=2.5,
    )
    axis.spines[["top", "right"]].set_visible(False)
    axis.grid(True, which="major", color="0.93", linewidth=0.7)
    axis.set_axisbelow(True)


def _figure(width: float, height: float) -> Figure:
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), dpi=120, layout="constrained")
