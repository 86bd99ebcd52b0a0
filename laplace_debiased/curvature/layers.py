r"""Layers that carry a posterior, and the registry of the rules that read them.

A *rule* says what one call of a layer contributes to the curvature of the layer's weight and bias:
it turns the recorded inputs, and the columns pulled back to the recorded outputs, into
:class:`~laplace_debiased.curvature.rows.LayerRows`. Everything after it (factors, magnitudes,
predictions) knows rows only, no layer types.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, Protocol

from torch import Tensor, nn

from laplace_debiased.curvature.rows import BiasRows, Factor, LayerRows, MatrixRows, input_factor


@dataclass(frozen=True, eq=False)
class LayerCall:
    """One call of a layer for m samples.

    Attributes:
        inputs: recorded inputs; one tensor, for attention one per projection.
        columns: R columns at the outputs that belong to them, [m, R, *output shape] each.
        weight: whether rows of the weight are wanted.
        bias: whether rows of the bias are wanted.
        columns_only: whether the rows will only be asked for the factor of their columns, so that
            a layer may leave out its inputs where that factor does not depend on them.
    """

    inputs: tuple[Tensor, ...]
    columns: tuple[Tensor, ...]
    weight: bool = True
    bias: bool = True
    columns_only: bool = False


class LayerRule(Protocol):
    """How one type of layer reads its weight and its bias."""

    @property
    def parameters(self) -> tuple[str, str]:
        """Attributes of the module that are its weight and its bias."""

    @property
    def transposed(self) -> bool:
        """Whether the input factor acts on the rows of the weight and not on its columns."""

    def unsupported(self, module: nn.Module) -> str | None:
        """Why this instance cannot be covered, or None if it can."""

    def rows(self, module: nn.Module, call: LayerCall) -> LayerRows:
        """Rows of the wanted blocks.

        Raises:
            ValueError: if the recorded tensors are not of the shape that the layer documents with
                the batch in front.
        """

    def input_factor(
        self,
        module: nn.Module,
        inputs: tuple[Tensor, ...],
        counts: Tensor | None = None,
    ) -> Factor | None:
        """Kronecker factor of the inputs of one call, summed over samples.

        Args:
            module: the layer.
            inputs: what was recorded, m samples.
            counts: multiplicity of every sample [m]; None for ones.

        Returns:
            The weight's input factor; None where the weight is a vector.
        """


class RuleDefaults:
    """What most rules say: a ``weight`` [D_out, D_in] and a ``bias``, all instances covered."""

    parameters = ("weight", "bias")
    transposed = False
    """Whether the weight is stored as [D_in, D_out]."""

    def unsupported(self, module: nn.Module) -> str | None:
        """Why this instance cannot be covered; None unless overridden."""
        return None


class LinearMapRule(RuleDefaults):
    """Base of rules for layers that are one linear map, shared over positions.

    The output at position t of sample n is W a_{n,t} + b, with W the weight as a matrix
    [D_out, D_in] in row-major order. A subclass gives the a and the gradients at the outputs; as
    it stands, this is ``nn.Linear`` on [m, ..., D_in], where all dimensions between are positions.
    """

    def input_positions(self, module: nn.Module, inputs: Tensor) -> Tensor:
        """The layer's input [m, ..., D_in] as a [m, T, D_in]."""
        return inputs.reshape(inputs.shape[0], -1, inputs.shape[-1])

    def output_positions(self, module: nn.Module, cotangents: Tensor) -> Tensor:
        """Gradients in the layer's output [k, ..., D_out] as g [k, T, D_out]."""
        return cotangents.reshape(cotangents.shape[0], -1, cotangents.shape[-1])

    def rows(self, module: nn.Module, call: LayerCall) -> LayerRows:
        """Rows from the two."""
        (inputs,), (columns,) = call.inputs, call.columns
        g = self.output_positions(module, columns.flatten(0, 1)).unflatten(0, columns.shape[:2])
        weight = None
        if call.weight:
            a = None if call.columns_only else self.input_positions(module, inputs)
            require_equal_positions(module, a, g)
            weight = MatrixRows(a, g, self.transposed)
        return LayerRows(weight, BiasRows(g) if call.bias else None)

    def input_factor(
        self,
        module: nn.Module,
        inputs: tuple[Tensor, ...],
        counts: Tensor | None = None,
    ) -> Factor:
        """From the inputs of the map."""
        return input_factor(self.input_positions(module, inputs[0]), counts)


def require_equal_positions(module: nn.Module, a: Tensor | None, g: Tensor) -> None:
    """Check that a layer's inputs [m, T, D_in] fit its columns [m, R, T, D_out].

    Raises:
        ValueError: if not.
    """
    if a is not None and (a.shape[0], a.shape[1]) != (g.shape[0], g.shape[2]):
        raise ValueError(
            f"{type(module).__name__} read {a.shape[1]} positions of {a.shape[0]} samples and "
            f"wrote {g.shape[2]} of {g.shape[0]}; is the first dimension of its input the batch?"
        )


