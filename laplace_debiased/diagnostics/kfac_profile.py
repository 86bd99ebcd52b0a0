r"""Directional profiles of K-FAC eigenbases: one batch's directions, measured on it and elsewhere.

A layer has as many K-FAC eigenvectors u_ij = u_B,i ⊗ u_A,j as weights, so they are measured in
*bands* of neighbouring ranks, narrow at the top (single directions) and wide below. What is
measured is exact, uᵀGu of the generalized Gauss-Newton matrix and not a product of factors, so
that own batch and other data differ by the mini-batch bias alone.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from tqdm import tqdm

from laplace_debiased.checks import checked_flag, checked_integer
from laplace_debiased.curvature import (
    BackwardPass,
    BlockBasis,
    Chunk,
    Coverage,
    FactorAccumulator,
    inspected,
    operation_coverage,
)
from laplace_debiased.curvature.operations.call import parameter_rows, uses_of
from laplace_debiased.curvature.rows.base import BlockRows
from laplace_debiased.data.loaders import loader_generators, split_batch
from laplace_debiased.debiasing.bases import eigenbasis, own_magnitudes
from laplace_debiased.diagnostics.estimates import DirectionalQuadratic, QuadraticSums
from laplace_debiased.diagnostics.network import check_data
from laplace_debiased.diagnostics.profile import (
    DirectionalProfile,
    plot_profiles,
)
from laplace_debiased.diagnostics.summary import BiasSummary
from laplace_debiased.likelihoods import LossModel, loss_model
from laplace_debiased.network.modes import differentiable_kernels, public_call, undisturbed
from laplace_debiased.network.outputs import checked_model
from laplace_debiased.options import DEFAULT_BYTE_BUDGET

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_MOST_PANELS = 4


@dataclass(frozen=True, eq=False)
class KfacBlockProfile:
    """Slopes and curvatures along one parameter tensor's K-FAC eigenbasis, in bands of ranks.

    Attributes:
        profile: per band the mean over its directions of slopes and GGN curvatures (per-sample
            means), each direction oriented by the own batch's slope; ``directions`` is None.
        first_rank: rank of each band's first direction [k], from 1. Directions are ranked by the
            own batch's K-FAC eigenvalue.
        last_rank: rank of its last direction [k].
        kfac_curvature: the K-FAC eigenvalues of the own batch [k], float64, means over the band:
            what a Kronecker product says in place of the curvature.
    """

    profile: DirectionalProfile
    first_rank: tuple[int, ...]
    last_rank: tuple[int, ...]
    kfac_curvature: Tensor

    def summary(self, n_groups: int = 10) -> BiasSummary:
        """Bias ratios per group of neighbouring bands, with standard errors.

        A band counts once, however many directions it holds; the rows name true ranks.
        """
        summary = self.profile.summary(n_groups)
        rows = tuple(
            replace(row, first=self.first_rank[row.first - 1], last=self.last_rank[row.last - 1])
            for row in summary.rows
        )
        return replace(summary, rows=rows)

    def _finish(self, curvatures: Axes) -> None:
        """Ranks in place of the bands' numbers, and what K-FAC itself says."""
        numbers = range(1, self.profile.n_directions + 1)
        (dotted,) = curvatures.plot(numbers, self.kfac_curvature, color="0.45", linestyle=":")
        curvatures.legend(
            [dotted], ["own K-FAC eigenvalue"], frameon=False, fontsize="small", loc="lower left"
        )
        # Directions that no sample uses have curvature 0, up to rounding.
        curvatures.set_yscale("log", nonpositive="mask")
        top = float(self.profile.own.curvature.mean.max())
        curvatures.set_ylim(bottom=max(curvatures.get_ylim()[0], 1e-6 * top))
        wanted = [10**power for power in range(7) if 10**power <= self.last_rank[-1]]
        places = [sum(first <= rank for first in self.first_rank) for rank in wanted]
        curvatures.set_xticks(places, [str(rank) for rank in wanted])
        curvatures.set_xlabel("K-FAC eigenvector of the own batch, by rank")


