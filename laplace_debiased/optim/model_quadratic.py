"""The local quadratic of a model's loss on a mini-batch.

A forward pass is recorded once and differentiated again at each product, so a product calls no
model code and costs at most two gradients. The price is memory: the record of the batch is kept for
as long as the quadratic lives. `curvature.lowrank.ggn_product` is another algorithm: it walks the
data anew for each product, at the price of two forward passes more, and keeps nothing. It takes a
square root of the loss Hessian; here the loss is the user's own, and is differentiated as it comes.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from laplace_debiased.checks import checked_number
from laplace_debiased.data.loaders import loader_generators
from laplace_debiased.errors import ArgumentTypeError
from laplace_debiased.network.inputs import (
    batch_length,
    call_arguments,
    described,
    explained_failure,
    invoke,
    logits_of,
    to_device,
)
from laplace_debiased.network.memory import is_out_of_memory
from laplace_debiased.network.modes import differentiable_kernels, public_call, undisturbed
from laplace_debiased.network.outputs import checked_model
from laplace_debiased.network.rng import preserved_rng
from laplace_debiased.network.substitution import call_with, substituted
from laplace_debiased.optim.quadratic import Matvec, Quadratic
from laplace_debiased.options import Curvature, parse_choice

Batch = tuple[Any, Tensor]


@public_call
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

    One forward pass over the data, whose record stays in memory for the products. For more data
    than that allows, give ``Quadratic`` an operator of curvlinops, which recomputes it.

    Args:
        model: Called as ``model(X)`` in evaluation mode; it comes out in its own.
        loss_func: A loss module with ``reduction="mean"``.
        data: Mini-batches ``(X, y)``, walked once; gradient and curvature are means over all their
            samples. ``X`` is a tensor [n, ...], or a mapping, tuple or list that holds such
            tensors, which the model takes as in ``DebiasedLaplace``: by keywords, one by one, or
            whole, as the signature of its ``forward`` says.
        params: Which parameters move, in this order; None: all that require a gradient.
        curvature: GGN or Hessian.
        damping: δ ≥ 0.

    Returns:
        A quadratic of the flat displacement [P] from the parameters as they are now. Its products
        raise RuntimeError once these have changed.

    Raises:
        TypeError: If a batch is no pair, the model returns neither a tensor nor a record with
            ``.logits``, or the parameters are in half precision.
        ValueError: If the loss is no mean, the data is empty, or a parameter is not the model's.
        RuntimeError: If the loss or its gradient is not finite.
    """
    checked_model(model)
    if isinstance(data, Tensor) or not isinstance(data, Iterable):
        raise ArgumentTypeError(
            f"data must be mini-batches [(X, y), ...]; got {type(data).__name__}."
        )
    curvature = parse_choice(Curvature, curvature, "curvature")
    damping = checked_number("damping", damping)
    chosen = [p for p in model.parameters() if p.requires_grad] if params is None else params
    if not isinstance(chosen, Iterable):
        raise ArgumentTypeError(
            f"params must be parameters of the model; got {type(chosen).__name__}."
        )
    loss = ModelLoss(model, loss_func, tuple(chosen))
    with preserved_rng(generators=loader_generators(data)):
        batches = [check_batch(batch, "data") for batch in data]
    if not batches:
        raise ValueError("data must hold at least one mini-batch (X, y), got none.")
    return loss.quadratic(batches, curvature, damping)[1]


