"""What calibration plots show, as plain numbers, and the plots."""

from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

import numpy as np

from laplace_debiased.calibration.batches import FloatArray

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_BLUE, _RED, _GRAY = "#4878a8", "#c44e52", "#555555"
N_LEVELS = 20


@dataclass(frozen=True)
class ReliabilityBins:
    """Accuracy against confidence of the top label.

    Attributes:
        edges: Bounds of the bins of confidence, one more than there are bins.
        counts: Number of samples in each bin.
        confidence: Mean confidence in each bin; NaN where it is empty.
        accuracy: Share of correct predictions in each bin; NaN where it is empty.
    """

    edges: tuple[float, ...]
    counts: tuple[int, ...]
    confidence: tuple[float, ...]
    accuracy: tuple[float, ...]

    @property
    def expected_error(self) -> float:
        """ECE: |accuracy − confidence| averaged over samples."""
        gap = np.abs(np.subtract(self.accuracy, self.confidence))
        return float(np.nansum(gap * np.array(self.counts)) / sum(self.counts))


@dataclass(frozen=True)
class IntervalCurve:
    """Share of targets inside central intervals, against the intervals' nominal level.

    Attributes:
        nominal: Nominal levels from 0 to 1.
        observed: Share of targets within the interval of each level.
        interval_coverage: That share at the nominal level 0.95.
    """

    nominal: tuple[float, ...]
    observed: tuple[float, ...]
    interval_coverage: float


def reliability_bins(confidence: FloatArray, correct: np.ndarray, n_bins: int) -> ReliabilityBins:
    """Equal-width bins of confidence [n] and correctness [n]; a bin is closed on its left."""
    edges = np.linspace(0.0, 1.0, n_bins + 1)
    # The inner edges alone: by round-off a confidence may lie above 1, and it counts all the same.
    index = np.digitize(confidence, edges[1:-1])
    counts = np.bincount(index, minlength=n_bins)
    sums = [np.bincount(index, values, n_bins) for values in (confidence, correct)]
    means = np.divide(sums, counts, out=np.full((2, n_bins), np.nan), where=counts > 0)
    return ReliabilityBins(*(tuple(part.tolist()) for part in (edges, counts, *means)))


def interval_curve(levels: FloatArray, coverage_level: float) -> IntervalCurve:
    """Curve of the levels at which targets enter their central intervals, of any shape."""
    nominal = np.linspace(0.0, 1.0, N_LEVELS + 1)
    sorted_levels = np.sort(levels, axis=None)
    observed = np.searchsorted(sorted_levels, nominal, side="right") / levels.size
    coverage = float(np.mean(levels <= coverage_level))
    return IntervalCurve(tuple(nominal.tolist()), tuple(observed.tolist()), coverage)


def plot_reliability_bins(bins: ReliabilityBins, ax: "Axes | None" = None) -> "Figure":
    """Accuracy against confidence, the gap between them, and where the confidences lie."""
    main = _new_axes() if ax is None else ax
    edges, counts = np.array(bins.edges), np.array(bins.counts)
    filled = counts > 0
    left, width = edges[:-1][filled], np.diff(edges)[filled]
    accuracy, confidence = np.array(bins.accuracy)[filled], np.array(bins.confidence)[filled]
    bar = partial(main.bar, left, width=width, align="edge", linewidth=0.6)
    bar(accuracy, color=_BLUE, edgecolor="white", label="accuracy")
    bar(
        confidence - accuracy,
        bottom=accuracy,
        color=("white", 0.6),
        edgecolor=_RED,
        hatch="////",
        label="gap to confidence",
    )
    main.plot([0, 1], [0, 1], color=_GRAY, linestyle="--", linewidth=1, label="calibrated")
    main.set(xlim=(0, 1), ylim=(0, 1), ylabel="accuracy")
    _despine(main)
    _head(main, f"ECE {100 * bins.expected_error:.2f} %, {counts.sum()} samples")
    main.tick_params(labelbottom=False)
    below = _axes_below(main)
    share = 100 * counts / counts.sum()
    below.bar(edges[:-1], share, np.diff(edges), align="edge", color=_GRAY, edgecolor="white")
    below.set(xlabel="confidence", ylabel="samples (%)", xlim=(0, 1))
    _despine(below)
    return _figure_of(main)


def plot_interval_curve(curve: IntervalCurve, ax: "Axes | None" = None) -> "Figure":
    """Observed coverage of central intervals against their nominal level."""
    main = _new_axes() if ax is None else ax
    nominal, observed = np.array(curve.nominal), np.array(curve.observed)
    main.plot([0, 1], [0, 1], color=_GRAY, linestyle="--", linewidth=1, label="calibrated")
    main.fill_between(nominal, nominal, observed, color=_RED, alpha=0.2, linewidth=0, label="gap")
    main.plot(nominal, observed, color=_BLUE, marker="o", markersize=3.5, label="observed")
    main.set(xlim=(0, 1), ylim=(0, 1), ylabel="share of targets inside")
    main.set(xlabel="nominal level of the central interval")
    _despine(main)
    _head(main, f"95 % intervals hold {100 * curve.interval_coverage:.1f} % of targets")
    return _figure_of(main)


def _new_axes() -> "Axes":
    # Not through pyplot: it would register the figure globally and keep it alive.
    from matplotlib.figure import Figure

    return Figure(figsize=(4.6, 6.0), dpi=120, layout="constrained").add_subplot()


def _axes_below(main: "Axes") -> "Axes":
    """Room for a second panel, cut out of the place of the first."""
    from mpl_toolkits.axes_grid1 import make_axes_locatable

    place = main.get_subplotspec()
    if place is None:
        divider = make_axes_locatable(main)
        return divider.append_axes("bottom", size="28%", pad=0.12, sharex=main)
    # A nested grid and not a divider: layout engines leave room for the labels of a grid's axes.
    grid = place.subgridspec(2, 1, height_ratios=(1.0, 0.28), hspace=0.08)
    main.set_subplotspec(grid[0])
    return main.figure.add_subplot(grid[1], sharex=main)


def _figure_of(ax: "Axes") -> "Figure":
    from matplotlib.figure import Figure

    figure = ax.get_figure(root=True)
    if not isinstance(figure, Figure):
        raise ValueError("ax must belong to a figure; create it with Figure().add_subplot().")
    return figure


def _head(ax: "Axes", title: str) -> None:
    # The legend goes above the square: an underconfident model's bars fill all of it.
    ax.set_title(title, pad=24)
    ax.legend(
        loc="lower center",
        bbox_to_anchor=(0.5, 0.99),
        ncols=3,
        frameon=False,
        fontsize="small",
        columnspacing=1.0,
        handletextpad=0.5,
    )


def _despine(ax: "Axes") -> None:
    ax.spines[["top", "right"]].set_visible(False)