@dataclass(frozen=True, eq=False)
class KfacProfile:
    """Profiles of all K-FAC eigenbases of a network.

    Attributes:
        blocks: by parameter name, in the order of ``model.parameters()``.
        coverage: which parameters these are, which have no K-FAC factors and why.
    """

    blocks: Mapping[str, KfacBlockProfile]
    coverage: Coverage

    def plot(self, names: Sequence[str] | None = None) -> Figure:
        """Slopes and curvatures by rank, one column per block; nothing is shown.

        Args:
            names: which blocks; None for up to four weights, from the first to the last layer.

        Raises:
            ValueError: if a name is unknown, or there are none.
        """
        if names is None:
            weights = [n for n in self.blocks if n.rpartition(".")[2] == "weight"] or [*self.blocks]
            places = torch.linspace(0, len(weights) - 1, min(_MOST_PANELS, len(weights)))
            names = [weights[int(place)] for place in places.round()]
        chosen = tuple(names)
        unknown = [name for name in chosen if name not in self.blocks]
        if unknown or not chosen:
            raise ValueError(f"names must be some of {list(self.blocks)}; got {list(chosen)}.")
        figure = plot_profiles({name: self.blocks[name].profile for name in chosen})
        for name, axis in zip(chosen, figure.axes[len(chosen) :], strict=True):
            self.blocks[name]._finish(axis)
        return figure


@public_call
def kfac_profile(
    model: nn.Module,
    likelihood: str,
    batch: object,
    other_batch: object,
    reference_loader: Iterable[object] | None = None,
    n_bands: int = 40,
    *,
    byte_budget: int = DEFAULT_BYTE_BUDGET,
    dict_key_y: str = "labels",
    progress_bar: bool = False,
) -> KfacProfile:
    r"""Slopes and curvatures along a batch's K-FAC eigenvectors, on it, another batch, reference.

    Per covered parameter tensor: the eigenbasis of the K-FAC factors of ``batch``, and along each
    of its directions the gradient and the generalized Gauss-Newton matrix themselves (no Kronecker
    product). The mini-batch bias of Tatzel et al. (ICLR 2025, Section 6) in the basis that a
    Kronecker posterior uses, over its whole spectrum.

    Args:
        model: trained network; evaluation mode inside, everything restored after.
        likelihood: "classification" (cross-entropy) or "regression" (½ squared error, summed over
            outputs: unit noise).
        batch: the batch that chooses the directions: (inputs, targets), or a mapping.
        other_batch: a batch without any sample of the first.
        reference_loader: batches that stand for the population; walked once. Samples that it
            shares with ``batch`` pull it towards that batch, by their share.
        n_bands: bands of ranks per tensor at most, evenly spaced on a logarithmic scale; a tensor
            with no more entries has one direction in each.
        byte_budget: working memory of one chunk of samples, in bytes.
        dict_key_y: key of the targets where a batch is a mapping.
        progress_bar: show one over the reference.

    Returns:
        Per-sample means in nats along unit directions.

    Raises:
        ValueError: for a bad option, an empty batch or loader, or targets that do not fit.
        TypeError: for a batch of an unknown type.
        CoverageError: if no layer has K-FAC factors.
        NumericalError: for outputs or factors that are not finite.
    """
    n_bands = checked_integer("n_bands", n_bands)
    checked_integer("byte_budget", byte_budget)
    checked_model(model)
    checked_flag("progress_bar", progress_bar)
    check_data(batch, other_batch, reference_loader, dict_key_y)
    loss = loss_model(likelihood)
    with (
        undisturbed(model, generators=loader_generators(reference_loader)),
        differentiable_kernels(model),
        torch.no_grad(),
    ):
        inputs, _ = split_batch(batch, dict_key_y)
        coverage = inspected(model, operation_coverage(model), inputs)
        coverage.require(strict=False)
        walk = _Walk(
            BackwardPass(model, coverage.covered, byte_budget, coverage.general), loss, dict_key_y
        )
        bands = walk.bands(batch, coverage.covered, n_bands)
        measured = [walk.measure([data], bands) for data in (batch, other_batch)]
        if reference_loader is not None:
            shown = tqdm(reference_loader, desc="K-FAC directions", disable=not progress_bar)
            measured.append(walk.measure(shown, bands))
        parameters = dict(model.named_parameters())
        blocks = {
            name: _block_profile(block, parameters[name], *(found[name] for found in measured))
            for name, block in bands.items()
        }
    return KfacProfile(MappingProxyType(blocks), coverage)


