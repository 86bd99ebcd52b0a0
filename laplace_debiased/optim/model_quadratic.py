"""The local quadratic of a model's loss on a mini-batch."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Any, assert_never

import torch
from curvlinops import GGNLinearOperator, HessianLinearOperator
from torch import Tensor, nn

from laplace_debiased.optim.isolation import as_fixed_function
from laplace_debiased.optim.quadratic import Quadratic

Batch = tuple[Any, Tensor]


class Curvature(StrEnum):
    """The matrix H of a local quadratic.

    * ``GGN``: generalised Gauss-Newton, positive semi-definite for a convex loss.
    * ``HESSIAN``: second derivatives; indefinite in general.
    """

    GGN = "ggn"
    HESSIAN = "hessian"


@dataclass(frozen=True, eq=False)
class ModelLoss:
    """The mean loss of ``model`` as a function of some of its parameters.

    Attributes:
        model: Called as ``model(X)``. It runs in evaluation mode and comes out in its own.
        loss_func: A loss module with ``reduction="mean"``, called as ``loss_func(model(X), y)``.
        params: Parameters of ``model``, float32 or float64, P numbers in all.
    """

    model: nn.Module
    loss_func: nn.Module
    params: tuple[nn.Parameter, ...]

    def __post_init__(self) -> None:
        _check_loss(self.loss_func)
        _check_params(self.model, self.params)

    def at(self, batch: Batch, displacement: Tensor | None = None) -> float:
        """Mean loss over ``batch`` at the parameters plus ``displacement`` [P]; changes nothing.

        May be infinite or NaN: a trial step may well lead there.
        """
        X, y = self._on_device(batch)
        with as_fixed_function(self.model), torch.no_grad():
            if displacement is None:
                return float(self.loss_func(self.model(X), y))
            names = {id(p): name for name, p in self.model.named_parameters()}
            moved = {
                names[id(p)]: p + d
                for p, d in zip(self.params, unflatten(displacement, self.params), strict=True)
            }
            return float(self.loss_func(torch.func.functional_call(self.model, moved, (X,)), y))

    def value_and_gradient(self, batches: Sequence[Batch]) -> tuple[float, Tensor]:
        """Mean loss over all samples of ``batches``, and its gradient [P].

        Raises:
            RuntimeError: If the loss is not finite.
        """
        sizes = [batch_size(X) for X, _ in batches]
        total, gradient = 0.0, torch.zeros_like(flatten(self.params))
        for batch, size in zip(batches, sizes, strict=True):
            X, y = self._on_device(batch)
            with as_fixed_function(self.model), torch.enable_grad():
                loss = self.loss_func(self.model(X), y)
                parts = torch.autograd.grad(
                    loss, self.params, allow_unused=True, materialize_grads=True
                )
            total += float(loss) * size / sum(sizes)
            gradient.add_(flatten(parts), alpha=size / sum(sizes))
        if not (torch.isfinite(gradient).all() and torch.isfinite(torch.tensor(total))):
            raise RuntimeError(
                f"The loss on the batch is {total} or its gradient is not finite: check the data "
                "and the parameters, or take smaller steps (lower lr, higher damping)."
            )
        return total, gradient

    def _on_device(self, batch: Batch) -> Batch:
        X, y = batch
        device = self.params[0].device
        return (X.to(device) if isinstance(X, Tensor) else X), y.to(device)


def model_quadratic(
    model: nn.Module,
    loss_func: nn.Module,
    data: Iterable[Batch],
    *,
    params: Iterable[nn.Parameter] | None = None,
    curvature: Curvature | str = Curvature.GGN,
    damping: float = 0.0,
) -> Quadratic:
    """The damped quadratic of the mean loss on ``data`` around the model's parameters.

    Args:
        model: Called as ``model(X)``; evaluated in evaluation mode, restored afterwards.
        loss_func: A loss module with ``reduction="mean"``.
        data: Mini-batches ``(X, y)``, walked once now and kept; gradient and curvature are means
            over all their samples. ``X`` is a tensor or a mapping that holds tensors.
        params: Which parameters move, in this order; None: all that require a gradient.
        curvature: GGN or Hessian, through curvlinops.
        damping: δ ≥ 0.

    Returns:
        A quadratic of the flat displacement [P]. It describes the parameters as they are now: its
        products raise once these have changed.

    Raises:
        TypeError: If a batch is no pair, or the parameters are in half precision.
        ValueError: If the loss is no mean, the data is empty, or a parameter is not the model's.
        RuntimeError: If the loss or its gradient is not finite.
    """
    chosen = [p for p in model.parameters() if p.requires_grad] if params is None else params
    loss = ModelLoss(model, loss_func, tuple(chosen))
    batches = tuple(check_batch(batch, "data") for batch in data)
    if not batches:
        raise ValueError("data must hold at least one mini-batch (X, y), got none.")
    return loss_quadratic(loss, batches, Curvature(curvature), damping)[1]


def loss_quadratic(
    loss: ModelLoss, batches: Sequence[Batch], curvature: Curvature, damping: float
) -> tuple[float, Quadratic]:
    """Mean loss over ``batches`` and its damped quadratic around the current parameters."""
    value, gradient = loss.value_and_gradient(batches)
    return value, Quadratic(_ModelOperator.build(loss, batches, curvature), gradient, damping)


@dataclass(frozen=True, eq=False)
class _ModelOperator:
    """Products with the curvature at the parameters' present values."""

    operator: GGNLinearOperator | HessianLinearOperator
    loss: ModelLoss
    versions: tuple[int, ...]

    @classmethod
    def build(
        cls, loss: ModelLoss, batches: Sequence[Batch], curvature: Curvature
    ) -> "_ModelOperator":
        match curvature:
            case Curvature.GGN:
                kind = GGNLinearOperator
            case Curvature.HESSIAN:
                kind = HessianLinearOperator
            case _:
                assert_never(curvature)
        operator = kind(
            loss.model,
            loss.loss_func,
            list(loss.params),
            list(batches),
            # The check draws from the global generator.
            check_deterministic=False,
            num_data=sum(batch_size(X) for X, _ in batches),
            batch_size_fn=batch_size,
        )
        return cls(operator, loss, tuple(p._version for p in loss.params))

    @property
    def shape(self) -> tuple[int, int]:
        return tuple(self.operator.shape)

    def matvec(self, vector: Tensor) -> Tensor:
        if self.versions != tuple(p._version for p in self.loss.params):
            raise RuntimeError(
                "The model's parameters have changed since this quadratic was built: its gradient "
                "is that of the old ones. Build a new quadratic."
            )
        with as_fixed_function(self.loss.model):
            return self.operator @ vector


