"""One forward pass with the covered layers' inputs recorded, and pull-backs to their outputs."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge, get_gradient_edge

from laplace_debiased.curvature.layers import Layer
from laplace_debiased.curvature.rules.attention import ProjectionsApart, attention_layers
from laplace_debiased.network.inputs import batch_length, invoke, plain_tensors
from laplace_debiased.network.interrupts import unbroken
from laplace_debiased.network.modes import evaluation_mode, requiring_grad

Calls = tuple[tuple[Tensor, ...], ...]
"""Per call of a layer its tensors: one, or one per projection of an attention layer."""


@dataclass(frozen=True, eq=False)
class RecordedCall:
    """One call of a layer.

    Attributes:
        inputs: what it read.
        versions: their version counters at that moment.
        edges: graph edges of what it wrote. An edge and not the tensor: a following in-place
            activation would otherwise redirect the gradient.
        shapes: shapes of what it wrote.
    """

    inputs: tuple[Tensor, ...]
    versions: tuple[int, ...]
    edges: tuple[GradientEdge, ...]
    shapes: tuple[torch.Size, ...]


@dataclass(eq=False)
class LayerTape:
    """What one forward pass left behind.

    Attributes:
        outputs: network outputs [m, C], attached to the graph.
        calls: calls of every recorded layer whose outputs have a graph, by layer name.
    """

    outputs: Tensor
    calls: dict[str, list[RecordedCall]] = field(default_factory=dict)

    def inputs_of(self, layer: str) -> Calls:
        """The recorded inputs of a layer.

        Raises:
            RuntimeError: if the model has overwritten one since, in place.
        """
        for call in self.calls[layer]:
            for inputs, version in zip(call.inputs, call.versions, strict=True):
                if _version(inputs) != version:
                    raise RuntimeError(
                        f"the input of layer {layer!r} was modified in place after the layer had "
                        "read it; its curvature cannot be recovered. Make the operation that "
                        "follows out-of-place."
                    )
        return tuple(call.inputs for call in self.calls[layer])

    def keep(self, name: str, inputs: tuple[Tensor, ...], outputs: tuple[Tensor, ...]) -> None:
        """Record a call, if gradients reach its outputs."""
        if not all(output.requires_grad for output in outputs):
            return
        call = RecordedCall(
            inputs,
            tuple(_version(tensor) for tensor in inputs),
            tuple(get_gradient_edge(output) for output in outputs),
            tuple(output.shape for output in outputs),
        )
        self.calls.setdefault(name, []).append(call)

    def pull_back(
        self, cotangents: Tensor, *, create_graph: bool = False, retain_graph: bool = True
    ) -> dict[str, Calls]:
        """Gradients of Σ_n ⟨cotangents_n, f_n⟩ in every recorded layer's outputs.

        Args:
            cotangents: one vector per sample [m, C].
            create_graph: whether the result is itself differentiable.
            retain_graph: whether another pull-back follows.

        Returns:
            By layer name and call, zero where a call does not affect the outputs; layers that do
            not affect them at all are missing.
        """
        edges = [edge for calls in self.calls.values() for call in calls for edge in call.edges]
        gradients = iter(
            torch.autograd.grad(
                self.outputs,
                edges,
                grad_outputs=cotangents,
                retain_graph=retain_graph or create_graph,
                create_graph=create_graph,
                allow_unused=True,
            )
        )
        pulled = {}
        for name, calls in self.calls.items():
            found = [[next(gradients) for _ in call.edges] for call in calls]
            if any(gradient is not None for call in found for gradient in call):
                pulled[name] = tuple(
                    tuple(
                        cotangents.new_zeros(shape) if gradient is None else gradient
                        for gradient, shape in zip(each, call.shapes, strict=True)
                    )
                    for each, call in zip(found, calls, strict=True)
                )
        return pulled


def _version(tensor: Tensor) -> int:
    return 0 if tensor.is_inference() else tensor._version


@unbroken
def _recording(
    model: nn.Module,
    layers: tuple[Layer, ...],
    tape: LayerTape,
    length: int,
    broadcast: set[str],
) -> Iterator[None]:
    """Forward hooks on the covered layers, removed on the way out; attention projected apart."""

    def recorder(name: str) -> Callable[..., Tensor | None]:
        def record(module: nn.Module, args: tuple, kwargs: dict, output: Any) -> Tensor | None:
            if not isinstance(output, Tensor):  # attention; its projections are recorded apart
                return None
            inputs = args[0] if args else kwargs["input"]
            written = None
            if length > 1 and inputs.ndim > 1 and len(inputs) == 1 == len(output):
                inputs = inputs.expand(length, *inputs.shape[1:])
                output = written = output.expand(length, *output.shape[1:])
                broadcast.add(name)
            tape.keep(name, (inputs,), (output,))
            return written

        return record

    with ExitStack() as stack:
        for layer in layers:
            hook = recorder(layer.name)
            handle = layer.module.register_forward_hook(hook, with_kwargs=True)
            stack.callback(handle.remove)
        owners = attention_layers(model, [layer.name for layer in layers])
        if owners:
            wanted = frozenset(layer.name for layer in layers)

            def keep(name: str, inputs: tuple[Tensor, ...], outputs: tuple[Tensor, ...]) -> None:
                if name in wanted:
                    tape.keep(name, inputs, outputs)

            stack.enter_context(ProjectionsApart(owners, keep))
        yield


def record(
    model: nn.Module, layers: Iterable[Layer], inputs: Any, broadcast: set[str] | None = None
) -> LayerTape:
    """Run the model on a batch in evaluation mode with gradients on, and record ``layers``.

    A layer that reads one row for the whole batch, as position embeddings do, would give one
    gradient for all samples. Its output is written out over the batch, so that each has its own.

    Args:
        model: the network.
        layers: its covered layers.
        inputs: one batch of model inputs.
        broadcast: names of the layers that were written out are added to it, also when the model
            raises afterwards.

    Raises:
        TypeError: if the model does not return a tensor.
    """
    tape, layers = LayerTape(outputs=torch.empty(0)), tuple(layers)
    length = batch_length(inputs) if layers else 0
    with (
        torch.inference_mode(False),
        torch.enable_grad(),
        evaluation_mode(model),
        # Read under the lock: another thread may be running a sampled network.
        requiring_grad(p for layer in layers for p in layer.module.parameters()),
    ):
        inputs = plain_tensors(inputs)
        with _recording(model, layers, tape, length, set() if broadcast is None else broadcast):
            outputs = invoke(model, inputs)
    if not isinstance(outputs, Tensor):
        raise TypeError(
            f"the model must return a tensor of outputs; got {type(outputs).__name__}. Wrap it in "
            "a module whose forward returns the logits."
        )
    tape.outputs = outputs
    return tape
