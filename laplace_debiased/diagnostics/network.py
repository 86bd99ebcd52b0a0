"""A network as a pure function of its trainable parameters, left as it was found."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from laplace_debiased.data.loaders import loader_generators
from laplace_debiased.likelihoods import LossModel, loss_model
from laplace_debiased.network.calls import call_with
from laplace_debiased.network.inputs import (
    AttributeDict,
    batch_length,
    call_arguments,
    explained_failure,
    logits_of,
    to_device,
)
from laplace_debiased.network.modes import differentiable_kernels
from laplace_debiased.network.precision import full_precision
from laplace_debiased.network.rng import preserved_rng
from laplace_debiased.network.transforms import Parameters, plain_inputs, split_directions


@contextmanager
def undisturbed(model: nn.Module, loader: object = None) -> Iterator[None]:
    """Evaluation mode and kernels that forward-mode derivatives support; all restored after.

    The global generators too, and the loader's own: one that shuffles draws from them.
    """
    with (
        preserved_rng(generators=loader_generators(loader)),
        differentiable_kernels(model),
        torch.enable_grad(),
    ):
        yield


def attributed(inputs: Any) -> Any:
    """A dict of inputs that can be read by attribute too, as a model may read its batch.

    Only plain dicts go through vmap, so this is for the call of the model alone.
    """
    return AttributeDict(inputs) if isinstance(inputs, dict) else inputs


@dataclass(frozen=True, eq=False)
class Network:
    """Outputs as a function of the trainable parameters, with the loss that they feed.

    Attributes:
        model: the user's module; only ever called through ``call_with``.
        loss: per-sample negative log likelihood.
        parameters: trainable parameters by name, detached, in float32 or better.
        constants: frozen parameters and buffers, likewise.
        label_key: key of the targets where a batch is a mapping.
    """

    model: nn.Module
    loss: LossModel
    parameters: Parameters
    constants: Parameters
    label_key: str = "labels"

    @classmethod
    def of(cls, model: nn.Module, likelihood: str, label_key: str = "labels") -> Network:
        """View of a model.

        Raises:
            ValueError: if no parameter is trainable, or one is not finite; or for a likelihood
                other than "classification" and "regression".
        """
        named = dict(model.named_parameters())
        trainable = {n: full_precision(p.detach()) for n, p in named.items() if p.requires_grad}
        if not trainable:
            raise ValueError(
                "the model has no trainable parameter (requires_grad=True), so there are no "
                "directions. Unfreeze the parameters whose curvature is meant."
            )
        for name, value in trainable.items():
            if not bool(torch.isfinite(value).all()):
                raise ValueError(f"parameter {name!r} contains NaN or infinite values.")
        fixed = {n: full_precision(p.detach()) for n, p in named.items() if not p.requires_grad}
        fixed |= {n: full_precision(b.detach()) for n, b in model.named_buffers()}
        return cls(model, loss_model(likelihood), trainable, fixed, label_key)

    @property
    def n_parameters(self) -> int:
        """Number of trainable parameter entries P."""
        return sum(value.numel() for value in self.parameters.values())

    @property
    def device(self) -> torch.device:
        """Device of the parameters."""
        return next(iter(self.parameters.values())).device

    @property
    def dtype(self) -> torch.dtype:
        """The widest dtype among the parameters."""
        dtypes = {value.dtype for value in self.parameters.values()}
        return torch.float64 if torch.float64 in dtypes else torch.float32

    def flat_parameters(self) -> Tensor:
        """All trainable parameters as one vector [P], in the order of ``model.parameters()``."""
        return torch.cat([value.reshape(-1) for value in self.parameters.values()])

    def outputs(self, parameters: Parameters, inputs: Any) -> Tensor:
        """Network outputs [m, C].

        Raises:
            TypeError: if the model returns anything but a tensor.
        """
        args, kwargs = call_arguments(self.model, attributed(inputs))
        values = {**self.constants, **parameters}
        result = logits_of(call_with(self.model, values, args, kwargs))
        if not isinstance(result, Tensor):
            raise TypeError(
                "the model must return a tensor of outputs (batch, outputs); got "
                f"{type(result).__name__}. Wrap it in a module that returns its logits."
            )
        return result

    def checked_outputs(self, inputs: Any, targets: Tensor) -> Tensor:
        """Outputs [m, C] at the present parameters, finite and with fitting targets.

        Raises:
            ModelCallError: if the model fails on the inputs.
            ValueError: if an output is not finite, or the targets do not fit the outputs.
        """
        with torch.no_grad(), explained_failure(inputs):
            outputs = self.outputs(self.parameters, inputs)
        if not bool(torch.isfinite(outputs).all()):
            raise ValueError(
                "the model's outputs contain NaN or infinite values; check the inputs of this "
                "batch for NaN and the model for overflow."
            )
        self.loss.check_targets(outputs, targets)
        if len(outputs) != batch_length(inputs):
            raise ValueError(
                f"the model returned {len(outputs)} outputs for {batch_length(inputs)} inputs; "
                "per-sample curvature needs one output row per sample."
            )
        return outputs

    def split(self, directions: Tensor) -> Parameters:
        """Columns of ``directions`` [P, k] as one tensor [k, *shape] per parameter."""
        return split_directions(directions, self.parameters)

    def pair(self, batch: object, role: str) -> tuple[Any, Tensor]:
        """Inputs and targets of a batch, on the parameters' device.

        Args:
            batch: (inputs, targets), or a mapping that holds the targets at ``label_key``.
            role: name of the argument, for the error message.

        Raises:
            TypeError: if it is neither.
            ValueError: if the key of the targets is missing, or the batch is empty.
        """
        if isinstance(batch, Mapping):
            if self.label_key not in batch:
                raise ValueError(
                    f"{role} has no entry {self.label_key!r}; its keys are "
                    f"{sorted(map(str, batch))}. Name "
                    "the targets' key with dict_key_y."
                )
            inputs, targets = batch, batch[self.label_key]
        elif isinstance(batch, tuple | list) and len(batch) == 2:
            inputs, targets = batch
        else:
            raise TypeError(
                f"{role} must be a pair (inputs, targets) or a mapping with the targets at "
                f"{self.label_key!r}; got {type(batch).__name__}."
            )
        if not isinstance(targets, Tensor):
            raise TypeError(
                f"the targets of {role} must be a tensor; got {type(targets).__name__}."
            )
        if batch_length(inputs) == 0:
            raise ValueError(f"{role} is empty; it needs at least one sample.")
        inputs = plain_inputs(to_device(inputs, self.device), self.dtype)
        return inputs, plain_inputs(targets.to(self.device), self.dtype)