_RULES: dict[type[nn.Module], LayerRule] = {}
_RULES_BY_PATH: dict[str, LayerRule] = {}


def register_layer_rule(
    module_type: type[nn.Module] | str, rule: LayerRule, *, override: bool = False
) -> None:
    """Give layers of a type a posterior.

    Every fit compares the rule's gradients with automatic differentiation on two samples, and
    leaves the layer out, with a reason in ``la.coverage``, where they differ.

    Args:
        module_type: the type; a string "package.module.Type" for a type that is not to be
            imported. Subclasses are included as long as they keep the type's ``forward``.
        rule: its rule; a :class:`LinearMapRule` for any layer that is linear in its weight.
        override: replace the type's present rule.

    Raises:
        TypeError: if ``module_type`` is no module type, or ``rule`` lacks a method.
        ValueError: if the type has a rule already.

    Example:
        >>> import torch
        >>> from laplace_debiased.curvature import LinearMapRule, register_layer_rule, rule_for
        >>> class Doubling(torch.nn.Linear):
        ...     def forward(self, x):
        ...         return 2 * super().forward(x)
        >>> class DoublingRule(LinearMapRule):
        ...     def output_positions(self, module, cotangents):
        ...         return 2 * super().output_positions(module, cotangents)
        >>> register_layer_rule(Doubling, DoublingRule())
        >>> type(rule_for(Doubling(3, 2))).__name__
        'DoublingRule'
    """
    needed = ("parameters", "transposed", "unsupported", "rows", "input_factor")
    if isinstance(rule, type) or not all(hasattr(rule, name) for name in needed):
        raise TypeError(
            f"rule must be an instance with {', '.join(needed)}; got {rule!r}. "
            "Derive it from LinearMapRule."
        )
    if isinstance(module_type, str):
        registry: dict = _RULES_BY_PATH
    elif isinstance(module_type, type) and issubclass(module_type, nn.Module):
        registry = _RULES
    else:
        raise TypeError(f"module_type must be a torch.nn.Module type; got {module_type!r}.")
    if module_type in registry and not override:
        name = module_type if isinstance(module_type, str) else module_type.__name__
        raise ValueError(f"{name} has a rule already; pass override=True to replace it.")
    registry[module_type] = rule


def registered_rules() -> Mapping[type[nn.Module], LayerRule]:
    """The layer types that have a rule, read-only."""
    return MappingProxyType(_RULES)


def rule_for(module: nn.Module) -> LayerRule | None:
    """The rule of a module, or None.

    A subclass has its parent's rule only while it keeps the parent's ``forward``: a subclass that
    computes something else (LoRA, quantised layers) is not the linear map that the rule assumes.
    """
    kind: Any
    for kind in type(module).__mro__:
        rule = _RULES.get(kind) or _RULES_BY_PATH.get(f"{kind.__module__}.{kind.__qualname__}")
        if rule is not None and type(module).forward is kind.forward:
            return rule
    return None


@dataclass(frozen=True, eq=False)
class Layer:
    """A covered layer: its module, its rule, and which of its parameters carry a posterior.

    Args:
        name: qualified name in the model.
        module: the layer itself.
        rule: how it reads its parameters.
        weight: qualified parameter name of a covered weight, else None.
        bias: qualified parameter name of a covered bias, else None.
    """

    name: str
    module: nn.Module
    rule: LayerRule
    weight: str | None
    bias: str | None

    @property
    def parameter_names(self) -> tuple[str, ...]:
        """Covered parameters of the layer."""
        return tuple(name for name in (self.weight, self.bias) if name is not None)

    def parameter_of(self, part: str) -> str:
        """Qualified parameter name of the layer's covered "weight" or "bias"."""
        name = self.weight if part == "weight" else self.bias
        assert name is not None
        return name

    def rows(
        self,
        inputs: tuple[Tensor, ...],
        columns: tuple[Tensor, ...],
        *,
        columns_only: bool = False,
    ) -> LayerRows:
        """Rows of one call; the arguments as in :class:`LayerCall`."""
        weight, bias = self.weight is not None, self.bias is not None
        call = LayerCall(inputs, columns, weight, bias, columns_only)
        return self.rule.rows(self.module, call)

    def rows_of_calls(
        self,
        inputs: Sequence[tuple[Tensor, ...]],
        columns: Sequence[tuple[Tensor, ...]],
        *,
        columns_only: bool = False,
    ) -> LayerRows:
        """Rows of all calls of the layer together; per call the arguments of :meth:`rows`."""
        return LayerRows.join(
            [
                self.rows(read, written, columns_only=columns_only)
                for read, written in zip(inputs, columns, strict=True)
            ]
        )
