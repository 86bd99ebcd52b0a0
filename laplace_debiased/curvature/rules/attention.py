r"""Projections of ``nn.MultiheadAttention``, which calls no module for them.

``in_proj_weight`` [3E, E] stacks the projections of queries, keys and values: three maps with their
own Kronecker factors each. They happen inside ``multi_head_attention_forward``, so a torch function
mode takes them out: it projects by itself, where inputs and outputs can be recorded, and runs
torch's function with identities in their place. Masks, scores and averages stay torch's own.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.overrides import TorchFunctionMode

from laplace_debiased.curvature.layers import LayerCall
from laplace_debiased.curvature.rows import (
    BiasRows,
    Factor,
    GroupedRows,
    LayerRows,
    input_factor,
    stacked,
)

Recorder = Callable[[str, tuple[Tensor, ...], tuple[Tensor, ...]], None]
"""Takes a layer's name, its inputs and its outputs."""

_SIGNATURE = inspect.signature(functional.multi_head_attention_forward)


class AttentionRule:
    """The packed input projection of ``nn.MultiheadAttention``, as three maps [E, E]."""

    parameters = ("in_proj_weight", "in_proj_bias")
    transposed = False

    def unsupported(self, module: nn.Module) -> str | None:
        """Keys or values of another width have weights of their own."""
        assert isinstance(module, nn.MultiheadAttention)
        if module.in_proj_weight is None:
            return "MultiheadAttention with kdim or vdim is not supported"
        return None

    def rows(self, module: nn.Module, call: LayerCall) -> LayerRows:
        """Inputs of the three projections [m, T_i, E], columns [m, R, T_i, E]."""
        longest = max(columns.shape[2] for columns in call.columns)
        padded = [_padded(columns, longest) for columns in call.columns]
        weight = None
        if call.weight:
            a = None
            if not call.columns_only:
                a = torch.stack([_padded(inputs, longest) for inputs in call.inputs])
            weight = GroupedRows(a, torch.stack(padded))
        return LayerRows(weight, BiasRows(torch.cat(padded, -1)) if call.bias else None)

    def input_factor(
        self,
        module: nn.Module,
        inputs: tuple[Tensor, ...],
        counts: Tensor | None = None,
    ) -> Factor:
        """[3, E, E], each over its own positions."""
        return stacked([input_factor(a, counts) for a in inputs])


def _padded(positions: Tensor, length: int) -> Tensor:
    """[..., T, E] filled up with zeros to [..., length, E]."""
    return functional.pad(positions, (0, 0, 0, length - positions.shape[-2]))


def attention_layers(model: nn.Module, covered: Iterable[str]) -> dict[int, tuple[str, str]]:
    """Attention modules of which a projection is covered.

    Args:
        model: the network.
        covered: names of the covered layers.

    Returns:
        By ``id`` of the output projection's weight: names of the module and of that projection.
    """
    names = frozenset(covered)
    found = {}
    for name, module in model.named_modules():
        if type(module).forward is nn.MultiheadAttention.forward:
            inner = f"{name}.out_proj" if name else "out_proj"
            if name in names or inner in names:
                assert isinstance(module, nn.MultiheadAttention)
                found[id(module.out_proj.weight)] = (name, inner)
    return found


class ProjectionsApart(TorchFunctionMode):
    """Within it, projections of the given attention modules are computed apart and recorded.

    Args:
        owners: names by ``id`` of the output projection's weight.
        record: called once per projection with batch-first tensors [m, T, E].
    """

    def __init__(self, owners: Mapping[int, tuple[str, str]], record: Recorder) -> None:
        super().__init__()
        self._owners, self._record = owners, record

    def __torch_function__(
        self,
        func: Callable,
        types: Any,
        args: tuple = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        """Project apart where the call is such a module's; anything else runs as it is."""
        kwargs = kwargs or {}
        if func is not functional.multi_head_attention_forward:
            return func(*args, **kwargs)
        call = dict(_SIGNATURE.bind(*args, **kwargs).arguments)
        owner = self._owners.get(id(call["out_proj_weight"]))
        if owner is None or call["query"].ndim != 3:
            return func(*args, **kwargs)
        attention, inner = owner
        if not call.get("use_separate_proj_weight", False):
            self._project_inputs(attention, call)
        return self._project_outputs(func, inner, call)

    def _project_inputs(self, name: str, call: dict[str, Any]) -> None:
        weights = call["in_proj_weight"].chunk(3)
        biases = (None,) * 3 if call["in_proj_bias"] is None else call["in_proj_bias"].chunk(3)
        inputs = tuple(call[key].transpose(0, 1) for key in ("query", "key", "value"))
        outputs = tuple(
            functional.linear(a, weight, bias)
            for a, weight, bias in zip(inputs, weights, biases, strict=True)
        )
        self._record(name, inputs, outputs)
        for key, projected in zip(("query", "key", "value"), outputs, strict=True):
            call[key] = projected.transpose(0, 1)
        identity = _identity_like(weights[0])
        call |= dict.fromkeys(("q_proj_weight", "k_proj_weight", "v_proj_weight"), identity)
        call |= {"use_separate_proj_weight": True, "in_proj_weight": None, "in_proj_bias": None}

    def _project_outputs(self, func: Callable, name: str, call: dict[str, Any]) -> Any:
        weight, bias = call["out_proj_weight"], call["out_proj_bias"]
        call |= {"out_proj_weight": _identity_like(weight), "out_proj_bias": None}
        attended, scores = func(**call)
        inputs = attended.transpose(0, 1)
        outputs = functional.linear(inputs, weight, bias)
        self._record(name, (inputs,), (outputs,))
        return outputs.transpose(0, 1), scores


def _identity_like(weight: Tensor) -> Tensor:
    return torch.eye(len(weight), dtype=weight.dtype, device=weight.device)
