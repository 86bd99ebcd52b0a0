r"""Rows J_nᵀ s of any differentiable network, in tiles that fit a byte budget.

One way for every architecture: a vector-Jacobian product per sample and column, vectorised over
both. On a ResNet-20 it costs no more than a pass that knows its layers, and it takes BatchNorm,
LayerNorm, attention and embeddings as they come. Where torch cannot vectorise a model, samples are
walked one by one, with the same result.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor

from laplace_debiased.curvature.features import FeaturePass
from laplace_debiased.errors import ModelCallError
from laplace_debiased.network.functional import FunctionalNetwork
from laplace_debiased.network.grad_modes import outside_inference_mode
from laplace_debiased.network.inputs import batch_length, select_rows, tensor_shapes
from laplace_debiased.network.memory import is_out_of_memory
from laplace_debiased.network.modes import differentiable_kernels
from laplace_debiased.network.outputs import check_repeatable
from laplace_debiased.network.reached import check_gradients_reach
from laplace_debiased.options import DEFAULT_BYTE_BUDGET

_LIVE_GRADIENTS = 4
"""A backward pass holds about so many gradients of its largest activation at a time."""

_LIVE_ROWS = 3
"""A tile of rows exists by parameter, flattened, and once more in what its reader makes of it."""

_MIXING_TOLERANCE = 1e-3
"""Relative. Kernels for one sample and for two differ by round-off, up to 1e-5 in float32."""

_VECTORISED_TOLERANCE = 2e-2
"""Relative, norm-wise. Round-off of float32 stays below 1e-4; a wrong rule is off by order 1."""


class Tile(NamedTuple):
    """Some samples n of the m and some columns r of the R of a batch."""

    samples: slice
    columns: slice


@dataclass(frozen=True, eq=False)
class RowPass:
    """Computes rows of a batch, tile by tile.

    Args:
        network: the network and its covered parameters.
        byte_budget: working memory of one tile, in bytes. No result depends on it.
    """

    network: FunctionalNetwork
    byte_budget: int = DEFAULT_BYTE_BUDGET
    _saved: dict[tuple, tuple[int, int]] = field(default_factory=dict, repr=False)
    _one_by_one: dict[str, bool] = field(default_factory=dict, repr=False)

    def outputs(self, inputs: Any, *, differentiable: bool = False) -> Tensor:
        """Network outputs [m, C]."""
        return self.network.outputs(inputs, differentiable=differentiable)

    def tiles(self, inputs: Any, n_columns: int) -> tuple[Tile, ...]:
        """Cut a batch so that the rows of a tile fit the budget: by samples, then by columns."""
        m = batch_length(inputs)
        fixed, per_column = self._bytes(inputs)
        per_sample = fixed + n_columns * per_column
        step = max(1, min(m, self.byte_budget // per_sample))
        width = n_columns
        if step == 1 and per_sample > self.byte_budget:
            width = max(1, min(n_columns, (self.byte_budget - fixed) // per_column))
        return tuple(
            Tile(slice(i, min(i + step, m)), slice(j, min(j + width, n_columns)))
            for i in range(0, m, step)
            for j in range(0, n_columns, width)
        )

    def rows(self, inputs: Any, columns: Tensor, *, differentiable: bool = False) -> Tensor:
        """J_nᵀ s for every sample and every column s.

        Args:
            inputs: model inputs of n samples.
            columns: cotangents [n, C, r].
            differentiable: keep the graph, for gradients with respect to ``inputs``.

        Returns:
            Rows [n, r, P].
        """
        inputs = self.network.prepare(inputs)
        self.check_gradients(inputs)
        with differentiable_kernels(self.network.model), torch.set_grad_enabled(differentiable):
            if not self._one_by_one.get("always", False):
                try:
                    rows = self.network.rows(inputs, columns)
                    if "always" in self._one_by_one or self._is_vectorised_well(inputs, columns):
                        return rows
                except RuntimeError as error:
                    if is_out_of_memory(error):
                        raise
                    # Not every operation can be vectorised. If it was something else, it will
                    # show again, with its own message.
                rows = self._looped(inputs, columns, differentiable)
                self._one_by_one["always"] = True
                return rows
            return self._looped(inputs, columns, differentiable)

    def check_gradients(self, inputs: Any) -> None:
        """Check once, on the first of prepared inputs, that derivatives reach the parameters.

        Raises:
            ModelCallError: if one does not, naming the parameter.
        """
        if "reached" not in self._one_by_one:
            check_gradients_reach(self.network, select_rows(inputs, slice(0, 1)))
            self._one_by_one["reached"] = True

    def _is_vectorised_well(self, inputs: Any, columns: Tensor) -> bool:
        """Whether vectorised rows are those of a plain backward pass; looked at once.

        A rule of torch for vectorising an operation may be wrong in silence, as that of ``cdist``.
        """
        samples = select_rows(inputs, slice(0, min(2, batch_length(inputs))))
        few = columns[:2, ..., :2].detach()
        vectorised = self.network.rows(samples, few).detach()
        plain = self._looped(samples, few, False)
        well = bool((vectorised - plain).norm() <= _VECTORISED_TOLERANCE * plain.norm())
        self._one_by_one["always"] = not well
        return well

    def tile_rows(
        self, inputs: Any, columns: Tensor, tile: Tile, *, differentiable: bool = False
    ) -> Tensor:
        """Rows [n, r, P] of one tile of a batch with columns [m, C, R]."""
        part = select_rows(inputs, tile.samples)
        chosen = columns[tile.samples, :, tile.columns]
        return self.rows(part, chosen, differentiable=differentiable)

    def walk(self, inputs: Any, columns: Tensor) -> Iterator[tuple[Tile, Tensor]]:
        """All tiles of a batch with their rows."""
        for tile in self.tiles(inputs, columns.shape[-1]):
            yield tile, self.tile_rows(inputs, columns, tile)

    def check_samples_are_independent(self, inputs: Any) -> None:
        """Check on two samples that the outputs of one depend neither on the other nor on chance.

        Raises:
            ValueError: if they do; per-sample curvature is then undefined.
        """
        pair = select_rows(inputs, slice(0, min(2, batch_length(inputs))))
        alone = self.outputs(select_rows(pair, slice(0, 1)))
        check_repeatable(alone, self.outputs(select_rows(pair, slice(0, 1))))
        try:
            together = self.outputs(pair)
        except ModelCallError:  # a network that takes one sample at a time mixes none
            return
        difference = (together[:1] - alone).abs().max()
        if bool(difference > _MIXING_TOLERANCE * (1 + alone.abs().max())):
            raise ValueError(
                f"the outputs of one sample change by {float(difference):.2g} when another joins "
                "its batch, so that per-sample curvature is undefined. Normalisation over the "
                "batch needs running statistics (track_running_stats=True)."
            )

    def _looped(self, inputs: Any, columns: Tensor, differentiable: bool) -> Tensor:
        network = self.network
        constants = network.constants()
        parameters = {k: v.requires_grad_(True) for k, v in network.parameters().items()}
        n, _, width = columns.shape
        rows = []
        with torch.enable_grad():
            for index in range(n):
                sample = select_rows(inputs, slice(index, index + 1))
                outputs = network.call(parameters, constants, sample)[0]
                if not outputs.requires_grad:  # detached: no parameter has a gradient
                    rows += [outputs.new_zeros(network.n_params)] * width
                    continue
                for r in range(width):
                    found = torch.autograd.grad(
                        outputs,
                        list(parameters.values()),
                        columns[index, :, r],
                        retain_graph=differentiable or r + 1 < width,
                        create_graph=differentiable,
                        materialize_grads=True,
                    )
                    rows.append(torch.cat([_flat(entry) for entry in found]).to(network.dtype))
        return torch.stack(rows).reshape(n, width, -1)

    def _bytes(self, inputs: Any) -> tuple[int, int]:
        """Working memory of one sample: what its graph saves, and what each column adds."""
        key = tensor_shapes(inputs)
        if key not in self._saved:
            sample = self.network.prepare(select_rows(inputs, slice(0, 1)))
            self._saved[key] = self.network.saved_entries(sample)
        saved, largest = self._saved[key]
        size = torch.finfo(self.network.dtype).bits // 8
        return saved * size, size * (_LIVE_ROWS * self.network.n_params + _LIVE_GRADIENTS * largest)


def _flat(gradient: Tensor) -> Tensor:
    return (gradient.to_dense() if gradient.is_sparse else gradient).flatten()


@dataclass(frozen=True, eq=False, kw_only=True)
class FeatureRowPass(RowPass):
    """Rows s ⊗ φ of a last layer W φ + b, φ the features of an input.

    Args:
        network: the network, with the last layer's parameters covered.
        byte_budget: working memory of one tile, in bytes.
        feature_pass: gives outputs and features.
    """

    feature_pass: FeaturePass

    def outputs(self, inputs: Any, *, differentiable: bool = False) -> Tensor:
        """Network outputs [m, C]."""
        return self._features(inputs, differentiable)[0]

    def rows(self, inputs: Any, columns: Tensor, *, differentiable: bool = False) -> Tensor:
        """J_nᵀ s [n, r, P] for every sample and every column s of ``columns`` [n, C, r]."""
        features = self._features(inputs, differentiable)[1]
        head = self.feature_pass.head
        with outside_inference_mode(), torch.set_grad_enabled(differentiable):
            columns = columns.to(features)
            parts = {
                head.weight: torch.einsum("ncr,nd->nrcd", columns, features).flatten(2),
                head.bias: columns.mT,
            }
            return torch.cat([parts[name] for name in self.network.names], -1)

    def _features(self, inputs: Any, differentiable: bool) -> tuple[Tensor, Tensor]:
        outputs, features = self.feature_pass.features(inputs, differentiable=differentiable)
        if not differentiable:
            outputs, features = outputs.detach(), features.detach()
        dtype = self.network.dtype
        return outputs.to(dtype), features.to(dtype)
