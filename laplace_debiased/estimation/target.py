"""Which network is fitted, and which of its weights."""

from __future__ import annotations

from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import Any

import torch
from laplace.utils.feature_extractor import FeatureReduction
from torch import Tensor, nn

from laplace_debiased.curvature import Coverage, FeaturePass, Head
from laplace_debiased.curvature.coverage import FROZEN, NOT_LAST
from laplace_debiased.network.functional import FunctionalNetwork
from laplace_debiased.network.grad_modes import outside_inference_mode
from laplace_debiased.network.inputs import call_arguments, explained_failure, logits_of, to_device
from laplace_debiased.network.last_layer import LastLayerNetwork
from laplace_debiased.network.modes import evaluation_mode
from laplace_debiased.network.outputs import check_initialised
from laplace_debiased.network.precision import HALF_DTYPES
from laplace_debiased.network.substitution import call_with
from laplace_debiased.network.wrappers import check_whole, plain_network
from laplace_debiased.options import DEFAULT_BYTE_BUDGET
from laplace_debiased.predictive.draws import HeadProducts, NetworkProducts


@dataclass(frozen=True)
class LastLayer:
    """The last layer of a network: its qualified name, None while it is not known.

    ``reduction`` says how features of more than two dimensions are reduced. One that was
    found, and not given, is looked for again at every fit.
    """

    name: str | None
    reduction: FeatureReduction | None = None
    is_given: bool = False


