"""One forward pass with the covered layers' inputs recorded, and pull-backs to their outputs."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge, get_gradient_edge

from laplace_debiased.curvature.guards import evaluation_mode, requiring_grad
from laplace_debiased.curvature.layers import Layer
from laplace_debiased.data.inputs import invoke, plain_tensors


@dataclass(eq=False)
class LayerTape:
    """What one forward pass left behind.

    Attributes:
        outputs: network outputs [m, C], attached to the graph.
        inputs: input of every recorded layer, by layer name.
        edges: graph edge of every recorded layer's output, by layer name. An edge and not the
            tensor: a following in-place activation would otherwise redirect the gradient.
        calls: number of calls of each layer.
    """

    outputs: Tensor
    inputs: dict[str, Tensor] = field(default_factory=dict)
    edges: dict[str, GradientEdge] = field(default_factory=dict)
    calls: dict[str, int] = field(default_factory=dict)
    _versions: dict[str, int] = field(default_factory=dict)

    def input_of(self, layer: str) -> Tensor:
        """The recorded input of a layer.

        Raises:
            RuntimeError: if the model has overwritten it since, in place.
        """
        inputs = self.inputs[layer]
        if not inputs.is_inference() and inputs._version != self._versions[layer]:
            raise RuntimeError(
                f"the input of layer {layer!r} was modified in place after the layer had read it; "
                "its curvature cannot be recovered. Make the operation that follows out-of-place."
            )
        return inputs

    def pull_back(
        self, cotangents: Tensor, *, create_graph: bool = False, retain_graph: bool = True
    ) -> dict[str, Tensor]:
        """Gradients of Σ_n ⟨cotangents_n, f_n⟩ in every recorded layer's output.

        Args:
            cotangents: one vector per sample [m, C].
            create_graph: whether the result is itself differentiable.
            retain_graph: whether another pull-back follows.

        Returns:
            By layer name; layers that do not affect the outputs are missing.
        """
        names = list(self.edges)
        gradients = torch.autograd.grad(
            self.outputs,
            [self.edges[name] for name in names],
            grad_outputs=cotangents,
            retain_graph=retain_graph or create_graph,
            create_graph=create_graph,
            allow_unused=True,
        )
        return {name: grad for name, grad in zip(names, gradients, strict=True) if grad is not None}


@contextmanager
def _recording(layers: Iterable[Layer], tape: LayerTape) -> Iterator[None]:
    """Forward hooks on the covered layers; removed on the way out."""

    def recorder(name: str) -> Callable[..., None]:
        def record(module: nn.Module, args: tuple, kwargs: dict, output: Tensor) -> None:
            tape.calls[name] = tape.calls.get(name, 0) + 1
            inputs = args[0] if args else kwargs["input"]
            tape.inputs[name] = inputs
            tape._versions[name] = 0 if inputs.is_inference() else inputs._version
            if output.requires_grad:
                tape.edges[name] = get_gradient_edge(output)

        return record

    handles = []
    try:
        for layer in layers:
            hook = recorder(layer.name)
            handles.append(layer.module.register_forward_hook(hook, with_kwargs=True))
        yield
    finally:
        for handle in handles:
            handle.remove()


def record(model: nn.Module, layers: Iterable[Layer], inputs: Any) -> LayerTape:
    """Run the model on a batch in evaluation mode with gradients on, and record ``layers``.

    Raises:
        TypeError: if the model does not return a tensor.
    """
    tape, layers = LayerTape(outputs=torch.empty(0)), tuple(layers)
    recorded = [p for layer in layers for p in layer.module.parameters()]
    with (
        torch.inference_mode(False),
        torch.enable_grad(),
        evaluation_mode(model),
        requiring_grad(recorded),
    ):
        inputs = plain_tensors(inputs)
        with _recording(layers, tape):
            outputs = invoke(model, inputs)
    if not isinstance(outputs, Tensor):
        raise TypeError(
            f"the model must return a tensor of outputs; got {type(outputs).__name__}. Wrap it in "
            "a module whose forward returns the logits."
        )
    tape.outputs = outputs
    return tape