@dataclass(frozen=True, eq=False)
class ModelLoss:
    """The mean loss of ``model`` as a function of some of its parameters, P numbers in all."""

    model: nn.Module
    loss_func: nn.Module
    params: tuple[nn.Parameter, ...]

    def __post_init__(self) -> None:
        if isinstance(self.loss_func, type):
            raise TypeError(f"loss_func is a class; pass an instance, {self.loss_func.__name__}().")
        if getattr(self.loss_func, "reduction", None) != "mean":
            raise ValueError(
                'loss_func must be a loss module with reduction="mean", got '
                f"{self.loss_func!r}: a sum would make the damping depend on the batch size."
            )
        _check_params(self.model, self.params)

    def at(self, batch: Batch, displacement: Tensor) -> float:
        """Mean loss over ``batch`` at the parameters plus ``displacement`` [P]; changes nothing.

        May be infinite or NaN: a trial step may well lead there.
        """
        X, y = self._on_device(batch)
        names = {id(p): name for name, p in self.model.named_parameters()}
        shifts = zip(self.params, unflatten(displacement, self.params), strict=True)
        with undisturbed(self.model), differentiable_kernels(self.model), torch.no_grad():
            moved = {names[id(p)]: p + shift for p, shift in shifts}
            args, kwargs = call_arguments(self.model, X)
            with explained_failure(X):
                outputs = logits_of(call_with(self.model, moved, args, kwargs))
            return float(self._loss(outputs, y))

    def quadratic(
        self, batches: Sequence[Batch], curvature: Curvature, damping: float
    ) -> tuple[float, Quadratic]:
        """Mean loss over all samples of ``batches`` [], and its damped quadratic."""
        n_samples = sum(batch_size(X) for X, _ in batches)
        total, mean_gradient = 0.0, torch.zeros_like(flatten(self.params))
        products: list[tuple[float, Matvec]] = []
        for batch in batches:
            share = batch_size(batch[0]) / n_samples
            outputs, loss = self._record(batch)
            total += share * float(loss.detach())
            mean_gradient.add_(flatten(_derivative([loss], self.params)), alpha=share)
            ggn = curvature is Curvature.GGN
            product = _ggn(outputs, loss, self.params) if ggn else _hessian(loss, self.params)
            products.append((share, product))
        if not (math.isfinite(total) and torch.isfinite(mean_gradient).all()):
            raise RuntimeError(
                f"The mean loss on the batch is {total} or its gradient is not finite: check the "
                "data and the parameters, or take smaller steps (lower lr, higher damping)."
            )
        versions = [p._version for p in self.params]

        def mean_product(vector: Tensor) -> Tensor:
            if versions != [p._version for p in self.params]:
                raise RuntimeError(
                    "The model's parameters have changed since this quadratic was built: build a "
                    "new one."
                )
            image = torch.zeros_like(vector)
            for share, product in products:
                image.add_(product(vector), alpha=share)
            return image

        return total, Quadratic(mean_product, mean_gradient, damping)

    def _record(self, batch: Batch) -> tuple[Tensor, Tensor]:
        X, y = self._on_device(batch)
        with undisturbed(self.model), differentiable_kernels(self.model), substituted({}):
            outputs = invoke(self.model, X)
            if not isinstance(outputs, Tensor):
                raise TypeError(
                    f"model must return a tensor, got {type(outputs).__name__}: wrap it in a "
                    "module that returns the outputs which loss_func takes."
                )
            loss = self._loss(outputs, y)
        if not loss.requires_grad:
            raise RuntimeError(
                "The loss does not depend on params: the model runs without recording gradients, "
                "or does not use these parameters."
            )
        return outputs, loss

    def _loss(self, outputs: Tensor, y: Tensor) -> Tensor:
        """The mean loss, or an error that says what ``loss_func`` was given."""
        try:
            return self.loss_func(outputs, y)
        except (RuntimeError, TypeError, ValueError, IndexError) as error:
            if is_out_of_memory(error):
                raise
            raise ValueError(
                f"loss_func failed on outputs {described(outputs)} and targets {described(y)}: "
                f"{type(error).__name__}: {error}. Give targets that fit it."
            ) from error

    def _on_device(self, batch: Batch) -> Batch:
        X, y = batch
        device = self.params[0].device
        return to_device(X, device), to_device(y, device, "targets")


def flatten(tensors: Iterable[Tensor]) -> Tensor:
    """One vector [P] out of tensors, without history."""
    return torch.cat([tensor.detach().reshape(-1) for tensor in tensors])


