"""What only a forward pass shows about a layer: unused, or not what its rule assumes."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from laplace_debiased.curvature.coverage import UNUSED
from laplace_debiased.curvature.layers import Layer
from laplace_debiased.curvature.passes import map_calls
from laplace_debiased.curvature.tape import Calls, LayerTape, record
from laplace_debiased.errors import ModelCallError, NumericalError
from laplace_debiased.network.inputs import batch_length, select_rows, to_device
from laplace_debiased.network.outputs import check_outputs, check_repeatable
from laplace_debiased.network.precision import full_precision

MISMATCH = (
    "its gradient is not the sum over positions that its layer type implies: the layer's first "
    "dimension is not the batch, or its parameters are used outside of the layer too"
)
BROADCAST = (
    "it reads one row for the whole batch, and the model needs its output in that very shape"
)
_TOLERANCE = 2e-2
"""Relative, norm-wise. Round-off of float32 stays below 1e-4; a wrong layout is off by order 1."""


def layer_problems(model: nn.Module, layers: tuple[Layer, ...], inputs: Any) -> dict[str, str]:
    """Reasons, by parameter name, why layers cannot be covered after all.

    Two samples go through the network. For each layer, the gradient of the *first* sample's
    outputs in the parameters must equal what the recorded inputs and pull-backs of the first
    sample give. Layers with another dimension in front, weights that are also used elsewhere, and
    layers that mix samples fail this.

    Args:
        model: the network.
        layers: the layers to examine.
        inputs: some model inputs; at most two samples are used.

    Raises:
        ValueError: if the outputs are not [m, C], or differ between two forward passes.
        NumericalError: if one is NaN or infinite.
    """
    device = next(model.parameters()).device
    probe = select_rows(to_device(inputs, device), slice(0, min(2, batch_length(inputs))))
    try:
        tape, fixed = _record(model, layers, probe)
    except ModelCallError:  # perhaps a network that takes one sample at a time; else it shows again
        probe = select_rows(probe, slice(0, 1))
        tape, fixed = _record(model, layers, probe)
    check_outputs(tape.outputs, batch_length(probe), positions=True)
    check_repeatable(tape.outputs, record(model, (), probe).outputs)
    problems: dict[str, str] = {}
    usable = []
    for layer in layers:
        if layer.name in fixed:
            problems |= dict.fromkeys(layer.parameter_names, BROADCAST)
        elif layer.name not in tape.calls:
            problems |= dict.fromkeys(layer.parameter_names, UNUSED)
        else:
            usable.append(layer)
    if usable:
        problems |= _gradient_problems(tape, usable, model)
    return problems


def _record(
    model: nn.Module, layers: tuple[Layer, ...], probe: Any
) -> tuple[LayerTape, frozenset[str]]:
    """A tape, and the layers whose output the model does not take written out over the batch."""
    broadcast: set[str] = set()
    try:
        return record(model, layers, probe, broadcast), frozenset()
    except (RuntimeError, ValueError, AssertionError):
        if not broadcast:
            raise
    fixed = frozenset(broadcast)
    return record(model, [layer for layer in layers if layer.name not in fixed], probe), fixed


def _gradient_problems(tape: LayerTape, layers: list[Layer], model: nn.Module) -> dict[str, str]:
    outputs = tape.outputs
    generator = torch.Generator().manual_seed(0)
    cotangent = torch.randn(outputs.shape, generator=generator, dtype=torch.float64)
    cotangent = cotangent.to(outputs.device, outputs.dtype)
    pulled = tape.pull_back(cotangent)
    parameters = dict(model.named_parameters())
    names = [name for layer in layers for name in layer.parameter_names]
    first = torch.zeros_like(cotangent)
    first[0] = cotangent[0]
    gradients = torch.autograd.grad(
        outputs, [parameters[name] for name in names], grad_outputs=first, allow_unused=True
    )
    expected: dict[str, Tensor | None] = dict(zip(names, gradients, strict=True))
    problems: dict[str, str] = {}
    for layer in layers:
        if layer.name not in pulled:
            problems |= dict.fromkeys(layer.parameter_names, UNUSED)
        elif not _matches(tape, layer, pulled[layer.name], expected):
            problems |= dict.fromkeys(layer.parameter_names, MISMATCH)
    return problems


def _matches(
    tape: LayerTape, layer: Layer, cotangents: Calls, expected: dict[str, Tensor | None]
) -> bool:
    m = len(tape.outputs)
    inputs = tape.inputs_of(layer.name)
    tensors = [tensor for calls in (inputs, cotangents) for call in calls for tensor in call]
    _require_finite(layer.name, tensors)
    if any(tensor.ndim == 0 or len(tensor) != m for tensor in tensors):
        return False
    try:
        rows = layer.rows_of_calls(
            map_calls(lambda a: full_precision(a.detach()[:1]), inputs),
            map_calls(lambda g: full_precision(g[:1].unsqueeze(1)), cotangents),
        )
    except ValueError:
        return False
    return all(
        _close(block.gradients(), expected[layer.parameter_of(part)])
        for part, block in rows.blocks()
    )


def _require_finite(name: str, tensors: Iterable[Tensor]) -> None:
    """Check a layer before its gradients are compared: NaN is no sign of another layout.

    Raises:
        NumericalError: naming the layer.
    """
    if not all(bool(torch.isfinite(tensor.detach()).all()) for tensor in tensors):
        raise NumericalError(
            f"an input or gradient of layer {name!r} is NaN or infinite, although the outputs are "
            "not. Check the training data for NaN and infinite values."
        )


def _close(actual: Tensor, expected: Tensor | None) -> bool:
    if expected is None:
        return False
    expected = expected.to_dense() if expected.is_sparse else expected
    actual, expected = actual.flatten().float(), expected.flatten().float()
    if actual.numel() != expected.numel():
        return False
    scale = torch.maximum(actual.norm(), expected.norm())
    return bool((actual - expected).norm() <= _TOLERANCE * scale)
