"""Columns of a fit, with draws of labels and signs that do not depend on who has which samples."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from laplace_debiased.data import Batch, CurvaturePlan, Share
from laplace_debiased.likelihoods import LossModel, curvature_columns, sketched_columns
from laplace_debiased.options import CurvatureOptions, Fisher

Draw = Callable[[int, torch.Generator], Tensor]
"""Noise of so many samples [n, ...] from a generator."""


def drawing(
    loss: LossModel, options: CurvatureOptions, outputs: Tensor, sketch: int | None
) -> Draw | None:
    """How the noise of a fit's columns is drawn; None where they need none.

    Args:
        loss: the loss model.
        options: the choices.
        outputs: of a batch [m, C] or [m, T, C].
        sketch: number of sketched columns, whose noise is a seed per sample; None for no sketch.
    """
    if sketch is not None:
        return lambda n, generator: torch.randint(2**62, (n,), generator=generator)
    if options.fisher is Fisher.MC:
        shape = (*outputs.shape[1:], options.mc_samples)
        return lambda n, generator: loss.label_noise((n, *shape), generator)
    return None


def fit_columns(
    loss: LossModel,
    fisher: Fisher,
    outputs: Tensor,
    targets: Tensor,
    noise: Tensor | None,
    sketch: int | None,
) -> Tensor:
    """Columns S [m, C, R] ([m, T, C, R]) whose outer products a fit adds up.

    Args:
        loss: the loss model.
        fisher: which second moment of output gradients.
        outputs: network outputs [m, C] or [m, T, C].
        targets: labels or regression targets.
        noise: as :func:`drawing` has drawn it, of these samples; None where none is needed.
        sketch: number of columns that stand for the loss Hessian's root; None for all of it.
    """
    if sketch is None:
        return curvature_columns(loss, outputs, targets, fisher, noise=noise)
    assert noise is not None
    return sketched_columns(loss, outputs, targets, noise, sketch)


def columns_per_sample(options: CurvatureOptions, sketch: int | None) -> int | None:
    """R; None where it is the rank of the loss Hessian's root."""
    match options.fisher:
        case Fisher.TYPE2:
            return sketch
        case Fisher.MC:
            return options.mc_samples
        case Fisher.EMPIRICAL:
            return 1


class SharedNoise:
    """Noise of a share's samples, as one process that walks the whole plan would draw it.

    Every rank draws the noise of all samples, batch by batch, and keeps its own: a generator's
    stream cannot be entered in its midst, and numbers cost little beside passes over a network.

    Args:
        plan: the whole plan.
        share: what this rank walks of it.
        seed: seed of the walk.
        by_fold: whether a batch's samples are drawn for in the order of their folds.
    """

    def __init__(self, plan: CurvaturePlan, share: Share, seed: int, *, by_fold: bool) -> None:
        self._generator = torch.Generator().manual_seed(seed)
        self._sizes = iter([size for source in plan.sources for size in source.batch_sizes])
        self._folds = torch.cat([source.draws.folds for source in plan.sources])
        self._own = torch.zeros(len(self._folds), dtype=torch.bool)
        self._own[share.positions] = True
        self._by_fold, self._end = by_fold, 0
        self._places = torch.empty(0, dtype=torch.int64)
        self._noise: Tensor | None = None

    def of(self, batch: Batch, draw: Draw, generator: torch.Generator) -> Tensor:
        """Noise of a batch's samples [m, ...]; from the generator where the batch is of no share.

        Args:
            batch: the next one of the walk.
            draw: draws noise.
            generator: of a process that walks the whole plan.
        """
        places = batch.positions
        return draw(len(batch), generator) if places is None else self.rows(places, draw)

    def rows(self, places: Tensor, draw: Draw) -> Tensor:
        """Noise of some samples [m, ...] by their places in the plan.

        Places of one call lie behind those of the next.

        Args:
            places: of the samples [m].
            draw: draws noise for them.
        """
        while self._noise is None or self._end <= int(places.max()):
            self._draw_batch(draw)
        found = self._noise[torch.searchsorted(self._places, places)]
        behind = self._places <= int(places.max())
        self._places, self._noise = self._places[~behind], self._noise[~behind]
        return found

    def _draw_batch(self, draw: Draw) -> None:
        size = next(self._sizes)
        noise = draw(size, self._generator)
        batch = slice(self._end, self._end + size)
        places = torch.arange(batch.start, batch.stop)
        if self._by_fold:
            noise = noise[self._folds[batch].argsort(stable=True).argsort()]
        own, self._end = self._own[batch], batch.stop
        self._places = torch.cat([self._places, places[own]])
        kept = noise[own]
        self._noise = kept if self._noise is None else torch.cat([self._noise, kept])