def check_batch(batch: Any, name: str) -> Batch:
    """Return ``batch`` as a pair (X, y), or raise TypeError naming ``name``."""
    is_pair = isinstance(batch, tuple | list) and len(batch) == 2
    if not is_pair or not isinstance(batch[1], Tensor):
        raise TypeError(
            f"{name} must be a pair (X, y) with y a tensor, got {type(batch).__name__}."
        )
    if batch_size(batch[0]) == 0:
        raise ValueError(f"{name} must hold at least one sample, got none.")
    return batch[0], batch[1]


def batch_size(X: Any) -> int:
    """Number of samples in a tensor [n, ...] or in a mapping of such tensors."""
    values = list(X.values()) if isinstance(X, Mapping) else [X]
    for value in values:
        if isinstance(value, Tensor) and value.ndim > 0:
            return value.shape[0]
    raise TypeError(f"X must be a tensor or a mapping that holds one, got {type(X).__name__}.")


def flatten(tensors: Iterable[Tensor]) -> Tensor:
    """One vector [P] out of tensors, without history."""
    return torch.cat([tensor.detach().reshape(-1) for tensor in tensors])


def unflatten(vector: Tensor, like: Sequence[Tensor]) -> list[Tensor]:
    """Split a vector [P] into tensors shaped as ``like``."""
    parts = vector.split([tensor.numel() for tensor in like])
    return [part.view(tensor.shape) for part, tensor in zip(parts, like, strict=True)]


def _check_loss(loss_func: nn.Module) -> None:
    if getattr(loss_func, "reduction", None) != "mean":
        raise ValueError(
            'loss_func must be a loss module with reduction="mean", got '
            f"{loss_func!r}: a sum would make the damping depend on the batch size."
        )


def _check_params(model: nn.Module, params: Sequence[nn.Parameter]) -> None:
    if not params:
        raise ValueError("params is empty: no parameter requires a gradient.")
    names = {id(p) for p in model.parameters()}
    if any(id(p) not in names for p in params):
        raise ValueError("params must be parameters of model: got a tensor that model lacks.")
    if len({id(p) for p in params}) != len(params):
        raise ValueError("params must not hold a parameter twice.")
    kinds = {(p.dtype, p.device) for p in params}
    if len(kinds) != 1 or params[0].dtype not in (torch.float32, torch.float64):
        raise TypeError(
            "params must share one device and one precision, float32 or float64, got "
            f"{sorted(str(kind) for kind in kinds)}."
        )