def unflatten(vector: Tensor, like: Sequence[Tensor]) -> list[Tensor]:
    """Split a vector [P] into tensors shaped as ``like``."""
    parts = vector.split([tensor.numel() for tensor in like])
    return [part.view(tensor.shape) for part, tensor in zip(parts, like, strict=True)]


def _derivative(
    values: Sequence[Tensor],
    by: Sequence[Tensor],
    cotangents: Sequence[Tensor] | None = None,
    create_graph: bool = False,
) -> list[Tensor]:
    """Derivatives of Σ values · cotangents by each of ``by``; 0 where there is none."""
    weights = [None] * len(values) if cotangents is None else cotangents
    pairs = [(v, c) for v, c in zip(values, weights, strict=True) if v.requires_grad]
    if not pairs:
        return [torch.zeros_like(tensor) for tensor in by]
    outputs, weights = zip(*pairs, strict=True)
    return list(
        torch.autograd.grad(
            outputs,
            by,
            weights,
            retain_graph=True,
            create_graph=create_graph,
            allow_unused=True,
            materialize_grads=True,
        )
    )


def _ggn(outputs: Tensor, loss: Tensor, params: Sequence[Tensor]) -> Matvec:
    """Products with G = Jᵀ (∇²_f ℓ) J, J the Jacobian of ``outputs`` f by ``params`` [P].

    Jv comes from differentiating uᵀJ, which is linear in u, by u. ∇²_f ℓ is that of ``loss`` as it
    is, so a mean loss gives a mean GGN (Schraudolph 2002).
    """
    u = torch.zeros_like(outputs, requires_grad=True)
    rows = _derivative([outputs], params, [u], create_graph=True)
    slope = _derivative([loss], [outputs], create_graph=True)

    def product(vector: Tensor) -> Tensor:
        image = _derivative(rows, [u], unflatten(vector, params))
        return flatten(_derivative([outputs], params, _derivative(slope, [outputs], image)))

    return product


def _hessian(loss: Tensor, params: Sequence[Tensor]) -> Matvec:
    """Products with the Hessian of ``loss`` by ``params`` [P] (Pearlmutter 1994)."""
    rows = _derivative([loss], params, create_graph=True)
    return lambda vector: flatten(_derivative(rows, params, unflatten(vector, params)))


def check_batch(batch: Any, name: str) -> Batch:
    """Return ``batch`` as a pair (X, y); TypeError or ValueError name it ``name``."""
    is_pair = isinstance(batch, tuple | list) and len(batch) == 2
    mapping = isinstance(batch, Mapping)
    if not is_pair or not isinstance(batch[1], Tensor):
        raise TypeError(
            f"{name} must be a pair (X, y) with y a tensor, got {type(batch).__name__}"
            + ("; pair a mapping with its labels: (batch, batch['labels'])." if mapping else ".")
        )
    if batch_size(batch[0]) == 0:
        raise ValueError(f"{name} must hold at least one sample, got none.")
    return batch[0], batch[1]


def batch_size(X: Any) -> int:
    """Number of samples in a tensor [n, ...], or in a mapping, tuple or list of such tensors."""
    try:
        return batch_length(X)
    except TypeError:
        raise TypeError(
            "X must be a tensor or a mapping, tuple or list that holds one, got "
            f"{type(X).__name__}."
        ) from None


def _check_params(model: nn.Module, params: Sequence[nn.Parameter]) -> None:
    if not params:
        raise ValueError("params is empty: no parameter requires a gradient.")
    names = {id(p) for p in model.parameters()}
    if any(id(p) not in names for p in params):
        raise ValueError("params must be parameters of model: got a tensor that model lacks.")
    if len({id(p) for p in params}) != len(params):
        raise ValueError("params must not hold a parameter twice.")
    if any(not p.requires_grad for p in params):
        raise ValueError("params must all require a gradient: leave out those that are frozen.")
    kinds = {(p.dtype, p.device) for p in params}
    if len(kinds) != 1 or params[0].dtype not in (torch.float32, torch.float64):
        raise TypeError(
            "params must share one device and one precision, float32 or float64, got "
            f"{sorted(str(kind) for kind in kinds)}."
        )
