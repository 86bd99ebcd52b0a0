"""A network as a pure function of its covered parameters, left as it was found."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from laplace_debiased.network.inputs import (
    AttributeDict,
    batch_length,
    call_arguments,
    explained_failure,
    logits_of,
    map_tensors,
    plain_containers,
    to_device,
)
from laplace_debiased.network.interrupts import uninterrupted
from laplace_debiased.network.modes import differentiable_kernels
from laplace_debiased.network.outputs import check_outputs, checked_tensor
from laplace_debiased.network.precision import HALF_DTYPES, full_precision
from laplace_debiased.network.substitution import call_with
from laplace_debiased.network.transforms import Parameters, over_samples, vjp, vmap


@dataclass(frozen=True, eq=False)
class FunctionalNetwork:
    """Outputs as a function of the covered parameters, in float32 or better.

    Args:
        model: the network; only ever read, through ``call_with``.
        names: covered parameters; flat vectors [P] hold them in this order.
    """

    model: nn.Module
    names: tuple[str, ...]

    def _covered(self) -> dict[str, Tensor]:
        named = dict(self.model.named_parameters())
        return {name: named[name].detach() for name in self.names}

    def parameters(self) -> Parameters:
        """Current values of the covered parameters, detached."""
        return {name: full_precision(value) for name, value in self._covered().items()}

    def constants(self) -> Parameters:
        """What has to replace the model's other entries: those in half precision."""
        covered = frozenset(self.names)
        return {
            name: value.detach().float()
            for name, value in (*self.model.named_parameters(), *self.model.named_buffers())
            if name not in covered and value.dtype in HALF_DTYPES
        }

    @property
    def sizes(self) -> tuple[int, ...]:
        """Number of entries of each covered parameter."""
        return tuple(value.numel() for value in self._covered().values())

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
        wide = any(value.dtype is torch.float64 for value in self._covered().values())
        return torch.float64 if wide else torch.float32

    def prepare(self, inputs: Any) -> Any:
        """Inputs on the model's device, in plain containers, so that derivatives can be taken."""
        dtype = self.dtype

        def usable(tensor: Tensor) -> Tensor:
            tensor = tensor.clone() if tensor.is_inference() else tensor
            return tensor.to(dtype) if tensor.dtype in HALF_DTYPES else tensor

        return map_tensors(usable, plain_containers(to_device(inputs, self.device)))

    def call(self, parameters: Parameters, constants: Parameters, inputs: Any) -> Tensor:
        """Network outputs in float32 or better, whatever the model casts to; TypeError for none."""
        # Only plain dicts go through vmap; a model may read its batch by attribute.
        inputs = AttributeDict(inputs) if isinstance(inputs, dict) else inputs
        args, kwargs = call_arguments(self.model, inputs)
        outputs = logits_of(call_with(self.model, {**constants, **parameters}, args, kwargs))
        return full_precision(checked_tensor(outputs))

    def function_of(self, inputs: Any) -> Callable[[Parameters], Tensor]:
        """Outputs [m, C] of one prepared batch as a function of the covered parameters alone."""
        constants = self.constants()
        return lambda parameters: self.call(parameters, constants, inputs)

    def outputs(self, inputs: Any, *, differentiable: bool = False) -> Tensor:
        """Outputs [m, C] of a batch, checked to be finite."""
        inputs = self.prepare(inputs)
        with (
            differentiable_kernels(self.model),
            torch.set_grad_enabled(differentiable),
            explained_failure(inputs),
        ):
            outputs = self.function_of(inputs)(self.parameters())
        check_outputs(outputs, batch_length(inputs))
        return outputs

    def rows(self, inputs: Any, columns: Tensor) -> Tensor:
        """Rows J_nᵀ s [n, r, P] for every sample and every column s, in one vectorised call.

        Of prepared inputs of n samples, and cotangents [n, ..., r] of the outputs [n, ...].

        Raises:
            RuntimeError: if torch cannot vectorise the network.
        """
        parameters, constants = self.parameters(), self.constants()

        def of_sample(sample: Any, cotangents: Tensor) -> Parameters:
            pull = vjp(lambda values: self.call(values, constants, sample)[0], parameters)[1]
            if cotangents.shape[-1] == 1:  # some functions (prelu) allow no vmap in a vmap
                return pull(cotangents[..., 0])[0]
            return vmap(lambda column: pull(column)[0], in_dims=-1)(cotangents)

        found = over_samples(of_sample, inputs, columns)
        n, width = columns.shape[0], columns.shape[-1]
        return torch.cat([found[k].reshape(n, width, -1) for k in parameters], -1).to(self.dtype)

    def split(self, directions: Tensor) -> Parameters:
        """Columns of ``directions`` [P, k] as one tensor [k, *shape] per parameter."""
        parameters = self.parameters().items()
        pieces = directions.T.split([value.numel() for _, value in parameters], dim=1)
        return {
            name: piece.reshape(-1, *value.shape).to(value)
            for (name, value), piece in zip(parameters, pieces, strict=True)
        }

    def saved_entries(self, sample: Any) -> tuple[int, int]:
        """Entries that a pass of one sample saves for its backward pass: in all and the largest."""
        parameters = {k: v.requires_grad_(True) for k, v in self.parameters().items()}
        own = {value.data_ptr() for value in [*parameters.values(), *self.model.parameters()]}
        saved: list[int] = [0]

        def pack(tensor: Tensor) -> None:
            if tensor.data_ptr() not in own:
                saved.append(tensor.numel())

        with (
            uninterrupted(),  # torch's hooks on saved tensors would stay
            differentiable_kernels(self.model),
            torch.enable_grad(),
            torch.autograd.graph.saved_tensors_hooks(pack, _refuse),
        ):
            outputs = self.call(parameters, self.constants(), sample)
        return sum(saved), max(*saved, outputs.numel())


def _refuse(packed: None) -> Tensor:
    raise AssertionError("the graph of a size measurement is never walked")
