"""K-FAC eigenbases in bands of ranks, and walks over data that measure along them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from laplace_debiased.curvature import BackwardPass, BlockBasis, Chunk, FactorAccumulator
from laplace_debiased.curvature.reading import parameter_rows, uses_of
from laplace_debiased.curvature.rows import BlockRows, RankOneRows
from laplace_debiased.data import split_batch
from laplace_debiased.debiasing import eigenbasis, own_magnitudes
from laplace_debiased.diagnostics.estimates import DirectionalQuadratic, QuadraticSums
from laplace_debiased.likelihoods import LossModel
from laplace_debiased.network.inputs import check_dense


@dataclass(frozen=True, eq=False)
class Bands:
    """One block's oriented eigenbasis, with the band of each direction.

    Attributes:
        basis: eigenbasis of the own batch's factors, P = D_out·D_in directions (D_out for biases).
        signs: ±1 [P], so that every own slope is not negative.
        band: number of each direction's band [P].
        sizes: directions per band [k].
        kfac: own K-FAC eigenvalues, means per band [k].
    """

    basis: BlockBasis
    signs: Tensor
    band: Tensor
    sizes: Tensor
    kfac: Tensor

    @classmethod
    def of(cls, basis: BlockBasis, gradient: Tensor, n_bands: int) -> Bands:
        """Rank by K-FAC eigenvalue, orient by the own mean gradient, and cut into bands."""
        eigenvalues = own_magnitudes([basis])[0].flatten()
        n = len(eigenvalues)
        exponents = torch.arange(n_bands, dtype=torch.float64) / n_bands
        cuts = torch.arange(n) if n <= n_bands else (n**exponents).long().unique() - 1
        ranks = eigenvalues.argsort(descending=True, stable=True).argsort()
        cuts = cuts.to(ranks.device)
        band = torch.bucketize(ranks, cuts, right=True) - 1
        sizes = torch.bincount(band)
        signs = torch.where(in_basis(basis, gradient).flatten() < 0, -1.0, 1.0)
        empty = cls(basis, signs.to(eigenvalues), band, sizes, eigenvalues)
        return replace(empty, kfac=empty.means(eigenvalues[None])[0])

    def means(self, values: Tensor) -> Tensor:
        """Means over each band [m, k] of values per direction [m, P]."""
        sums = values.new_zeros(len(values), len(self.sizes)).index_add_(1, self.band, values)
        return sums / self.sizes

    def rotated(self, rows: BlockRows) -> Tensor:
        """Every column's gradient along every direction [m, R, P]."""
        rotated = rows.rotated(self.basis)
        if isinstance(rotated, RankOneRows):
            rotated = rotated.expanded()
        return rotated.written_out()


@dataclass(frozen=True, eq=False)
class BandWalk:
    """Walks over data whose columns are the loss' gradient and then the loss Hessian's root."""

    curvature_pass: BackwardPass
    loss: LossModel
    dict_key_y: str

    def chunks(self, batch: object, *, streaming: bool = False) -> Iterator[Chunk]:
        """Chunks of one batch."""
        inputs, targets = split_batch(batch, self.dict_key_y)
        check_dense(inputs)

        def columns(outputs: Tensor, rows: slice) -> Tensor:
            part = targets[rows].to(outputs.device)
            self.loss.check_targets(outputs, part)
            gradient = self.loss.output_gradient(outputs, part)
            return torch.cat([gradient.unsqueeze(-1), self.loss.hessian_root(outputs)], -1)

        return self.curvature_pass.chunks(inputs, columns, streaming=streaming)

    def measure(
        self, batches: Iterable[object], bands: Mapping[str, Bands]
    ) -> dict[str, DirectionalQuadratic]:
        """Slopes and curvatures per band, over all samples of the batches."""
        sums = {name: QuadraticSums() for name in bands}
        for batch in batches:
            for chunk in self.chunks(batch):
                for name, rows in chunk.blocks:
                    rotated = bands[name].rotated(rows)
                    slopes = bands[name].means(rotated[:, 0] * bands[name].signs)
                    curvatures = bands[name].means(rotated[:, 1:].square().sum(1))
                    sums[name].add(slopes, curvatures)
        return {name: total.estimate("reference_loader") for name, total in sums.items()}


def bands_of(walk: BandWalk, batch: object, names: Sequence[str], n_bands: int) -> dict[str, Bands]:
    """Eigenbases of the batch's factors, oriented and cut into bands."""
    factors = FactorAccumulator(names, summed_bias=True)
    gradients: dict[str, Tensor] = {}
    n_samples = 0
    for chunk in walk.chunks(batch, streaming=True):
        n_samples += len(chunk.outputs)
        for number, column in enumerate(chunk.columns()):
            if number > 0:
                factors.add_columns(chunk.calls, column)
                continue
            factors.add_inputs(chunk.calls)
            for name, places in uses_of(chunk.calls).items():
                rows = parameter_rows(chunk.calls, places, column)
                if rows is not None:
                    gradient = rows.gradients().sum((0, 1))
                    gradients[name] = gradients[name] + gradient if name in gradients else gradient
    bases = eigenbasis(factors.means(n_samples))
    return {basis.name: Bands.of(basis, gradients[basis.name], n_bands) for basis in bases}


def in_basis(basis: BlockBasis, value: Tensor) -> Tensor:
    """Coordinates of a parameter (or its gradient), in the shape of the eigenvalue table."""
    value = value.reshape(basis.table_shape)
    if basis.output_basis is not None:
        value = basis.output_basis.mT @ value
    return value if basis.input_basis is None else value @ basis.input_basis
