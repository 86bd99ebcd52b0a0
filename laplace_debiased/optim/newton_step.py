"""One Newton step out of two mini-batches, as a function that changes nothing."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from laplace_debiased.optim.cg import debiased_cg
from laplace_debiased.optim.cost import sample_gradients
from laplace_debiased.optim.globalisation import Backtracking, LevenbergMarquardt, Trial
from laplace_debiased.optim.line import NonPositiveCurvature
from laplace_debiased.optim.model_quadratic import (
    Batch,
    ModelLoss,
    batch_size,
    check_batch,
)
from laplace_debiased.optim.quadratic import Quadratic
from laplace_debiased.optim.result import CGResult
from laplace_debiased.optim.termination import StopReason, Termination
from laplace_debiased.options import Curvature


class MiniBatches(NamedTuple):
    """The data of one step.

    Attributes:
        directions: ``(X, y)``, the batch B whose quadratic gives the directions.
        magnitudes: ``(X, y)``, an independent batch B̃ that gives the step sizes; None is single
            mode: B does both.
    """

    directions: Batch
    magnitudes: Batch | None = None


@dataclass(frozen=True)
class NewtonSettings:
    """What stays the same from step to step; the fields are those of ``NewtonCG``."""

    curvature: Curvature
    termination: Termination
    nonpositive_curvature: NonPositiveCurvature
    preconditioner: Callable[[Quadratic], Any] | None
    levenberg_marquardt: LevenbergMarquardt | None
    line_search: Backtracking | None


@dataclass(frozen=True, eq=False)
class StepReport:
    """What one step did. Losses are means over the magnitude batch.

    Attributes:
        loss: Before the step.
        loss_after: After it; None if neither line search nor damping rule asked for it.
        predicted_change: Change of the undamped magnitude quadratic, negative for a descent.
        reduction_ratio: Change of the loss over ``predicted_change``; −inf if the step failed
            or CG met curvature that is not positive, so that δ grows; None without ``loss_after``
            or where no change was predicted.
        step_size: Multiple of the CG solution that was added to the parameters; 0 if refused.
        damping: δ of this step.
        next_damping: δ of the next one.
        cg: The CG result, without its iterates.
        sample_gradients: Cost of the step in gradients of one sample (see ``optim.cost``).
    """

    loss: float
    loss_after: float | None
    predicted_change: float
    reduction_ratio: float | None
    step_size: float
    damping: float
    next_damping: float
    cg: CGResult
    sample_gradients: float


def newton_step(
    loss: ModelLoss, batches: MiniBatches, settings: NewtonSettings, lr: float, damping: float
) -> tuple[Tensor, StepReport]:
    """Displacement [P] of the parameters and the report on it; the model stays as it is.

    Raises:
        RuntimeError: If a loss, gradient, product or the solution is not finite.
    """
    own_loss, own = loss.quadratic([batches.directions], settings.curvature, damping)
    if batches.magnitudes is None:
        value, target, judge = own_loss, own, batches.directions
    else:
        judge = batches.magnitudes
        value, target = loss.quadratic([judge], settings.curvature, damping)
    result = debiased_cg(
        own,
        target,
        preconditioner=None if settings.preconditioner is None else settings.preconditioner(own),
        termination=settings.termination,
        nonpositive_curvature=settings.nonpositive_curvature,
        keep_vectors=False,
    )
    x = result.solution
    if not torch.isfinite(x).all():
        raise RuntimeError("The Newton step is not finite: raise the damping or use float64.")
    slope, curvature = _undamped(target, result)
    trial = _globalise(lambda t: loss.at(judge, t * x), value, slope, lr, settings)
    t = trial.step_size
    predicted = t * slope + 0.5 * t**2 * curvature
    ratio = _reduction_ratio(value, trial, predicted, result)
    rule = settings.levenberg_marquardt
    next_damping = damping if rule is None or ratio is None else rule.adapt(damping, ratio)
    cost = _cost(batches, result, trial.n_evaluations)
    return t * x, StepReport(
        value, trial.loss, predicted, ratio, t, damping, next_damping, result, cost
    )


def check_minibatches(batches: Any) -> MiniBatches:
    """Validate what a closure returned.

    Raises:
        TypeError: If it is not a pair of mini-batches.
        ValueError: If a mini-batch is empty.
    """
    if not isinstance(batches, tuple | list) or len(batches) != 2:
        raise TypeError(
            "closure must return MiniBatches(directions, magnitudes), each a pair (X, y), got "
            f"{type(batches).__name__}."
        )
    directions, magnitudes = batches
    hint = "the closure's {} (it returns MiniBatches(directions, magnitudes))"
    check_batch(directions, hint.format("directions"))
    if magnitudes is None or magnitudes is directions:
        return MiniBatches(directions)
    return MiniBatches(directions, check_batch(magnitudes, hint.format("magnitudes")))


def _undamped(target: Quadratic, result: CGResult) -> tuple[float, float]:
    """The pair g̃ᵀx, xᵀH̃x without the damping, from the residual that CG already has."""
    x, gradient = result.solution, target.gradient
    damped = float(x @ (result.residual - gradient))
    return float(x @ gradient), damped - target.damping * float(x @ x)


def _globalise(
    loss_at: Callable[[float], float],
    loss: float,
    slope: float,
    lr: float,
    settings: NewtonSettings,
) -> Trial:
    if settings.line_search is not None:
        return settings.line_search.search(loss_at, loss, slope, lr)
    if settings.levenberg_marquardt is None:
        return Trial(lr, None, 0)
    trial = loss_at(lr)
    return Trial(lr, trial, 1) if math.isfinite(trial) else Trial(0.0, loss, 1)


def _reduction_ratio(loss: float, trial: Trial, predicted: float, result: CGResult) -> float | None:
    if trial.loss is None:
        return None
    not_convex = result.stop_reason is StopReason.NON_POSITIVE_CURVATURE
    moved = result.n_iterations > 0
    if not_convex or (moved and trial.step_size == 0.0):
        return -math.inf
    return (trial.loss - loss) / predicted if predicted < 0 else None


def _cost(batches: MiniBatches, result: CGResult, n_forwards: int) -> float:
    """Gradients of single samples; the loss is tried on the magnitude batch."""
    n = batch_size(batches.directions[0])
    cost = sample_gradients(n, n_gradients=1, n_products=result.direction_products)
    if batches.magnitudes is not None:
        n = batch_size(batches.magnitudes[0])
        cost += sample_gradients(n, n_gradients=1, n_products=result.magnitude_products)
    return cost + sample_gradients(n, n_forwards=n_forwards)
