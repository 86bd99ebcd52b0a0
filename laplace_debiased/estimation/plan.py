"""Which samples a fit looks at: the loader looked up, the pool scored, the folds drawn."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import nullcontext, suppress
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from laplace_debiased.data.build import Supply, plan_from_supply, plan_from_two_loaders
from laplace_debiased.data.keys import Keys
from laplace_debiased.data.loaders import (
    can_draw,
    check_loader,
    loader_generators,
    sampler_indices,
)
from laplace_debiased.data.plan import CurvaturePlan
from laplace_debiased.data.pool import Kept, Score, plan_by_curvature
from laplace_debiased.estimation.arguments import FitRequest
from laplace_debiased.estimation.structure import Order
from laplace_debiased.likelihoods import LossModel
from laplace_debiased.network.inputs import batch_length, map_tensors, tensor_shapes, tensors_of
from laplace_debiased.network.interrupts import unbroken
from laplace_debiased.network.last_layer import SeenCall, found_last_layer, watching
from laplace_debiased.network.locks import model_lock
from laplace_debiased.network.precision import full_precision
from laplace_debiased.network.rng import derived_seed, preserved_rng
from laplace_debiased.options import Fisher, Sampling, Scheme
from laplace_debiased.parallel.ranks import ALONE, Ranks


def supply_for(
    request: FitRequest,
    n_folds: int,
    recommended: Callable[[], int | None],
    ranks: Ranks = ALONE,
) -> Supply | None:
    """The training loader, looked up; None where two loaders are walked whole.

    ``recommended`` tells what ``n_samples="auto"`` stands for. Raises as :meth:`Supply.of`.
    """
    if request.magnitude_loader is not None:
        return None
    n_samples: Any = request.n_samples
    if request.is_automatic:
        # By rank 0: what fits in memory may differ from rank to rank.
        [n_samples] = ranks.from_first("the budget", lambda: [recommended()])
    return Supply.of(
        request.train_loader,
        n_samples=n_samples,
        n_data=request.n_data,
        n_folds=n_folds,
        seed=request.seed,
        keys=request.keys,
        ranks=ranks,
    )


def make_plan(order: Order, supply: Supply | None, score: Score, kept: Kept) -> CurvaturePlan:
    """Which samples a fit looks at.

    A uniform budget that adds to a fit draws none of its samples again: what is left of the data
    is a uniform sample of them still. What curvature sampling leaves is not (the samples of large
    curvature are gone), so it draws from all of the data anew, with a seed of its own.

    ``kept`` gives the scores of an interrupted fit. Raises as the data room says.
    """
    request, options, earlier = order.request, order.options, order.earlier
    if supply is None:
        return plan_from_two_loaders(
            request.train_loader,
            request.magnitude_loader,
            n_data=request.n_data,
            seed=request.seed,
            keys=request.keys,
            ranks=order.ranks,
        )
    by_curvature = options.sampling is Sampling.CURVATURE
    if earlier is not None and supply.budget is not None:
        if by_curvature:
            seed = derived_seed(supply.seed, "added", earlier.n_samples)
            supply = replace(supply, seed=seed)
        else:
            supply = supply.without(earlier.drawn)
    # A budget that leaves nothing out takes every sample once.
    if not by_curvature or supply.pool is None or supply.budget == len(supply.pool):
        return plan_from_supply(supply, options.fold_fractions)
    return plan_by_curvature(
        supply,
        score,
        options.fold_fractions,
        symmetric=options.scheme is Scheme.CROSS_FIT,
        pool_size=options.pool_size,
        kept=kept,
    )


@dataclass(eq=False)
class Scorer:
    """Scores samples by what one forward pass tells of their curvature.

    The score is h·‖φ‖: h the trace of the loss Hessian (for the empirical Fisher the squared norm
    of the loss gradient) in the outputs [m, C], φ what the network's last linear layer reads, where
    it has one. For h alone draws vary half as much again: it does not know the Jacobian's size.
    """

    outputs: Callable[[Any], Tensor]
    model: nn.Module
    loss: LossModel
    fisher: Fisher
    _head: nn.Linear | None = field(default=None, init=False)
    _looked_for_head: bool = field(default=False, init=False)

    def __call__(self, inputs: Any, targets: Tensor) -> tuple[Tensor, Tensor]:
        """Scores [m] and losses [m] of a batch."""
        with torch.no_grad(), self._watching_head(inputs) as seen:
            outputs = self.outputs(inputs)
            targets = targets.to(outputs.device)
            self.loss.check_targets(outputs, targets)
            if self.fisher is Fisher.EMPIRICAL:
                gradient = self.loss.output_gradient(outputs, targets)
                scores = gradient.square().flatten(1).sum(1)
            else:
                scores = self.loss.hessian_trace(outputs, targets)
            return scores * _feature_norms(seen, scores), self.loss.losses(outputs, targets)

    @unbroken
    def _watching_head(self, inputs: Any) -> Iterator[SeenCall | None]:
        """Note what the last layer reads, if that is linear."""
        with model_lock(self.model):
            if not self._looked_for_head:
                with suppress(ValueError):
                    head = self.model.get_submodule(found_last_layer(self.model, inputs))
                    self._head = head if isinstance(head, nn.Linear) else None
                self._looked_for_head = True
            with nullcontext() if self._head is None else watching(self._head) as seen:
                yield seen


def _feature_norms(seen: SeenCall | None, scores: Tensor) -> Tensor:
    """Root mean square, over positions, of the norm of every sample's features; ones if unknown."""
    if seen is None or seen.features is None or len(seen.features) % len(scores):
        return torch.ones_like(scores)
    squares = full_precision(seen.features.detach()).square().sum(-1)
    return squares.reshape(len(scores), -1).mean(1).sqrt().to(scores)


