"""A torch optimiser that takes debiased Newton steps."""

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from laplace_debiased.checks import checked_number
from laplace_debiased.errors import ArgumentTypeError
from laplace_debiased.network.interrupts import uninterrupted
from laplace_debiased.network.modes import public_call
from laplace_debiased.network.outputs import checked_model
from laplace_debiased.optim.globalisation import Backtracking, LevenbergMarquardt
from laplace_debiased.optim.line import NonPositiveCurvature
from laplace_debiased.optim.model_quadratic import ModelLoss
from laplace_debiased.optim.newton_step import (
    MiniBatches,
    NewtonSettings,
    StepReport,
    check_minibatches,
    newton_step,
)
from laplace_debiased.optim.operators import unflatten
from laplace_debiased.optim.quadratic import Quadratic
from laplace_debiased.optim.termination import Termination
from laplace_debiased.options import Curvature, parse_choice

DEFAULT_CG = Termination(max_iterations=40, relative_progress=5e-4)
DEFAULT_DAMPING_RULE = LevenbergMarquardt()
DEFAULT_LINE_SEARCH = Backtracking()


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
        nonpositive_curvature: See ``NonPositiveCurvature``. Only a Hessian, or δ = 0, needs it.
        preconditioner: Function from the direction quadratic to an approximation of its inverse.
        levenberg_marquardt: How δ adapts; None keeps it. A step that leads to a loss that is not
            finite is refused and makes δ grow.
        line_search: Backtracking on the magnitude batch; None takes the step as it is.

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
        nonpositive_curvature: NonPositiveCurvature | str = NonPositiveCurvature.ABSOLUTE,
        preconditioner: Callable[[Quadratic], Any] | None = None,
        levenberg_marquardt: LevenbergMarquardt | None = DEFAULT_DAMPING_RULE,
        line_search: Backtracking | None = DEFAULT_LINE_SEARCH,
    ) -> None:
        checked_model(model)
        lr, damping = checked_number("lr", lr, positive=True), checked_number("damping", damping)
        kinds: tuple[tuple[str, Any, Any, str], ...] = (
            ("termination", termination, Termination, "a Termination"),
            (
                "levenberg_marquardt",
                levenberg_marquardt,
                LevenbergMarquardt | None,
                "a LevenbergMarquardt rule or None",
            ),
            ("line_search", line_search, Backtracking | None, "a Backtracking or None"),
        )
        for name, value, kind, wanted in kinds:
            if not isinstance(value, kind):
                raise ArgumentTypeError(f"{name} must be {wanted}; got {type(value).__name__}.")
        if preconditioner is not None and not callable(preconditioner):
            raise ArgumentTypeError(
                f"preconditioner must be a function; got {type(preconditioner).__name__}."
            )
        if not isinstance(params, Iterable):
            raise ArgumentTypeError(
                f"params must be the model's parameters; got {type(params).__name__}."
            )
        counters = {"n_steps": 0, "sample_gradients": 0.0}
        super().__init__(params, {"lr": lr, "damping": damping} | counters)
        self._model = model
        self._loss_func = loss_func
        self._settings = NewtonSettings(
            curvature=parse_choice(Curvature, curvature, "curvature"),
            termination=termination,
            nonpositive_curvature=parse_choice(
                NonPositiveCurvature, nonpositive_curvature, "nonpositive_curvature"
            ),
            preconditioner=preconditioner,
            levenberg_marquardt=levenberg_marquardt,
            line_search=line_search,
        )
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
        if closure is None:
            raise TypeError(
                "step needs a closure that returns MiniBatches(directions, magnitudes)."
            )
        loss, group = self._loss(), self.param_groups[0]
        batches = check_minibatches(closure())
        displacement, report = newton_step(
            loss, batches, self._settings, float(group["lr"]), float(group["damping"])
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


@torch.no_grad()
def _move(params: tuple[nn.Parameter, ...], displacement: Tensor) -> None:
    # All sums first: should one run out of memory, no parameter has changed.
    moved = [p + d for p, d in zip(params, unflatten(displacement, params), strict=True)]
    for parameter, value in zip(params, moved, strict=True):
        parameter.copy_(value)
