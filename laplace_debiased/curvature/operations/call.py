r"""One call of an operation on a parameter, and what a rule says about it.

A *rule* says what one call contributes to the curvature of the parameters among its arguments: it
turns what the operation read, and the columns pulled back to what it wrote, into rows (see
:mod:`laplace_debiased.curvature.rows`). Everything after it (factors, magnitudes, predictions)
knows rows only, no operations.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import Any

from torch import Tensor

from laplace_debiased.curvature.operations.views import Place
from laplace_debiased.curvature.rows.base import BlockRows
from laplace_debiased.curvature.rows.gram import Factor
from laplace_debiased.curvature.rows.parameters import VectorRows, joined_rows

Cotangents = tuple[Tensor, ...] | None
"""Gradients in what a call wrote [m, ...], or R of them [m, R, ...]; None where it does not affect
the outputs."""


@dataclass(frozen=True, eq=False)
class Use:
    """A parameter as an argument of a call.

    Attributes:
        name: qualified name of the parameter.
        place: where the argument lies in the parameter.
    """

    name: str
    place: Place


@dataclass(frozen=True, eq=False)
class Reading:
    """A way in which the arguments of a call can be read.

    Attributes:
        parameters: by slot (a name of the rule's own), arguments that may be parameters; None
            where one is left out.
        inputs: what else is read: tensors with the samples in front.
        settings: what the rule wants to remember, such as strides.
        refused: why the gradients of such a call are no sample's own, or None.
        whole: whether an argument must be all of its parameter, and no part of it.
    """

    parameters: Mapping[str, Tensor | None]
    inputs: tuple[Tensor, ...]
    settings: Any = None
    refused: str | None = None
    whole: bool = False


class RuleDefaults(ABC):
    """How one operation reads its parameters.

    Unless overridden: a weight that is a matrix in row-major order, a bias, no factors.
    """

    transposed = False
    """Whether what is read acts on the rows of the weight as a matrix, not on its columns."""

    @abstractmethod
    def readings(self, *args: Any, **kwargs: Any) -> tuple[Reading, ...]:
        """The ways in which a call with these arguments can be read, in the rule's own terms.

        The first one counts in which an argument in a slot is a parameter.
        """

    def matrix(self, slot: str, argument: Tensor, settings: Any) -> Tensor | None:
        """A view of an argument as the matrix [D_out, D_in] that it is; None for a vector."""
        return argument.flatten(1) if slot == "weight" and argument.ndim > 1 else None

    @abstractmethod
    def rows(self, call: OperationCall, slot: str, columns: tuple[Tensor, ...]) -> BlockRows:
        """Rows of the argument in a slot.

        Args:
            call: the call, of m samples.
            slot: which argument.
            columns: R columns at the outputs, [m, R, *output shape] each.

        Raises:
            ValueError: if the tensors are not of the shape that the operation documents with the
                batch in front; at the latest when what the rows are made of is asked for.
        """

    def input_factor(
        self, call: OperationCall, slot: str, counts: Tensor | None = None
    ) -> Factor | None:
        """Kronecker factor of the inputs, summed over samples; None where there is none.

        Args:
            call: the call, of m samples.
            slot: which argument.
            counts: multiplicity of every sample [m]; None for ones.
        """
        return None


@dataclass(frozen=True, eq=False)
class OperationCall:
    """One call of an operation for m samples.

    Attributes:
        operation: its name, for messages.
        rule: how it reads its parameters.
        uses: the covered parameters among its arguments, by slot.
        inputs: what it read [m, ...]; with ``folded`` [m, k, ...].
        settings: of its rule.
        folded: whether several consecutive entries of the operation's batch dimension belong to
            one sample, as windows of an image do.
    """

    operation: str
    rule: RuleDefaults
    uses: Mapping[str, Use]
    inputs: tuple[Tensor, ...]
    settings: Any = None
    folded: bool = False

    def rows(self, slot: str, columns: tuple[Tensor, ...]) -> BlockRows:
        """Rows of the *parameter* in a slot, zero where the argument is a part of it."""
        return self.uses[slot].place.embedded(self.rule.rows(self, slot, columns))

    def input_factor(self, slot: str, counts: Tensor | None = None) -> Factor | None:
        """Factor of the inputs, of the side of the parameter that they act on."""
        factor = self.rule.input_factor(self, slot, counts)
        return None if factor is None else self.uses[slot].place.embedded_factor(factor)

    def inputs_act_on_rows(self, slot: str) -> bool:
        """Whether the factor of the inputs is of the parameter's rows as a matrix."""
        return self.rule.transposed != self.uses[slot].place.transposed

    def with_inputs(self, function: Callable[[Tensor], Tensor]) -> OperationCall:
        """The same with a function of every input."""
        return replace(self, inputs=tuple(function(tensor) for tensor in self.inputs))

    def flat(self, tensor: Tensor) -> Tensor:
        """A tensor [m, (k,) ...] with k merged into the samples."""
        return tensor.flatten(0, 1) if self.folded else tensor


class PlainRule(RuleDefaults):
    """What is "read" is the parameter itself, and the columns are its gradients.

    So for a parameter that is added, multiplied or otherwise broadcast over the batch: each sample
    is given a copy of its own, and the gradient in that copy is the sample's.
    """

    def readings(self, *args: Any, **kwargs: Any) -> tuple[Reading, ...]:
        return ()

    def rows(self, call: OperationCall, slot: str, columns: tuple[Tensor, ...]) -> BlockRows:
        """Columns [m, R, *shape of the parameter]."""
        return VectorRows(columns[0].reshape(*columns[0].shape[:2], -1))


def plain_call(name: str, parameter: Tensor) -> OperationCall:
    """The call that "reads" a parameter as it is, whatever becomes of it."""
    whole = Place((parameter.numel(),), (0,), (parameter.numel(),))
    return OperationCall("the parameter itself", PlainRule(), {"weight": Use(name, whole)}, ())


Uses = dict[str, list[tuple[int, str]]]
"""By parameter name, which calls read it, and in which slot."""


def uses_of(calls: Sequence[OperationCall]) -> Uses:
    """Which calls read which parameter, in the order of the calls."""
    found: Uses = {}
    for index, call in enumerate(calls):
        for slot, use in call.uses.items():
            found.setdefault(use.name, []).append((index, slot))
    return found


def parameter_rows(
    calls: Sequence[OperationCall],
    places: Sequence[tuple[int, str]],
    columns: Sequence[Cotangents],
) -> BlockRows | None:
    """Rows of one parameter from all calls that read it; None if none affects the outputs.

    Args:
        calls: what was recorded.
        places: which of them read the parameter, and in which slot: of :func:`uses_of`.
        columns: by call, R columns [m, R, ...].
    """
    found = [
        calls[index].rows(slot, pulled)
        for index, slot in places
        if (pulled := columns[index]) is not None
    ]
    return joined_rows(found) if found else None


def blocks_of(
    calls: Sequence[OperationCall], stacks: list[Cotangents]
) -> Iterator[tuple[str, BlockRows]]:
    """Rows of every parameter; columns are let go when their last reader has had them."""
    uses = uses_of(calls)
    waiting = [len(call.uses) for call in calls]
    for name, places in uses.items():
        rows = parameter_rows(calls, places, stacks)
        for index, _ in places:
            waiting[index] -= 1
            if waiting[index] == 0:
                stacks[index] = None
        if rows is not None:
            yield name, rows


_RULES: dict[Any, RuleDefaults] = {}


def register_operation_rule(
    function: Callable[..., Any], rule: RuleDefaults, *, override: bool = False
) -> None:
    """Give parameters that a torch function reads a posterior.

    Every fit compares the rule's gradients with automatic differentiation on two samples, and
    leaves the parameter out, with a reason in ``la.coverage``, where they differ.

    Args:
        function: a function of torch as a model calls it: ``torch.nn.functional.bilinear``,
            ``torch.Tensor.matmul``, an operator of ``torch.ops``.
        rule: its rule.
        override: replace the function's present rule.

    Raises:
        TypeError: if ``function`` cannot be called, or ``rule`` lacks a method.
        ValueError: if the function has a rule already.

    Example:
        A quadratic form xᵀ W x, as :func:`torch.nn.functional.bilinear` of one output, is a
        linear map of one position, with x as its input and g x as its columns.

        >>> import torch
        >>> from laplace_debiased.curvature import Reading, RuleDefaults, register_operation_rule
        >>> from laplace_debiased.curvature.rows import MatrixRows, input_factor
        >>> class QuadraticRule(RuleDefaults):
        ...     def readings(self, x, y, weight, bias=None):
        ...         return (Reading({"weight": weight}, (x, y)),)
        ...     def matrix(self, slot, argument, settings):
        ...         return argument[0] if len(argument) == 1 else None
        ...     def rows(self, call, slot, columns):
        ...         x, y = call.inputs
        ...         g = columns[0][..., :1] * x.unsqueeze(1)
        ...         return MatrixRows(y.unsqueeze(1), g.unsqueeze(2))
        ...     def input_factor(self, call, slot, counts=None):
        ...         return input_factor(call.inputs[1].unsqueeze(1), counts)
        >>> register_operation_rule(torch.nn.functional.bilinear, QuadraticRule())
    """
    needed = ("transposed", "readings", "matrix", "rows", "input_factor")
    if not callable(function) or isinstance(function, type):
        raise TypeError(f"function must be a function of torch; got {function!r}.")
    if isinstance(rule, type) or not all(hasattr(rule, name) for name in needed):
        raise TypeError(
            f"rule must be an instance with {', '.join(needed)}; got {rule!r}. "
            "Derive it from RuleDefaults."
        )
    if function in _RULES and not override:
        name = getattr(function, "__name__", repr(function))
        raise ValueError(f"{name} has a rule already; pass override=True to replace it.")
    _RULES[function] = rule


def samples_first(tensor: Tensor, m: int, copies: int = 1) -> Tensor:
    """A tensor [m·k, ...] as [m, k, ...].

    Args:
        tensor: sample after sample; or copies of the batch one after the other.
        m: number of samples.
        copies: how many.
    """
    if copies == 1 or len(tensor) % (copies * m):
        return tensor.unflatten(0, (m, -1))
    return tensor.unflatten(0, (copies, m, -1)).transpose(0, 1).flatten(1, 2)


def registered_operations() -> Mapping[Any, RuleDefaults]:
    """The torch functions that have a rule, read-only."""
    return MappingProxyType(_RULES)
