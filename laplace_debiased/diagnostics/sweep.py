"""How the bias and the misalignment of eigenspaces shrink with batch size."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn
from torch.utils.data import default_collate
from tqdm import tqdm

from laplace_debiased.checks import as_integer, checked_flag, checked_integer, generator_seed
from laplace_debiased.diagnostics.eigen import eigenspace_overlap, top_eigenpairs
from laplace_debiased.diagnostics.plots import OTHER, OWN, new_figure, tidy
from laplace_debiased.diagnostics.profile import directional_profile
from laplace_debiased.errors import ArgumentTypeError

if TYPE_CHECKING:
    from matplotlib.figure import Figure


@dataclass(frozen=True, eq=False)
class BatchSizeSweep:
    """Bias of the top k directions by batch size, over pairs of disjoint batches.

    Attributes:
        batch_sizes: the sizes [s].
        k: directions per batch; where a batch has fewer, its own number.
        own_to_reference: own over reference curvature, median over directions [s, pairs].
        other_to_reference: other batch's over reference curvature, likewise.
        overlap: eigenspace overlap of the two batches [s, pairs], see `eigenspace_overlap`.
        spectrum_ratio: own eigenvalues over the other batch's at equal rank, median [s, pairs].
    """

    batch_sizes: tuple[int, ...]
    k: int
    own_to_reference: Tensor
    other_to_reference: Tensor
    overlap: Tensor
    spectrum_ratio: Tensor

    def plot(self) -> Figure:
        """Means over pairs ± standard errors by batch size; nothing is shown."""
        from matplotlib.ticker import LogLocator, NullFormatter, StrMethodFormatter

        figure = new_figure(9.2, 3.6)
        ratios, overlaps = figure.subplots(1, 2)
        for axis, values, name, colour in (
            (ratios, self.own_to_reference, "own batch / reference", OWN),
            (ratios, self.other_to_reference, "other batch / reference", OTHER),
            (overlaps, self.overlap, "eigenspace overlap", "#009E73"),
            (overlaps, self.spectrum_ratio, "ratio of eigenvalues", "#CC79A7"),
        ):
            mean, n_pairs = values.mean(1), values.shape[1]
            error = values.std(1) / n_pairs**0.5 if n_pairs > 1 else torch.zeros_like(mean)
            style = {"color": colour, "marker": "o", "markersize": 4, "capsize": 2}
            axis.errorbar(self.batch_sizes, mean, yerr=error, linewidth=1.4, label=name, **style)
        ratios.set_ylabel(f"curvature ratio, median of top {self.k}")
        ratios.set_yscale("log")
        # Ratios span a fraction of a decade or several; these ticks are legible in both cases.
        ratios.yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 3.0, 5.0, 7.0)))
        ratios.yaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
        ratios.yaxis.set_minor_formatter(NullFormatter())
        overlaps.set_ylim(bottom=0.0)
        overlaps.set_ylabel("between two batches")
        for axis in (ratios, overlaps):
            axis.axhline(1.0, color="0.6", linewidth=0.8, zorder=0)
            axis.set_xscale("log", base=2)
            axis.set_xticks(self.batch_sizes, [str(size) for size in self.batch_sizes])
            axis.set_xlabel("batch size")
            axis.legend(frameon=False, fontsize="small")
            tidy(axis)
        return figure

    def to_dict(self) -> dict[str, Any]:
        """Plain numbers, for JSON."""
        tensors = ("own_to_reference", "other_to_reference", "overlap", "spectrum_ratio")
        plain: dict[str, Any] = {"batch_sizes": list(self.batch_sizes), "k": self.k}
        return plain | {name: getattr(self, name).tolist() for name in tensors}


def disjoint_batches(
    dataset: Any, batch_size: int, generator: torch.Generator
) -> tuple[object, object]:
    """Two batches without a common sample, drawn uniformly without replacement.

    Args:
        dataset: anything with a length and items.
        batch_size: samples in each.
        generator: source of the draw.

    Raises:
        ValueError: if the data set is smaller than both batches.
        ArgumentTypeError: if it has no length or items.
    """
    if not all(hasattr(dataset, name) for name in ("__len__", "__getitem__")):
        raise ArgumentTypeError(
            "dataset must have a length and items, as a loader's .dataset has; got "
            f"{type(dataset).__name__}."
        )
    if not isinstance(generator, torch.Generator):
        kind = type(generator).__name__
        raise ArgumentTypeError(f"generator must be a torch.Generator; got {kind}.")
    batch_size = as_integer("batch_size", batch_size)
    if batch_size < 1 or 2 * batch_size > len(dataset):
        raise ValueError(
            f"two disjoint batches of {batch_size} need at least {2 * max(batch_size, 1)} samples "
            f"and batch_size ≥ 1; the data set has {len(dataset)}."
        )
    order = torch.randperm(len(dataset), generator=generator)[: 2 * batch_size].tolist()
    halves = order[:batch_size], order[batch_size:]
    own, other = (default_collate([dataset[i] for i in half]) for half in halves)
    return own, other


def batch_size_sweep(
    model: nn.Module,
    likelihood: str,
    dataset: Any,
    reference_loader: Iterable[object],
    batch_sizes: Sequence[int] = (16, 64, 256),
    *,
    k: int = 20,
    pairs: int = 3,
    seed: int = 0,
    progress_bar: bool = False,
    **options: Any,
) -> BatchSizeSweep:
    """Measure bias, overlap and spectra for several batch sizes.

    Args:
        model: trained network, see `directional_profile`.
        likelihood: "classification" or "regression".
        dataset: anything with a length and items; a pair's batches are drawn without replacement.
        reference_loader: the population's stand-in; walked once per size and pair.
        batch_sizes: sizes of each batch.
        k: directions per batch.
        pairs: pairs of batches per size.
        seed: of the draws.
        progress_bar: show one over all pairs.
        **options: further options of `directional_profile`.

    Raises:
        ValueError: as `directional_profile` and `disjoint_batches`, or for no size or pair.
    """
    pairs, seed = checked_integer("pairs", pairs), generator_seed(seed)
    if not isinstance(batch_sizes, Iterable):
        kind = type(batch_sizes).__name__
        raise ArgumentTypeError(f"batch_sizes must be several, such as (16, 64); got {kind}.")
    batch_sizes = tuple(checked_integer("batch_sizes", size) for size in batch_sizes)
    if not batch_sizes:
        raise ValueError("a sweep needs batch sizes; batch_sizes is empty.")
    if reference_loader is None:
        raise ArgumentTypeError("reference_loader must give batches; got None.")
    generator = torch.Generator().manual_seed(seed)
    options["seed"] = seed
    steps = [size for size in batch_sizes for _ in range(pairs)]
    rows = []
    for size in tqdm(
        steps, desc="pairs of batches", disable=not checked_flag("progress_bar", progress_bar)
    ):
        drawn = disjoint_batches(dataset, size, generator)
        rows.append(_one_pair(model, likelihood, drawn, reference_loader, k, options))
    table = torch.tensor(rows, dtype=torch.float64).reshape(len(batch_sizes), pairs, 4)
    return BatchSizeSweep(batch_sizes, k, *table.unbind(-1))


def _one_pair(
    model: nn.Module,
    likelihood: str,
    drawn: tuple[object, object],
    reference_loader: Iterable[object],
    k: int,
    options: dict[str, Any],
) -> tuple[float, float, float, float]:
    """Own and other curvature over the reference's, eigenspace overlap, ratio of spectra.

    A function of its own: the two bases [P, k] are gone before the next pair's are formed.
    """
    profile = directional_profile(model, likelihood, *drawn, reference_loader, k, **options)
    shared = {n: options[n] for n in ("matrix", "solver", "seed", "dict_key_y") if n in options}
    there = top_eigenpairs(model, likelihood, drawn[1], k, **shared)
    summary, here = profile.summary(), cast(Tensor, profile.directions)
    both = min(profile.n_directions, there.vectors.shape[1])
    spectrum = profile.own.curvature.mean[:both]
    return (
        cast(float, summary.median_own_to_reference),
        cast(float, summary.median_other_to_reference),
        eigenspace_overlap(here[:, :both], there.vectors[:, :both]),
        float((spectrum / there.values[:both]).median()),
    )
