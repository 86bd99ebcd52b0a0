"""What one forward pass leaves behind: calls on covered parameters, and pull-backs to them."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge, get_gradient_edge

from laplace_debiased.curvature.operations.call import (
    Cotangents,
    OperationCall,
    plain_call,
    samples_first,
)
from laplace_debiased.curvature.rows.parameters import MAX_DENSE_VECTOR
from laplace_debiased.network.inputs import version_of


@dataclass(frozen=True, eq=False)
class DirectCall:
    """A call that read samples: what it wrote has them in front.

    Attributes:
        call: the call.
        versions: version counters of its inputs when it read them.
        edges: graph edges of what it wrote. An edge and not the tensor: a following in-place
            activation would otherwise redirect the gradient.
        shapes: shapes of what it wrote, with the samples in front [m, ...].
        copies: of the batch, one after the other, that it computed with.
    """

    call: OperationCall
    versions: tuple[int, ...]
    edges: tuple[GradientEdge, ...]
    shapes: tuple[torch.Size, ...]
    copies: int = 1


@dataclass(frozen=True, eq=False)
class SharedCall:
    """A call that all samples share, such as one that reads positions and no data.

    Attributes:
        call: the call, its inputs once for every sample.
        output: what it wrote, or the parameter itself.
        edge: its graph edge, as it was written; the tensor may be overwritten later.
        version: its version counter then.
    """

    call: OperationCall
    output: Tensor
    edge: GradientEdge
    version: int

    @classmethod
    def of(cls, call: OperationCall, output: Tensor) -> SharedCall:
        """Of a call that has just written its output."""
        return cls(call, output, get_gradient_edge(output), output._version)

    def is_all_of(self, base: Tensor) -> bool:
        """Whether a tensor is the output in another shape, and nothing else."""
        output = self.output
        return (
            base.numel() == output.numel()
            and base.data_ptr() == output.data_ptr()
            and base.is_contiguous()
            and output.is_contiguous()
            and output._version == self.version
        )


@dataclass(frozen=True, eq=False)
class Meeting:
    """Where something that all samples share meets the samples, a copy for each of them.

    Attributes:
        edge: graph edge of the copies.
        base: what was copied.
        calls: which shared calls it depends on.
    """

    edge: GradientEdge
    base: Tensor
    calls: tuple[int, ...]


@dataclass(eq=False)
class Tape:
    """What one forward pass left behind.

    Attributes:
        length: m, the number of samples.
        copies: of the batch, one after the other, that the network computes with at present.
        unclear: whether it flattened what has as many parts as samples, in either order.
        outputs: network outputs [m, C], attached to the graph.
        parameters: the covered parameters as leaves of this graph, by name.
        direct: calls that read samples.
        shared: calls that all samples share.
        meetings: where those meet samples.
        refused: why an operation on a parameter cannot be recorded, by parameter name.
        depends_on_batch: those of them whose gradients are no sample's own.
    """

    length: int
    copies: int = 1
    unclear: bool = False
    outputs: Tensor = field(default_factory=lambda: torch.empty(0))
    parameters: dict[str, Tensor] = field(default_factory=dict)
    direct: list[DirectCall] = field(default_factory=list)
    shared: list[SharedCall] = field(default_factory=list)
    meetings: list[Meeting] = field(default_factory=list)
    refused: dict[str, str] = field(default_factory=dict)
    depends_on_batch: set[str] = field(default_factory=set)
    _itself: dict[str, int] = field(default_factory=dict, repr=False)

    def parameter_itself(self, name: str) -> int:
        """Place among the shared calls of a parameter as it is; noted when it first meets them."""
        if name not in self._itself:
            leaf = self.parameters[name]
            self._itself[name] = len(self.shared)
            self.shared.append(SharedCall.of(plain_call(name, leaf), leaf))
        return self._itself[name]

    def keep(self, call: OperationCall, *outputs: Tensor) -> None:
        """Record a call that read samples, and what it wrote."""
        m = self.length
        shapes = [
            torch.Size((m, len(o) // m, *o.shape[1:])) if call.folded else o.shape for o in outputs
        ]
        versions, edges = (
            tuple(map(version_of, call.inputs)),
            tuple(map(get_gradient_edge, outputs)),
        )
        self.direct.append(DirectCall(call, versions, edges, tuple(shapes), self.copies))

    @property
    def calls(self) -> tuple[OperationCall, ...]:
        """All calls, in the order of :meth:`pull_back`."""
        return (*(kept.call for kept in self.direct), *(kept.call for kept in self.shared))

    @property
    def shapes(self) -> tuple[tuple[torch.Size, ...], ...]:
        """Shapes [m, ...] of the cotangents of every call."""
        shared = [torch.Size((self.length, *kept.output.shape)) for kept in self.shared]
        return (*(kept.shapes for kept in self.direct), *((shape,) for shape in shared))

    def check_inputs(self) -> None:
        """Check that what was read is still there.

        Raises:
            RuntimeError: if the model has overwritten an input since, in place.
        """
        for kept in self.direct:
            for read, version in zip(kept.call.inputs, kept.versions, strict=True):
                if version_of(read) != version:
                    names = ", ".join(repr(use.name) for use in kept.call.uses.values())
                    raise RuntimeError(
                        f"an input of {kept.call.operation} with {names} was modified in place "
                        "after it had been read; its curvature cannot be recovered. Make the "
                        "operation that follows out-of-place."
                    )

    def close(self, general: Collection[str] = ()) -> None:
        """Drop what never meets a sample, what is not recorded whole, and ``general`` parameters.

        The gradient of a parameter must be there in full or not at all.
        """
        met = {index for meeting in self.meetings for index in meeting.calls}
        self.shared = [
            kept if index in met else replace(kept, call=replace(kept.call, uses={}))
            for index, kept in enumerate(self.shared)
        ]
        shapes: dict[str, set[tuple[int, ...]]] = {}
        for use in (use for call in self.calls for use in call.uses.values()):
            shapes.setdefault(use.name, set()).add(use.place.shape)
        for name, found in shapes.items():
            if len(found) > 1 and self.parameters[name].numel() > MAX_DENSE_VECTOR:
                self.refused.setdefault(name, "is read in different shapes by several operations")
        dropped = {*self.refused, *general}
        if dropped:
            direct = [replace(kept, call=_without(kept.call, dropped)) for kept in self.direct]
            self.direct = [kept for kept in direct if kept.call.uses]
            self.shared = [replace(kept, call=_without(kept.call, dropped)) for kept in self.shared]

    def pull_back(
        self, cotangents: Tensor, *, create_graph: bool = False, retain_graph: bool = True
    ) -> list[Cotangents]:
        """Gradients of Σ_n ⟨cotangents_n, f_n⟩ in what every call wrote, sample by sample.

        Args:
            cotangents: one vector per sample [m, C].
            create_graph: whether the result is itself differentiable.
            retain_graph: whether another pull-back follows.
        """
        edges = [edge for kept in self.direct for edge in kept.edges]
        edges += [meeting.edge for meeting in self.meetings]
        if not edges or not self.outputs.requires_grad:
            return [None] * (len(self.direct) + len(self.shared))
        found = iter(
            torch.autograd.grad(
                self.outputs,
                edges,
                grad_outputs=cotangents,
                retain_graph=retain_graph or create_graph,
                create_graph=create_graph,
                allow_unused=True,
            )
        )
        direct: list[Cotangents] = []
        for kept in self.direct:
            gradients = [next(found) for _ in kept.edges]
            known = any(gradient is not None for gradient in gradients)
            direct.append(
                tuple(
                    cotangents.new_zeros(shape)
                    if gradient is None
                    else _samples_first(gradient, shape, kept.copies)
                    for gradient, shape in zip(gradients, kept.shapes, strict=True)
                )
                if known
                else None
            )
        return [*direct, *self._pull_back_shared(list(found), create_graph)]

    def _pull_back_shared(
        self, gradients: list[Tensor | None], create_graph: bool
    ) -> list[Cotangents]:
        totals: list[Tensor | None] = [None] * len(self.shared)
        for meeting, gradient in zip(self.meetings, gradients, strict=True):
            if gradient is None:
                continue
            copies = gradient.reshape(self.length, *meeting.base.shape)
            shared = [self.shared[index] for index in meeting.calls]
            parts = _vector_products(meeting.base, shared, copies, create_graph)
            for index, part in zip(meeting.calls, parts, strict=True):
                if part is not None:
                    before = totals[index]
                    totals[index] = part if before is None else before + part
        return [None if total is None else (total,) for total in totals]


def _samples_first(gradient: Tensor, shape: torch.Size, copies: int) -> Tensor:
    m = shape[0]
    return (gradient if len(gradient) == m else samples_first(gradient, m, copies)).reshape(shape)


def _without(call: OperationCall, names: Collection[str]) -> OperationCall:
    uses = {slot: use for slot, use in call.uses.items() if use.name not in names}
    return call if len(uses) == len(call.uses) else replace(call, uses=uses)


def _vector_products(
    base: Tensor, shared: list[SharedCall], cotangents: Tensor, create_graph: bool
) -> list[Tensor | None]:
    """Per sample, cotangentᵀ ∂base/∂output [m, *output] of every output that base is made of."""
    if len(shared) == 1 and shared[0].is_all_of(base):
        return [cotangents.reshape(len(cotangents), *shared[0].output.shape)]
    return list(
        torch.autograd.grad(
            base,
            [kept.edge for kept in shared],
            grad_outputs=cotangents,
            is_grads_batched=True,
            retain_graph=True,
            create_graph=create_graph,
            allow_unused=True,
        )
    )