def first_inputs_of_loader(loader: Any, keys: Keys) -> Any:
    """Model inputs of a training loader's first batch; its generators are left as they were.

    None if the loader is empty.
    """
    check_loader(loader, "train_loader")
    with preserved_rng(generators=loader_generators(loader)):
        batch = next(iter(loader), None)
    return None if batch is None else keys.split(batch)[0]


def training_sample(request: FitRequest, n_samples: int) -> list[tuple[Any, Tensor]]:
    """Some of the training samples of a fit, in batches of inputs and targets.

    Drawn uniformly where the loader can be drawn from, else its first ones. The loader's generators
    are left as they were.
    """
    loader, keys = request.train_loader, request.keys
    if can_draw(loader):
        size = min(n_samples, len(sampler_indices(loader)))
        reading: dict[str, Any] = {"seed": request.seed, "keys": keys}
        supply = Supply.of(loader, n_samples=size, n_data=request.n_data, **reading)
        plan = plan_from_supply(supply, (1.0,))
        return [(batch.inputs, batch.targets) for batch in plan.batches()]
    batches: list[tuple[Any, Tensor]] = []
    with preserved_rng(generators=loader_generators(loader)):
        for batch in loader:
            batches.append(keys.split(batch))
            if sum(len(targets) for _, targets in batches) >= n_samples:
                break
    return batches


def first_inputs_of_plan(plan: CurvaturePlan) -> Any:
    """Model inputs of a plan's first batch; of its first two, where they hold one sample each.

    Whether samples mix shows on two samples only. None where this rank has no samples.
    """
    batches = plan.batches()
    try:
        first = next(batches, None)
        if first is None:
            return None
        inputs = first.inputs
        following = next(batches, None) if batch_length(inputs) == 1 else None
    finally:
        batches.close()  # type: ignore[attr-defined]
    if following is None or tensor_shapes(inputs) != tensor_shapes(following.inputs):
        return inputs
    return _joined(inputs, following.inputs)


def _joined(inputs: Any, following: Any) -> Any:
    """Both samples in one batch; what is not per sample stays as the first has it."""
    others = tensors_of(following)

    def joined(tensor: Tensor) -> Tensor:
        other = next(others)
        both_single = tensor.ndim > 0 and len(tensor) == 1 == len(other)
        return torch.cat([tensor, other]) if both_single else tensor

    return map_tensors(joined, inputs)
