"""Figures of the diagnostics, from the plain values of what they show.

Matplotlib is imported where it is used; nothing is shown.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from laplace_debiased.diagnostics.eigen import Eigenpairs
from laplace_debiased.diagnostics.estimates import DirectionalQuadratic, MeanEstimate

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Quadratics = tuple[DirectionalQuadratic, DirectionalQuadratic, DirectionalQuadratic | None]
"""Those of the own batch, of another batch and, where there is one, of the reference."""

# Okabe and Ito's palette: told apart in print and by colour-blind readers.
OWN, OTHER, REFERENCE = "#D55E00", "#0072B2", "#000000"


def plot_quadratics(quadratics: Quadratics, axes: tuple[Axes, Axes] | None = None) -> Figure:
    """Slopes (above) and curvatures (below) by rank, on own batch, other batch and reference."""
    if axes is None:
        figure = _figure(6.0, 5.4)
        upper = figure.add_subplot(2, 1, 1)
        axes = (upper, figure.add_subplot(2, 1, 2, sharex=upper))
    slope_axis, curvature_axis = axes
    for estimate, name, colour, width in _roles(quadratics, "slope"):
        _curve(slope_axis, estimate, name, colour, width, band=colour != OWN)
    for estimate, name, colour, width in _roles(quadratics, "curvature"):
        _curve(curvature_axis, estimate, name, colour, width, band=colour != OWN)
    slope_axis.axhline(0.0, color="0.6", linewidth=0.8, zorder=0)
    slope_axis.set_ylabel("directional slope")
    slope_axis.legend(frameon=False, fontsize="small", loc="upper right")
    curvature_axis.set_ylabel("directional curvature")
    curvature_axis.set_xlabel("eigenvector of the own batch, by rank")
    if all(bool((e.mean > 0).all()) for e, *_ in _roles(quadratics, "curvature")):
        curvature_axis.set_yscale("log")
    for axis in axes:
        _tidy(axis)
    return _figure_of(slope_axis)


def plot_columns(titled: Mapping[str, Quadratics]) -> Figure:
    """Several of them side by side, one column each, titled by their keys."""
    figure = _figure(0.6 + 4.6 * len(titled), 5.4)
    grid = figure.subplots(2, len(titled), squeeze=False, sharex="col")
    for column, (title, quadratics) in enumerate(titled.items()):
        plot_quadratics(quadratics, (grid[0, column], grid[1, column]))
        grid[0, column].set_title(title, fontsize="medium")
        if column:
            for row in (0, 1):
                grid[row, column].set_ylabel("")
            legend = grid[0, column].get_legend()
            if legend is not None:
                legend.remove()
    return figure


def plot_eigenspaces(own: Eigenpairs, other: Eigenpairs) -> Figure:
    """Why the bias is there: two batches' spectra agree while their eigenvectors do not.

    Left the spectra; right, for each own eigenvector, the share of it that lies in the span of the
    other batch's top j eigenvectors, ‖V_{1..j}ᵀu_i‖².
    """
    from matplotlib.ticker import MaxNLocator

    k = min(own.vectors.shape[1], other.vectors.shape[1])
    ranks = np.arange(1, k + 1)
    figure = _figure(9.2, 3.6)
    spectra, overlaps = figure.subplots(1, 2, gridspec_kw={"width_ratios": (1.0, 1.15)})
    spectra.semilogy(ranks, own.values[:k], color=OWN, label="own batch")
    spectra.semilogy(ranks, other.values[:k], color=OTHER, label="other batch")
    spectra.set_xlabel("rank")
    spectra.set_ylabel("eigenvalue")
    spectra.set_title("spectra", fontsize="medium")
    spectra.legend(frameon=False, fontsize="small")
    _tidy(spectra)
    cosines = (own.vectors[:, :k].T @ other.vectors[:, :k].to(own.vectors)).square()
    share = cosines.cumsum(1).clamp(0.0, 1.0).cpu().numpy()
    image = overlaps.imshow(
        share,
        origin="lower",
        aspect="auto",
        cmap="viridis",
        vmin=0,
        vmax=1,
        extent=(0.5, k + 0.5, 0.5, k + 0.5),
    )
    overlaps.set_xlabel("top j eigenvectors of the other batch")
    overlaps.set_ylabel("own eigenvector, by rank")
    overlaps.set_title("overlap of eigenspaces", fontsize="medium")
    for axis in (overlaps.xaxis, overlaps.yaxis, spectra.xaxis):
        axis.set_major_locator(MaxNLocator(integer=True))
    figure.colorbar(image, ax=overlaps, label="share of it in their span")
    return figure


def plot_sweep(
    batch_sizes: tuple[int, ...],
    k: int,
    *,
    own_to_reference: Tensor,
    other_to_reference: Tensor,
    overlap: Tensor,
    spectrum_ratio: Tensor,
) -> Figure:
    """Ratios of the top k directions by batch size, mean over pairs ± standard error.

    Args:
        batch_sizes: the sizes [s].
        k: directions per batch.
        own_to_reference: own over reference curvature [s, pairs].
        other_to_reference: other batch's over reference curvature [s, pairs].
        overlap: eigenspace overlap of the two batches [s, pairs].
        spectrum_ratio: own eigenvalues over the other batch's at equal rank [s, pairs].
    """
    from matplotlib.ticker import LogLocator, NullFormatter, StrMethodFormatter

    figure = _figure(9.2, 3.6)
    ratios, overlaps = figure.subplots(1, 2)
    for values, name, colour in (
        (own_to_reference, "own batch / reference", OWN),
        (other_to_reference, "other batch / reference", OTHER),
    ):
        _errorbars(ratios, batch_sizes, values, name, colour)
    ratios.axhline(1.0, color="0.6", linewidth=0.8, zorder=0)
    ratios.set_ylabel(f"curvature ratio, median of top {k}")
    ratios.set_yscale("log")
    # Ratios span a fraction of a decade or several; these ticks are legible in both cases.
    ratios.yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 3.0, 5.0, 7.0)))
    ratios.yaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
    ratios.yaxis.set_minor_formatter(NullFormatter())
    _errorbars(overlaps, batch_sizes, overlap, "eigenspace overlap", "#009E73")
    _errorbars(overlaps, batch_sizes, spectrum_ratio, "ratio of eigenvalues", "#CC79A7")
    overlaps.axhline(1.0, color="0.6", linewidth=0.8, zorder=0)
    overlaps.set_ylim(bottom=0.0)
    overlaps.set_ylabel("between two batches")
    for axis in (ratios, overlaps):
        axis.set_xscale("log", base=2)
        axis.set_xticks(batch_sizes, [str(size) for size in batch_sizes])
        axis.set_xlabel("batch size")
        axis.legend(frameon=False, fontsize="small")
        _tidy(axis)
    return figure


def _roles(quadratics: Quadratics, what: str) -> list[tuple[MeanEstimate, str, str, float]]:
    styles = (
        ("own batch", OWN, 1.4),
        ("other batch", OTHER, 1.4),
        ("reference", REFERENCE, 1.6),
    )
    return [
        (getattr(q, what), f"{name} (n = {q.n_samples})", colour, width)
        for q, (name, colour, width) in zip(quadratics, styles, strict=True)
        if q is not None
    ]


def _curve(
    axis: Axes, estimate: MeanEstimate, name: str, colour: str, width: float, *, band: bool
) -> None:
    ranks = np.arange(1, len(estimate.mean) + 1)
    mean, error = estimate.mean.numpy(), estimate.stderr.numpy()
    axis.plot(ranks, mean, color=colour, linewidth=width, label=name)
    if band and np.isfinite(error).all():
        low = mean - error
        positive = mean > 0
        # A band that reaches zero has no lower edge on a logarithmic axis; stop at a tenth.
        low = np.where(positive & (low < 0.1 * mean), 0.1 * mean, low) if positive.all() else low
        axis.fill_between(ranks, low, mean + error, color=colour, alpha=0.18, linewidth=0)


def _errorbars(axis: Axes, sizes: tuple[int, ...], values: Tensor, name: str, colour: str) -> None:
    pairs = values.shape[1]
    error = values.std(1) / pairs**0.5 if pairs > 1 else torch.zeros(len(sizes))
    axis.errorbar(
        sizes,
        values.mean(1),
        yerr=error,
        color=colour,
        marker="o",
        markersize=4,
        capsize=2,
        linewidth=1.4,
        label=name,
    )


def _figure(width: float, height: float) -> Figure:
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), layout="constrained")


def _figure_of(axis: Axes) -> Figure:
    # A figure's figure is itself, a sub-figure's is the root: the one that can be saved.
    return axis.figure.figure


def _tidy(axis: Axes) -> None:
    axis.spines[["top", "right"]].set_visible(False)
    axis.grid(True, which="major", color="0.92", linewidth=0.7)
    axis.set_axisbelow(True)