@dataclass(frozen=True, eq=False)
class Target:
    """The user's own network, and which of its weights carry a posterior.

    Attributes:
        model: the network; never copied, never changed. Of ``torch.compile``, ``DataParallel``
            and ``DistributedDataParallel`` what is inside.
        last_layer: its last layer, if that alone is meant; None for all weights.

    Raises:
        TypeError: for a model that is no module.
        ValueError: if the weights are cut up over processes, or not initialised.
    """

    model: nn.Module
    last_layer: LastLayer | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.model, nn.Module):
            raise TypeError(f"model must be a torch.nn.Module; got {type(self.model).__name__}.")
        object.__setattr__(self, "model", plain_network(self.model))
        check_initialised(self.model)
        check_whole(self.model)

    @property
    def network(self) -> nn.Module:
        """What laplace-torch's attribute ``model`` is: for a last layer its feature extractor."""
        if self.last_layer is None:
            return self.model
        return LastLayerNetwork(self.model, self.last_layer.name, self.last_layer.reduction)

    @property
    def device(self) -> torch.device:
        """Device of the network's parameters."""
        return next(self.model.parameters()).device

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of a posterior: of the network's first real parameter; float32 for halves."""
        dtypes = (parameter.dtype for parameter in self.model.parameters())
        dtype = next((dtype for dtype in dtypes if dtype.is_floating_point), torch.float32)
        return torch.float32 if dtype in HALF_DTYPES else dtype

    @property
    def is_located(self) -> bool:
        """Whether it is known which weights are meant."""
        return self.last_layer is None or self.last_layer.name is not None

    def at(self, name: str) -> Target:
        """The target with its last layer of that name."""
        assert self.last_layer is not None
        if self.last_layer.name == name:
            return self
        return replace(self, last_layer=replace(self.last_layer, name=name))

    def parameters(self, coverage: Coverage) -> list[Tensor]:
        """The covered parameters, in order.

        Raises:
            ValueError: if some are in double precision and others are not.
        """
        named = dict(self.model.named_parameters())
        found = {name: named[name] for name in coverage.covered}
        by_dtype = {
            torch.float32 if p.dtype in HALF_DTYPES else p.dtype: name for name, p in found.items()
        }
        if len(by_dtype) > 1:
            kinds = " and ".join(f"{name!r} is {dtype}" for dtype, name in by_dtype.items())
            raise ValueError(
                f"the parameters are of several dtypes ({kinds}), and a posterior has one: convert "
                "the model with .float() or .double(), or freeze those of one dtype."
            )
        return list(found.values())

    def mean(self, coverage: Coverage) -> Tensor:
        """The covered parameters as one vector [P], of any memory format."""
        entries = [p.detach().reshape(-1).to(self.dtype) for p in self.parameters(coverage)]
        return torch.cat(entries) if entries else torch.empty(0, dtype=self.dtype)

    def sampled_outputs(
        self,
        coverage: Coverage,
        weights: Tensor,
        inputs: Any,
        *,
        differentiable: bool,
        **model_kwargs: Any,
    ) -> Tensor:
        """Outputs [S, m, C] of the network at sampled weights [S, P]; its own are never written.

        With ``differentiable`` the graph with respect to the inputs is kept.

        Raises:
            ValueError: for further arguments of the model where only the last layer is sampled.
        """
        if self.last_layer is not None:
            if model_kwargs:
                raise ValueError("last-layer sampling takes no further model arguments.")
            return self._sampled_heads(coverage, weights, inputs, differentiable)
        parameters, inputs = self.parameters(coverage), to_device(inputs, self.device)
        sizes, outputs = [parameter.numel() for parameter in parameters], []
        for sample in weights:
            parts = zip(coverage.covered, parameters, sample.split(sizes), strict=True)
            values = {name: part.reshape(p.shape).to(p.dtype) for name, p, part in parts}
            with (
                outside_inference_mode(),
                torch.set_grad_enabled(differentiable),
                evaluation_mode(self.model),
                explained_failure(inputs),
            ):
                args, named = call_arguments(self.model, inputs)
                found = call_with(self.model, values, args, {**named, **model_kwargs})
            outputs.append(logits_of(found))
        return torch.stack(outputs)

    def products(self, coverage: Coverage, byte_budget: int) -> NetworkProducts | HeadProducts:
        """The linearised network along directions of the covered weights."""
        if self.last_layer is not None:
            return HeadProducts(self.feature_pass(coverage, byte_budget), coverage.covered)
        return NetworkProducts(FunctionalNetwork(self.model, coverage.covered), byte_budget)

    # -- the last layer --------------------------------------------------------------------

    @property
    def head(self) -> nn.Linear:
        """The last layer itself."""
        assert self.last_layer is not None
        assert self.last_layer.name is not None
        head = dict(self.model.named_modules())[self.last_layer.name]
        assert isinstance(head, nn.Linear)
        return head

    def last_layer_coverage(self, chosen: Coverage | None = None) -> Coverage:
        """The last layer's trainable parameters, and what an earlier answer covered of it.

        So what was frozen since stays covered.
        """
        kept = frozenset(() if chosen is None else chosen.covered)
        last = {id(parameter) for parameter in self.head.parameters()}
        covered, excluded, sizes = [], {}, {}
        for name, parameter in self.model.named_parameters():
            sizes[name] = parameter.numel()
            if id(parameter) not in last:
                excluded[name] = NOT_LAST
            elif not (parameter.requires_grad or name in kept):
                excluded[name] = FROZEN
            else:
                covered.append(name)
        return Coverage(tuple(covered), MappingProxyType(excluded), MappingProxyType(sizes))

    def feature_pass(self, coverage: Coverage, byte_budget: int) -> FeaturePass:
        """The pass over the last layer alone."""
        assert self.last_layer is not None
        covered, name = frozenset(coverage.covered), self.last_layer.name
        weight, bias = (
            candidate if (candidate := f"{name}.{attribute}") in covered else None
            for attribute in ("weight", "bias")
        )
        head = Head(str(name), self.head, weight, bias)
        return FeaturePass(self.model, head, self.last_layer.reduction, byte_budget)

    def _sampled_heads(
        self, coverage: Coverage, weights: Tensor, inputs: Any, differentiable: bool
    ) -> Tensor:
        """Outputs [S, m, C] of sampled last layers on features of one forward pass."""
        engine = self.feature_pass(coverage, DEFAULT_BYTE_BUDGET)
        features = engine.features(inputs, differentiable=differentiable)[1]
        sizes = [coverage.sizes[name] for name in coverage.covered]
        values = dict(zip(coverage.covered, weights.split(sizes, dim=-1), strict=True))
        covered, head = engine.head, self.head
        weight, bias = head.weight.detach(), head.bias
        if covered.weight is not None:
            weight = values[covered.weight].reshape(len(weights), *weight.shape)
        outputs = features @ weight.transpose(-1, -2)
        if bias is not None:
            shift = bias.detach() if covered.bias is None else values[covered.bias].unsqueeze(1)
            outputs = outputs + shift
        return outputs.expand(len(weights), -1, -1)
