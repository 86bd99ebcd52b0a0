"""A torch optimiser that takes debiased Newton steps."""

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, Final, NamedTuple

import torch
from torch import Tensor, nn

from laplace_debiased.checks import checked_flag, checked_number
from laplace_debiased.errors import ArgumentTypeError
from laplace_debiased.network.interrupts import uninterrupted
from laplace_debiased.network.modes import public_call
from laplace_debiased.network.outputs import checked_model
from laplace_debiased.optim.cg import (
    CGResult,
    NonPositiveCurvature,
    StopReason,
    Termination,
    debiased_cg,
)
from laplace_debiased.optim.model_quadratic import (
    Batch,
    ModelLoss,
    batch_size,
    check_batch,
    unflatten,
)
from laplace_debiased.options import Curvature, parse_choice

DEFAULT_CG: Final = Termination(max_iterations=40, relative_progress=5e-4)
_GRADIENTS_PER_PRODUCT: Final = 2.0
_GRADIENTS_PER_FORWARD: Final = 1.0 / 3.0
_DAMPING_FACTOR: Final = 1.5
_DAMPING_RANGE: Final = 1e-8, 1e8
_LOW_RATIO, _HIGH_RATIO = 0.25, 0.75
_SHRINK, _SUFFICIENT, _MAX_TRIALS = 0.5, 1e-2, 12


class MiniBatches(NamedTuple):
    """The data of one step.

    Attributes:
        directions: ``(X, y)``, the batch B whose quadratic gives the directions.
        magnitudes: ``(X, y)``, an independent batch B̃ that gives the step sizes; None is single
            mode: B does both.
    """

    directions: Batch
    magnitudes: Batch | None = None


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
        sample_gradients: Cost of the step in gradients of one sample. A product with a GGN or a
            Hessian counts two, as is usual (Pearlmutter 1994; Schraudolph 2002; Martens 2010,
            section 2); a forward pass a third, for a backward pass costs two. The vector arithmetic
            of conjugate gradients is left out.
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


class Trial(NamedTuple):
    """A step size, the mean loss there (None if not evaluated), and the evaluations it took."""

    step_size: float
    loss: float | None
    n_evaluations: int


def backtracked(
    loss_at: Callable[[float], float], loss: float, slope: float, step_size: float
) -> Trial:
    """The first of ``step_size`` and its halves at which the loss falls enough, or step size 0.

    ``loss_at`` gives the mean loss at a step size, and infinite or NaN counts as too large;
    ``loss`` is that at 0, and ``slope`` its derivative, taken as 0 if it is positive.
    """
    for n_trials in range(1, _MAX_TRIALS + 1):
        trial = loss_at(step_size)
        # A NaN fails the comparison, as it should.
        if trial <= loss + _SUFFICIENT * step_size * min(slope, 0.0):
            return Trial(step_size, trial, n_trials)
        step_size *= _SHRINK
    return Trial(0.0, loss, _MAX_TRIALS)


def adapted(damping: float, ratio: float) -> float:
    """The next damping, given the loss's change over that of the undamped quadratic.

    A ``ratio`` of −inf stands for a step that failed (Martens 2010, section 4.1).
    """
    low, high = _DAMPING_RANGE
    if ratio < _LOW_RATIO:
        return min(max(damping * _DAMPING_FACTOR, low), max(damping, high))
    return max(damping / _DAMPING_FACTOR, min(damping, low)) if ratio > _HIGH_RATIO else damping


