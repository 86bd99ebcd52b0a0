"""What only a forward pass shows about a parameter: unused, or read in ways that no rule knows."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from laplace_debiased.curvature.coverage import UNUSED, Coverage
from laplace_debiased.curvature.general import general_rows
from laplace_debiased.curvature.operations.call import (
    Cotangents,
    OperationCall,
    parameter_rows,
    uses_of,
)
from laplace_debiased.curvature.recorder import record
from laplace_debiased.curvature.rows.parameters import MAX_DENSE_VECTOR
from laplace_debiased.curvature.tape import Tape
from laplace_debiased.errors import ModelCallError, NumericalError
from laplace_debiased.network.inputs import (
    batch_length,
    map_tensors,
    select_rows,
    to_device,
)
from laplace_debiased.network.memory import is_out_of_memory
from laplace_debiased.network.outputs import check_outputs, check_repeatable
from laplace_debiased.network.precision import full_precision

MISMATCH = (
    "its gradient is not the sum over positions that its operations imply: their first dimension "
    "is not the batch, or they mix samples"
)
_TOLERANCE = 2e-2
"""Relative, norm-wise. Round-off of float32 stays below 1e-4; a wrong layout is off by order 1."""

_SAMPLES_IN_REVERSE = 4
"""Of which equal keys, that no sorting moves, are rarely all; a forward pass of more costs more."""

_NOISE = 1e-6
"""Of the largest gradient: a bias of keys, say, has no gradient but what round-off leaves."""


def inspected(model: nn.Module, coverage: Coverage, inputs: Any) -> Coverage:
    """What is left of a coverage after a look at what the network does with its parameters.

    Two samples go through the network. For each parameter, the gradient of the *first* sample's
    outputs must equal what the recorded inputs and pull-backs of the first sample give. Operations
    with another dimension in front, and networks that mix samples, fail this. Small parameters
    whose operations have no rule go through ``torch.func`` where the network allows that.

    Raises:
        ValueError: if the outputs are not [m, C], or differ between two forward passes.
        NumericalError: if one is NaN or infinite.
    """
    inputs, names = to_device(inputs, next(model.parameters()).device), coverage.covered
    probe = select_rows(inputs, slice(0, min(2, batch_length(inputs))))
    try:
        tape = record(model, names, probe)
    except ModelCallError:  # perhaps a network that takes one sample at a time; else it shows again
        probe = select_rows(probe, slice(0, 1))
        tape = record(model, names, probe)
    check_outputs(tape.outputs, batch_length(probe), positions=True)
    check_repeatable(tape.outputs, record(model, (), probe).outputs)
    seen = uses_of(tape.calls)
    problems = {name: UNUSED for name in names if name not in seen and name not in tape.refused}
    for name, why in list(tape.refused.items()):
        large = tape.parameters[name].numel() > MAX_DENSE_VECTOR
        if large or name in tape.depends_on_batch:  # else one for the general rule
            problems[name] = f"it goes through {why}"
            del tape.refused[name]
    problems |= _gradient_problems(model, tape, probe)
    general, outputs = frozenset(tape.refused), tape.outputs.detach()
    del tape  # and its graph
    problems |= _sorted_samples(model, names, inputs, outputs)
    return replace(coverage.without(problems), general=general - problems.keys())


def _gradient_problems(model: nn.Module, tape: Tape, probe: Any) -> dict[str, str]:
    tape.check_inputs()
    _require_finite(tape)
    outputs = tape.outputs
    generator = torch.Generator().manual_seed(0)
    cotangent = torch.randn(outputs.shape, generator=generator, dtype=torch.float64)
    cotangent = cotangent.to(outputs.device, outputs.dtype)
    calls, pulled = list(tape.calls), tape.pull_back(cotangent)
    problems = {}
    if tape.refused:
        try:
            further, pull_back = general_rows(model, tape, tape.refused, probe)
            pulled += pull_back(cotangent)
            calls += further
        except (RuntimeError, ValueError, TypeError, NotImplementedError) as error:
            if is_out_of_memory(error):
                raise
            problems = {
                name: f"it goes through {why}, and torch.func cannot vectorise the network"
                for name, why in tape.refused.items()
            }
    uses = uses_of(calls)
    first = torch.cat([cotangent[:1], torch.zeros_like(cotangent[1:])])
    # Of the first sample's outputs by automatic differentiation.
    leaves = [tape.parameters[name] for name in uses]
    expected: tuple[Tensor | None, ...] = (None,) * len(leaves)
    if leaves and outputs.requires_grad:
        expected = torch.autograd.grad(outputs, leaves, first, allow_unused=True)
    noise = _NOISE * max((float(g.norm()) for g in expected if g is not None), default=0.0)
    calls = [call.with_inputs(lambda a: full_precision(a.detach()[:1])) for call in calls]
    columns: list[Cotangents] = [
        None if found is None else tuple(full_precision(g[:1]).unsqueeze(1) for g in found)
        for found in pulled
    ]
    for (name, places), gradient in zip(uses.items(), expected, strict=True):
        if all(columns[index] is None for index, _ in places):
            problems[name] = UNUSED
        elif not _matches(calls, places, columns, gradient, noise):
            why = tape.refused.get(name)
            problems[name] = MISMATCH if why is None else f"it goes through {why}"
    return problems


def _sorted_samples(
    model: nn.Module, names: Sequence[str], inputs: Any, outputs: Tensor
) -> dict[str, str]:
    """Parameters of operations that have the samples in another order than the network.

    A network that sorts its batch by length changes an order that is not sorted already: a few
    samples are looked at from the last to the first. Cotangents that are scaled sample by sample
    must come back scaled in the same way. ``outputs`` are those of the first two.
    """
    length = min(_SAMPLES_IN_REVERSE, batch_length(inputs))
    if length < 2 or len(outputs) < 2:
        return {}
    part = select_rows(inputs, slice(0, length))
    turned = map_tensors(lambda t: t.flip(0) if t.ndim and len(t) == length else t, part)
    try:
        tape = record(model, names, turned)
    except (ModelCallError, AssertionError):  # it takes sorted batches only, and sorts none
        return {}
    if tape.unclear or not _close(tape.outputs.flip(0)[:2].detach(), outputs, 0.0):
        return {}  # samples of a larger batch mix, of which the fit says more when it sees it
    scales = 0.5 ** torch.arange(length).to(tape.outputs)  # powers of two round nothing
    column = torch.linspace(1.0, 2.0, tape.outputs.shape[-1]).to(scales).expand_as(tape.outputs)
    plain = _norms(tape.pull_back(column))
    weighted = column * scales.reshape(-1, *[1] * (column.ndim - 1))
    scaled = _norms(tape.pull_back(weighted, retain_graph=False))
    noise = _NOISE * max((float(g.norm()) for found in scaled for g in found), default=0.0)
    return {
        use.name: MISMATCH
        for call, one, other in zip(tape.calls, plain, scaled, strict=True)
        for use in call.uses.values()
        if not all(_close(a * scales, b, noise) for a, b in zip(one, other, strict=True))
    }


def _norms(pulled: Sequence[Cotangents]) -> list[list[Tensor]]:
    """By call the norms [m] of cotangents [m, ...]; none where it does not affect the outputs."""
    return [
        [full_precision(g).unsqueeze(-1).flatten(1).norm(dim=1) for g in found or ()]
        for found in pulled
    ]


def _matches(
    calls: Sequence[OperationCall],
    places: Sequence[tuple[int, str]],
    columns: Sequence[Cotangents],
    expected: Tensor | None,
    noise: float,
) -> bool:
    try:
        rows = parameter_rows(calls, places, columns)
        return rows is not None and _close(rows.gradients(), expected, noise)
    except (ValueError, TypeError):
        return False


def _require_finite(tape: Tape) -> None:
    """Check what is read before gradients are compared: NaN is no sign of another layout.

    Raises:
        NumericalError: naming the parameter.
    """
    for call in tape.calls:
        if call.uses and not all(bool(torch.isfinite(a.detach()).all()) for a in call.inputs):
            name = next(iter(call.uses.values())).name
            raise NumericalError(
                f"an input of an operation with {name!r} is NaN or infinite, although the outputs "
                "are not. Check the training data for NaN and infinite values."
            )


def _close(actual: Tensor, expected: Tensor | None, noise: float) -> bool:
    if expected is None:
        return False
    expected = expected.to_dense() if expected.is_sparse else expected
    actual, expected = actual.flatten().float(), expected.flatten().float()
    if actual.numel() != expected.numel():
        return False
    scale = torch.maximum(actual.norm(), expected.norm())
    return bool((actual - expected).norm() <= _TOLERANCE * scale + noise)
