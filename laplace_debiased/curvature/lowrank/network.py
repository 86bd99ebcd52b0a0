"""A network as a pure function of its covered parameters, left as it was found."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, nn

from laplace_debiased.curvature.coverage import FROZEN, Coverage
from laplace_debiased.curvature.guards import (
    batch_length,
    call_with,
    evaluation_mode,
    math_attention,
    model_lock,
    to_device,
)
from laplace_debiased.curvature.passes import check_outputs
from laplace_debiased.data.inputs import (
    AttributeDict,
    call_arguments,
    explained_failure,
    logits_of,
)

Parameters = dict[str, Tensor]
_HALF_DTYPES = (torch.float16, torch.bfloat16)


@contextmanager
def differentiable_kernels(model: nn.Module) -> Iterator[None]:
    """Evaluation mode, and kernels that forward mode and vmap support; all restored after.

    The fused attention kernels and the encoder's fast path know neither, and automatic casts would
    change the precision of a measurement.
    """
    device = next((p.device.type for p in model.parameters()), "cpu")
    with (
        evaluation_mode(model),
        torch.inference_mode(False),
        torch.autocast(device, enabled=False),
        math_attention(),
    ):
        yield


def parameter_coverage(model: nn.Module) -> Coverage:
    """Cover every parameter that requires gradients, whatever its layer; tied ones once."""
    named = dict(model.named_parameters())
    return Coverage(
        tuple(name for name, p in named.items() if p.requires_grad),
        MappingProxyType({name: FROZEN for name, p in named.items() if not p.requires_grad}),
        MappingProxyType({name: p.numel() for name, p in named.items()}),
    )


@dataclass(frozen=True, eq=False)
class FunctionalNetwork:
    """Outputs as a function of the covered parameters, in float32 or better.

    Args:
        model: the network; only ever read, through ``call_with``.
        names: covered parameters; flat vectors [P] hold them in this order.
    """

    model: nn.Module
    names: tuple[str, ...]

    def parameters(self) -> Parameters:
        """Current values of the covered parameters, detached."""
        # Another thread may be running a sampled network, whose weights are in the model meanwhile.
        with model_lock(self.model):
            named = dict(self.model.named_parameters())
        return {name: _widened(named[name].detach()) for name in self.names}

    def constants(self) -> Parameters:
        """What has to replace the model's other entries: those in half precision."""
        covered = frozenset(self.names)
        with model_lock(self.model):
            entries = [*self.model.named_parameters(), *self.model.named_buffers()]
        return {
            name: value.detach().float()
            for name, value in entries
            if name not in covered and value.dtype in _HALF_DTYPES
        }

    @property
    def sizes(self) -> tuple[int, ...]:
        """Number of entries of each covered parameter."""
        named = dict(self.model.named_parameters())
        return tuple(named[name].numel() for name in self.names)

    @property
    def n_params(self) -> int:
        """P, the number of covered parameter entries."""
        return sum(self.sizes)

    @property
    def device(self) -> torch.device:
        """Device of the parameters."""
        return next(self.model.parameters()).device

    @property
    def dtype(self) -> torch.dtype:
        """Float64 if any covered parameter is, else float32."""
        named = dict(self.model.named_parameters())
        wide = any(named[name].dtype is torch.float64 for name in self.names)
        return torch.float64 if wide else torch.float32

    def prepare(self, inputs: Any) -> Any:
        """Inputs on the model's device, as plain tensors that derivatives can be taken through."""
        return _plain(to_device(inputs, self.device))

    def call(self, parameters: Parameters, constants: Parameters, inputs: Any) -> Tensor:
        """Network outputs at some parameters.

        Raises:
            TypeError: if the model does not return a tensor.
        """
        # Only plain dicts go through vmap; a model may read its batch by attribute.
        inputs = AttributeDict(inputs) if isinstance(inputs, dict) else inputs
        args, kwargs = call_arguments(self.model, inputs)
        outputs = logits_of(call_with(self.model, {**constants, **parameters}, args, kwargs))
        if not isinstance(outputs, Tensor):
            raise TypeError(
                f"the model must return a tensor of outputs; got {type(outputs).__name__}. Wrap it "
                "in a module whose forward returns the logits."
            )
        return outputs

    def outputs(self, inputs: Any, *, differentiable: bool = False) -> Tensor:
        """Outputs [m, C] of a batch, checked to be finite."""
        inputs = self.prepare(inputs)
        with (
            differentiable_kernels(self.model),
            torch.set_grad_enabled(differentiable),
            explained_failure(inputs),
        ):
            outputs = self.call(self.parameters(), self.constants(), inputs)
        check_outputs(outputs, batch_length(inputs))
        return outputs

    def split(self, directions: Tensor) -> Parameters:
        """Columns of ``directions`` [P, k] as one tensor [k, *shape] per parameter."""
        parameters = self.parameters()
        pieces = directions.T.split(self.sizes, dim=1)
        return {
            name: piece.reshape(-1, *value.shape).to(value)
            for (name, value), piece in zip(parameters.items(), pieces, strict=True)
        }


def sample_axes(inputs: Any) -> Any:
    """Which axis of a model's input runs over samples, for ``torch.vmap``."""
    length = batch_length(inputs)
    return _nested(lambda t: 0 if t.ndim and len(t) == length else None, inputs)


def with_batch_axis(sample: Any, axes: Any) -> Any:
    """One sample's input as a batch of one."""
    if isinstance(sample, dict):
        return {key: with_batch_axis(value, axes[key]) for key, value in sample.items()}
    if isinstance(sample, tuple | list):
        return type(sample)(with_batch_axis(v, a) for v, a in zip(sample, axes, strict=True))
    return sample.unsqueeze(0) if axes == 0 else sample


def _nested(function: Callable[[Tensor], Any], inputs: Any) -> Any:
    """``function`` of every tensor in dicts, tuples and lists; None for what is none."""
    if isinstance(inputs, dict):
        return {key: _nested(function, value) for key, value in inputs.items()}
    if isinstance(inputs, tuple | list):
        return type(inputs)(_nested(function, value) for value in inputs)
    return function(inputs) if isinstance(inputs, Tensor) else None


def _widened(value: Tensor) -> Tensor:
    return value.float() if value.dtype in _HALF_DTYPES else value


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _plain(entry) for key, entry in value.items()}
    if isinstance(value, tuple | list):
        return type(value)(_plain(entry) for entry in value)
    if not isinstance(value, Tensor):
        return value
    return _widened(value.clone() if value.is_inference() else value)