class NewtonCG(torch.optim.Optimizer):
    """Newton's method with debiased conjugate gradients, two mini-batches per step.

    Each ``step`` builds the damped quadratic of the mean loss on both batches, minimises the
    magnitude batch's along the directions of the other (see ``debiased_cg``), and adds a multiple
    of the solution to the parameters. Source: Tatzel, Mucsányi, Hackel, Hennig, ICLR 2025; damping
    after Martens (2010).

    **Closure protocol.** The optimiser evaluates the model itself, so the closure returns data, not
    a loss. It is called once per step and returns ``MiniBatches(directions, magnitudes)``, two
    disjoint mini-batches ``(X, y)``; a plain pair of them will do. ``MiniBatches(batch)`` is single
    mode: textbook Newton-CG on one batch.

        >>> X = torch.linspace(-1, 1, 32).view(-1, 1)
        >>> model = nn.Linear(1, 1)
        >>> optimizer = NewtonCG(model.parameters(), model, nn.MSELoss(), damping=1e-6)
        >>> first, second = (X[::2], 3 * X[::2]), (X[1::2], 3 * X[1::2])
        >>> for _ in range(5):
        ...     loss = optimizer.step(lambda: MiniBatches(first, second))
        >>> loss < 1e-6
        True

    The model runs in evaluation mode inside a step (a quadratic needs one fixed function): no
    dropout, and batch normalisation with its running statistics, which a step does not update.
    ``.grad`` is neither read nor written. If anything raises, the parameters and the state are
    those from before the step. Parameters that do not require a gradient stay as they are.

    Args:
        params: Parameters of ``model``; one group only.
        model: Called as ``model(X)``.
        loss_func: A loss module with ``reduction="mean"``, called as ``loss_func(model(X), y)``.
        lr: First multiple of the solution to try; 1 is the Newton step.
        damping: Initial δ ≥ 0, added to the curvature of the mean loss.
        curvature: ``"ggn"`` or ``"hessian"``.
        termination: When CG ends.
        levenberg_marquardt: Adapt δ to how well the quadratic foretold the loss (Martens 2010,
            section 4.1); False keeps it. A step that leads to a loss that is not finite is refused
            and makes δ grow.
        line_search: Halve the step until the loss on the magnitude batch falls enough (Armijo;
            Nocedal & Wright 2006, algorithm 3.1), 12 times at most; False takes it as it is.

    Attributes:
        last_step: The report on the last step, or None. Not part of the state_dict, which holds
            ``lr``, ``damping``, ``n_steps`` and ``sample_gradients`` (the cost so far) and loads
            with ``weights_only=True``; the other settings are given at construction.

    Raises:
        TypeError: If an argument is of the wrong kind, or parameters are in half precision.
        ValueError: If ``lr`` is not positive, ``damping`` negative, there is more than one group, a
            parameter is not the model's, or the loss is no mean.
    """

    def __init__(
        self,
        params: Iterable[nn.Parameter],
        model: nn.Module,
        loss_func: nn.Module,
        *,
        lr: float = 1.0,
        damping: float = 1e-2,
        curvature: Curvature | str = Curvature.GGN,
        termination: Termination = DEFAULT_CG,
        levenberg_marquardt: bool = True,
        line_search: bool = True,
    ) -> None:
        checked_model(model)
        lr, damping = checked_number("lr", lr, positive=True), checked_number("damping", damping)
        if not isinstance(params, Iterable):
            kind = type(params).__name__
            raise ArgumentTypeError(f"params must be the model's parameters; got {kind}.")
        if not isinstance(termination, Termination):
            kind = type(termination).__name__
            raise ArgumentTypeError(f"termination must be a Termination; got {kind}.")
        counters = {"n_steps": 0, "sample_gradients": 0.0}
        super().__init__(params, {"lr": lr, "damping": damping} | counters)
        self._model, self._loss_func, self._termination = model, loss_func, termination
        self._curvature = parse_choice(Curvature, curvature, "curvature")
        self._adapts = checked_flag("levenberg_marquardt", levenberg_marquardt)
        self._line_search = checked_flag("line_search", line_search)
        self.last_step: StepReport | None = None
        self._loss()  # bad parameters or a bad loss are reported here

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add the one group of parameters; a second raises ValueError."""
        if self.param_groups:
            raise ValueError("params must form one group: a Newton step couples all of them.")
        super().add_param_group(param_group)

    @public_call
    def step(  # type: ignore[override]
        self, closure: Callable[[], MiniBatches] | None = None
    ) -> float:
        """Take one step.

        Args:
            closure: Returns the mini-batches; see the class.

        Returns:
            The mean loss on the magnitude batch before the step; ``last_step`` has the rest.

        Raises:
            TypeError: If ``closure`` is missing or returns anything else.
            ValueError: If a mini-batch is empty.
            RuntimeError: If the loss, its gradient or a product is not finite.
        """
        if not callable(closure):
            raise ArgumentTypeError(
                "step needs a closure, a function that returns MiniBatches(directions, "
                f"magnitudes); got {type(closure).__name__}."
            )
        loss, group = self._loss(), self.param_groups[0]
        batches = _checked_minibatches(closure())
        displacement, report = self._newton_step(
            loss, batches, float(group["lr"]), float(group["damping"])
        )
        with uninterrupted():
            if report.step_size != 0.0:
                _move(loss.params, displacement)
            group["damping"] = report.next_damping
            group["n_steps"] += 1
            group["sample_gradients"] += report.sample_gradients
            self.last_step = report
        return report.loss

    def _loss(self) -> ModelLoss:
        params = tuple(p for p in self.param_groups[0]["params"] if p.requires_grad)
        return ModelLoss(self._model, self._loss_func, params)

    def _newton_step(
        self, loss: ModelLoss, batches: MiniBatches, lr: float, damping: float
    ) -> tuple[Tensor, StepReport]:
        """Displacement [P] of the parameters and the report on it; the model stays as it is."""
        value, own = loss.quadratic([batches.directions], self._curvature, damping)
        judge, target = batches.directions, own
        if batches.magnitudes is not None:
            judge = batches.magnitudes
            value, target = loss.quadratic([judge], self._curvature, damping)
        result = debiased_cg(
            own,
            target,
            termination=self._termination,
            nonpositive_curvature=NonPositiveCurvature.ABSOLUTE,
            keep_vectors=False,
        )
        x, gradient = result.solution, target.gradient
        if not torch.isfinite(x).all():
            raise RuntimeError("The Newton step is not finite: raise the damping or use float64.")
        # Without the damping, from the residual that CG already has.
        slope = float(x @ gradient)
        curvature = float(x @ (result.residual - gradient)) - damping * float(x @ x)
        trial = self._tried(lambda t: loss.at(judge, t * x), value, slope, lr)
        t = trial.step_size
        predicted = t * slope + 0.5 * t**2 * curvature
        ratio, next_damping = _reduction_ratio(value, trial, predicted, result), damping
        if self._adapts and ratio is not None:
            next_damping = adapted(damping, ratio)
        n = batch_size(batches.directions[0])
        cost = n * (1 + _GRADIENTS_PER_PRODUCT * result.direction_products)
        if batches.magnitudes is not None:
            n = batch_size(judge[0])
            cost += n * (1 + _GRADIENTS_PER_PRODUCT * result.magnitude_products)
        cost += n * (_GRADIENTS_PER_FORWARD * trial.n_evaluations)
        return t * x, StepReport(
            value, trial.loss, predicted, ratio, t, damping, next_damping, result, cost
        )

    def _tried(
        self, loss_at: Callable[[float], float], loss: float, slope: float, lr: float
    ) -> Trial:
        if self._line_search:
            return backtracked(loss_at, loss, slope, lr)
        if not self._adapts:
            return Trial(lr, None, 0)
        trial = loss_at(lr)
        return Trial(lr, trial, 1) if math.isfinite(trial) else Trial(0.0, loss, 1)


def _checked_minibatches(batches: Any) -> MiniBatches:
    """What a closure returned, as non-empty mini-batches."""
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


def _reduction_ratio(loss: float, trial: Trial, predicted: float, result: CGResult) -> float | None:
    if trial.loss is None:
        return None
    not_convex = result.stop_reason is StopReason.NON_POSITIVE_CURVATURE
    moved = result.n_iterations > 0
    if not_convex or (moved and trial.step_size == 0.0):
        return -math.inf
    return (trial.loss - loss) / predicted if predicted < 0 else None


@torch.no_grad()
def _move(params: tuple[nn.Parameter, ...], displacement: Tensor) -> None:
    # All sums first: should one run out of memory, no parameter has changed.
    moved = [p + d for p, d in zip(params, unflatten(displacement, params), strict=True)]
    for parameter, value in zip(params, moved, strict=True):
        parameter.copy_(value)
