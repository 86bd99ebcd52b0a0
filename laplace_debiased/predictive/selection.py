"""Which outputs a prediction needs: the most probable of each sample, at which positions."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from laplace_debiased.curvature import Chunk, CurvaturePass
from laplace_debiased.curvature.passes import Bases, UnitColumns
from laplace_debiased.network.forecast import Forecast
from laplace_debiased.network.inputs import batch_length

ALL_UP_TO = 64
"""With up to so many classes, ``n_outputs="auto"`` takes them all."""

_FEW = 32
"""Pull-backs, samples times columns, that nobody waits a minute for."""

MOST_PROBABLE = 32
"""With more, so many of each sample."""


@dataclass(frozen=True)
class OutputSelection:
    """Which of a network's outputs moments are computed of.

    Attributes:
        n_outputs: K, so many of the largest outputs of each sample (at each position); None for
            all.
        last_position: of a sequence only its last position.
    """

    n_outputs: int | None = None
    last_position: bool = False

    def chosen(self, outputs: Tensor) -> Tensor | None:
        """Indices [..., K] of the chosen ones of outputs [..., C], largest first; None for all."""
        if self.n_outputs is None or self.n_outputs >= outputs.shape[-1]:
            return None
        return outputs.detach().topk(self.n_outputs, dim=-1).indices

    def require_no_positions(self) -> None:
        """Refuse what only makes sense of sequences.

        Raises:
            ValueError: if it asks for a position.
        """
        if self.last_position:
            raise ValueError(
                "positions='last' needs a posterior over all weights, Kronecker, whose model "
                "returns outputs at several positions (batch, positions, classes); this one has "
                "one set of outputs per sample. Leave positions out."
            )


ALL_OUTPUTS = OutputSelection()


def resolved(n_outputs: int | str | None, n_classes: int) -> int | None:
    """K for a posterior's option; None for all outputs."""
    if isinstance(n_outputs, str):
        return None if n_classes <= ALL_UP_TO else MOST_PROBABLE
    return n_outputs


@dataclass(frozen=True, eq=False)
class SelectedChunk:
    """A chunk whose columns are the chosen outputs of m samples, one after the other.

    Attributes:
        chunk: outputs and rows.
        outputs: [m, C], or [m, T', C] at the T' positions that this chunk is about.
        chosen: indices [m, K] or [m, T', K]; None for all outputs in their order.
    """

    chunk: Chunk
    outputs: Tensor
    chosen: Tensor | None

    @property
    def shape(self) -> torch.Size:
        """[m, K] or [m, T', K]."""
        return (self.outputs if self.chosen is None else self.chosen).shape


def selected_walks(
    engine: CurvaturePass,
    inputs: Any,
    selection: OutputSelection,
    bases: Bases | None = None,
    *,
    differentiable: bool = False,
) -> Iterator[Iterator[SelectedChunk]]:
    """Walks over a batch: one, or one for each group of positions where memory asks for it.

    Every position has columns of its own; a sequence whose columns do not fit the pass's budget at
    a time is gone through in groups of positions, each with a forward pass of its own.
    """
    *positions, n_outputs = engine.output_shape(inputs)
    width = n_outputs if selection.n_outputs is None else min(selection.n_outputs, n_outputs)
    each = width * (1 if selection.last_position else math.prod(positions))
    forecast = _forecast(engine, batch_length(inputs), each, n_outputs)
    walk = _Walk(engine, inputs, selection, bases, differentiable, forecast)
    if not positions:
        selection.require_no_positions()
        yield walk.chunks(None, width)
        return
    if selection.last_position:
        yield walk.chunks(last_positions(inputs, positions[0]), width)
        return
    step = max(1, engine.columns_that_fit(inputs, bases) // width)
    for start in range(0, positions[0], step):
        group = slice(start, min(start + step, positions[0]))
        yield walk.chunks(group, width * (group.stop - group.start))


def _forecast(
    engine: CurvaturePass, n_samples: int, n_columns: int, n_outputs: int
) -> Forecast | None:
    """Foretells the pull-backs of a batch; None where they are few."""
    if n_samples * n_columns < _FEW:
        return None
    if n_columns >= n_outputs > MOST_PROBABLE:
        advice = (
            f"n_outputs={MOST_PROBABLE} (an option of the posterior) takes the most probable "
            f"outputs of each sample in place of {n_outputs} backward passes"
        )
    else:
        advice = (
            "A smaller n_outputs (an option of the posterior) takes fewer backward passes; "
            "subset_of_weights='last_layer' takes none"
        )
    return Forecast(f"moments of {n_samples} samples", n_samples * n_columns, f"{advice}.", engine)


@dataclass(frozen=True, eq=False)
class _Walk:
    """What all walks over a batch have in common; see :func:`selected_walks`."""

    engine: CurvaturePass
    inputs: Any
    selection: OutputSelection
    bases: Bases | None
    differentiable: bool
    forecast: Forecast | None

    def chunks(self, positions: slice | Tensor | None, n_columns: int) -> Iterator[SelectedChunk]:
        """At a group of positions, or at each sample's own one."""

        def part(outputs: Tensor, rows: slice) -> tuple[Tensor, Tensor | None]:
            reduced = at_positions(outputs, positions, rows)
            return reduced, self.selection.chosen(reduced)

        def columns(outputs: Tensor, rows: slice) -> UnitColumns:
            reduced, chosen = part(outputs, rows)
            n_outputs = outputs.shape[-1]
            if chosen is None:
                chosen = torch.arange(n_outputs, device=outputs.device).expand(reduced.shape)
            if positions is not None:
                chosen = chosen + n_outputs * _index(positions, rows, outputs).unsqueeze(-1)
            return UnitColumns(outputs.detach(), chosen.flatten(1), self.forecast)

        for chunk in self.engine.chunks(
            self.inputs,
            columns,
            n_columns=n_columns,
            bases=self.bases,
            differentiable=self.differentiable,
        ):
            yield SelectedChunk(chunk, *part(chunk.outputs, chunk.rows))


def at_positions(outputs: Tensor, positions: slice | Tensor | None, rows: slice) -> Tensor:
    """Outputs [m, T, C] at a group of positions [m, T', C], or at each sample's own one [m, C]."""
    if positions is None:
        return outputs
    if isinstance(positions, slice):
        return outputs[:, positions]
    index = positions[rows].to(outputs.device)
    return outputs[torch.arange(len(outputs), device=outputs.device), index]


def _index(positions: slice | Tensor, rows: slice, outputs: Tensor) -> Tensor:
    """Which positions these are: [T'], or [m] one of each sample."""
    if isinstance(positions, slice):
        return torch.arange(positions.start, positions.stop, device=outputs.device)
    return positions[rows].to(outputs.device)


def last_positions(inputs: Any, n_positions: int) -> Tensor:
    """The last position of every sample [m]; of a padded one the last that its mask attends to."""
    mask = inputs.get("attention_mask") if isinstance(inputs, Mapping) else None
    if not isinstance(mask, Tensor) or mask.ndim != 2 or mask.shape[1] != n_positions:
        return torch.full((batch_length(inputs),), n_positions - 1)
    order = torch.arange(1, n_positions + 1, device=mask.device)
    return ((mask != 0) * order).amax(-1).sub(1).clamp_min(0)


def last_labels(inputs: Any, targets: Tensor) -> Tensor:
    """Labels [m, T] of sequences at their last positions [m]; one label per sample as it is."""
    if targets.ndim != 2:
        return targets
    last = last_positions(inputs, targets.shape[1]).to(targets.device)
    return targets[torch.arange(len(targets), device=targets.device), last]