@dataclass(frozen=True, eq=False)
class _Bands:
    """One block's oriented eigenbasis, with the band of each of its P directions."""

    basis: BlockBasis  # of the own batch's factors, P = D_out·D_in (D_out for biases)
    eigenvalues: Tensor  # own K-FAC eigenvalues [P]
    signs: Tensor  # ±1 [P], so that every own slope is not negative
    band: Tensor  # number of each direction's band [P]
    sizes: Tensor  # directions per band [k]

    @classmethod
    def of(cls, basis: BlockBasis, gradient: Tensor, n_bands: int) -> _Bands:
        """Rank by K-FAC eigenvalue, orient by the own mean gradient, and cut into bands."""
        eigenvalues = own_magnitudes([basis])[0].flatten()
        n = len(eigenvalues)
        exponents = torch.arange(n_bands, dtype=torch.float64) / n_bands
        cuts = torch.arange(n) if n <= n_bands else (n**exponents).long().unique() - 1
        ranks = eigenvalues.argsort(descending=True, stable=True).argsort()
        band = torch.bucketize(ranks, cuts.to(ranks.device), right=True) - 1
        signs = torch.where(_along(basis, gradient) < 0, -1.0, 1.0).to(eigenvalues)
        return cls(basis, eigenvalues, signs, band, torch.bincount(band))

    def means(self, values: Tensor) -> Tensor:
        """Means over each band [m, k] of values per direction [m, P]."""
        sums = values.new_zeros(len(values), len(self.sizes)).index_add_(1, self.band, values)
        return sums / self.sizes

    def quadratics(self, rows: BlockRows) -> tuple[Tensor, Tensor]:
        """Per sample, slopes by the first column and curvatures by the others [m, k]."""
        along = rows.rotated(self.basis).expanded().written_out()
        return self.means(along[:, 0] * self.signs), self.means(along[:, 1:].square().sum(1))


@dataclass(frozen=True, eq=False)
class _Walk:
    """Walks over data whose columns are the loss' gradient and then the loss Hessian's root."""

    engine: BackwardPass
    loss: LossModel
    dict_key_y: str

    def chunks(self, batch: object, *, streaming: bool = False) -> Iterator[Chunk]:
        inputs, targets = split_batch(batch, self.dict_key_y)

        def columns(outputs: Tensor, rows: slice) -> Tensor:
            part = targets[rows].to(outputs.device)
            self.loss.check_targets(outputs, part)
            gradient = self.loss.output_gradient(outputs, part)
            return torch.cat([gradient.unsqueeze(-1), self.loss.hessian_root(outputs)], -1)

        return self.engine.chunks(inputs, columns, streaming=streaming)

    def bands(self, batch: object, names: Sequence[str], n_bands: int) -> dict[str, _Bands]:
        """Eigenbases of the batch's factors, oriented and cut into bands."""
        factors = FactorAccumulator(names, summed_bias=True)
        gradients: dict[str, Tensor] = {}
        n_samples = 0
        for chunk in self.chunks(batch, streaming=True):
            n_samples += len(chunk.outputs)
            for number, column in enumerate(chunk.columns()):
                if number > 0:
                    factors.add_columns(chunk.calls, column)
                    continue
                factors.add_inputs(chunk.calls)
                for name, places in uses_of(chunk.calls).items():
                    rows = parameter_rows(chunk.calls, places, column)
                    if rows is not None:
                        found = rows.gradients().sum((0, 1))
                        gradients[name] = gradients[name] + found if name in gradients else found
        bases = eigenbasis(factors.means(n_samples))
        return {basis.name: _Bands.of(basis, gradients[basis.name], n_bands) for basis in bases}

    def measure(
        self, batches: Iterable[object], bands: Mapping[str, _Bands]
    ) -> dict[str, DirectionalQuadratic]:
        """Slopes and curvatures per band, over all samples of the batches."""
        sums = {name: QuadraticSums() for name in bands}
        for batch in batches:
            for chunk in self.chunks(batch):
                for name, rows in chunk.blocks:
                    sums[name].add(*bands[name].quadratics(rows))
        return {name: total.estimate() for name, total in sums.items()}


def _along(basis: BlockBasis, value: Tensor) -> Tensor:
    """Coordinates [P] of a parameter, or its gradient, in an eigenbasis."""
    value = value.reshape(basis.table_shape)
    if basis.output_basis is not None:
        value = basis.output_basis.mT @ value
    return (value if basis.input_basis is None else value @ basis.input_basis).flatten()


def _block_profile(
    bands: _Bands,
    parameter: Tensor,
    own: DirectionalQuadratic,
    other: DirectionalQuadratic,
    reference: DirectionalQuadratic | None = None,
) -> KfacBlockProfile:
    along = _along(bands.basis, parameter.detach().to(bands.signs)) * bands.signs
    last = bands.sizes.cumsum(0)
    return KfacBlockProfile(
        profile=DirectionalProfile.of(
            own, other, reference, parameters_along=bands.means(along[None])[0]
        ),
        first_rank=tuple((last - bands.sizes + 1).tolist()),
        last_rank=tuple(last.tolist()),
        kfac_curvature=bands.means(bands.eigenvalues[None])[0].to("cpu", torch.float64),
    )
