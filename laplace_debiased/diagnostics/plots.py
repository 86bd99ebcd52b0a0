"""Figures of the diagnostics, from the plain values of what they show.

Matplotlib is imported where it is used; nothing is shown.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from laplace_debiased.diagnostics.eigen import Eigenpairs
from laplace_debiased.diagnostics.estimates import DirectionalQuadratic, MeanEstimate

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Quadratics = tuple[DirectionalQuadratic, DirectionalQuadratic, DirectionalQuadratic | None]
"""Those of the own batch, of another batch and, where there is one, of the reference."""

# Okabe and Ito's palette: told apart in print and by colour-blind readers.
OWN, OTHER, REFERENCE = "#D55E00", "#0072B2", "#000000"
_STYLES = (("own batch", OWN), ("other batch", OTHER), ("reference", REFERENCE))


def plot_quadratics(quadratics: Quadratics, axes: tuple[Axes, Axes] | None = None) -> Figure:
    """Slopes (above) and curvatures (below) by rank, on own batch, other batch and reference."""
    if axes is None:
        figure = new_figure(6.0, 5.4)
        upper = figure.add_subplot(2, 1, 1)
        axes = (upper, figure.add_subplot(2, 1, 2, sharex=upper))
    slope_axis, curvature_axis = axes
    shown = [(q, *style) for q, style in zip(quadratics, _STYLES, strict=True) if q is not None]
    for quadratic, name, colour in shown:
        label = f"{name} (n = {quadratic.n_samples})"
        _curve(slope_axis, quadratic.slope, label, colour)
        _curve(curvature_axis, quadratic.curvature, label, colour)
    slope_axis.axhline(0.0, color="0.6", linewidth=0.8, zorder=0)
    slope_axis.set_ylabel("directional slope")
    slope_axis.legend(frameon=False, fontsize="small", loc="upper right")
    curvature_axis.set_ylabel("directional curvature")
    curvature_axis.set_xlabel("eigenvector of the own batch, by rank")
    if all(bool((quadratic.curvature.mean > 0).all()) for quadratic, *_ in shown):
        curvature_axis.set_yscale("log")
    for axis in axes:
        tidy(axis)
    # A figure's figure is itself, a sub-figure's is the root: the one that can be saved.
    return slope_axis.figure.figure


def plot_eigenspaces(own: Eigenpairs, other: Eigenpairs) -> Figure:
    """Why the bias is there: two batches' spectra agree while their eigenvectors do not.

    Left the spectra; right, for each own eigenvector, the share of it that lies in the span of the
    other batch's top j eigenvectors, ‖V_{1..j}ᵀu_i‖².
    """
    from matplotlib.ticker import MaxNLocator

    k = min(own.vectors.shape[1], other.vectors.shape[1])
    ranks = np.arange(1, k + 1)
    figure = new_figure(9.2, 3.6)
    spectra, overlaps = figure.subplots(1, 2, gridspec_kw={"width_ratios": (1.0, 1.15)})
    spectra.semilogy(ranks, own.values[:k], color=OWN, label="own batch")
    spectra.semilogy(ranks, other.values[:k], color=OTHER, label="other batch")
    spectra.set_xlabel("rank")
    spectra.set_ylabel("eigenvalue")
    spectra.set_title("spectra", fontsize="medium")
    spectra.legend(frameon=False, fontsize="small")
    tidy(spectra)
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


def _curve(axis: Axes, estimate: MeanEstimate, label: str, colour: str) -> None:
    ranks = np.arange(1, len(estimate.mean) + 1)
    mean, error = estimate.mean.numpy(), estimate.stderr.numpy()
    axis.plot(ranks, mean, color=colour, linewidth=1.5, label=label)
    if colour != OWN and np.isfinite(error).all():
        # A band that reaches zero has no lower edge on a logarithmic axis; stop at a tenth.
        low = np.maximum(mean - error, 0.1 * mean) if (mean > 0).all() else mean - error
        axis.fill_between(ranks, low, mean + error, color=colour, alpha=0.18, linewidth=0)


def new_figure(width: float, height: float) -> Figure:
    """An empty figure, of so many inches; pyplot does not know it."""
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), layout="constrained")


def tidy(axis: Axes) -> None:
    """Fewer lines around, and a faint grid."""
    axis.spines[["top", "right"]].set_visible(False)
    axis.grid(True, which="major", color="0.92", linewidth=0.7)
    axis.set_axisbelow(True)
