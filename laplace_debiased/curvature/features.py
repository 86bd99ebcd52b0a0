"""The last-layer pass: features in, no backward pass at all."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from laplace.utils.feature_extractor import FeatureReduction
from torch import Tensor, nn
from torch.nn import functional

from laplace_debiased.curvature.coverage import Layer
from laplace_debiased.curvature.operations.call import (
    Cotangents,
    OperationCall,
    RuleDefaults,
    Use,
)
from laplace_debiased.curvature.operations.linear import LinearRule
from laplace_debiased.curvature.operations.views import Place
from laplace_debiased.curvature.passes import BackwardPass, Bases, Chunk, Columns
from laplace_debiased.network.grad_modes import outside_inference_mode
from laplace_debiased.network.inputs import (
    batch_length,
    invoke,
    pieces,
    plain_tensors,
    row_slices,
    to_device,
)
from laplace_debiased.network.last_layer import reduced, watching
from laplace_debiased.network.modes import evaluation_mode
from laplace_debiased.network.outputs import check_outputs
from laplace_debiased.network.precision import full_precision
from laplace_debiased.options import DEFAULT_BYTE_BUDGET

_RELATIVE_TOLERANCE = {
    torch.float64: 1e-6,
    torch.float32: 1e-3,
    torch.float16: 2e-2,
    torch.bfloat16: 5e-2,
}
"""By the coarsest dtype in which the layer worked, well above the rounding of its products: up to
5e-4 for float32 as TF32, 4e-3 for bfloat16."""


@dataclass(frozen=True, eq=False)
class Head(Layer):
    """A network's last layer."""

    module: nn.Linear

    def call(self, features: Tensor, rule: RuleDefaults) -> OperationCall:
        """The layer's call on features [m, D]."""
        shape = tuple(self.module.weight.shape)
        uses = {}
        if self.weight is not None:
            uses["weight"] = Use(self.weight, Place(shape, (0, 0), shape))
        if self.bias is not None:
            uses["bias"] = Use(self.bias, Place(shape[:1], (0,), shape[:1]))
        return OperationCall("linear", rule, uses, (features,))


@dataclass(frozen=True, eq=False)
class FeaturePass:
    """Pass over the last layer only: its inputs are the features, its columns the output columns.

    The outputs are W φ + b, so nothing has to be pulled back (design: last-layer closed form).

    Args:
        model: the user's network; left untouched.
        head: its last layer.
        reduction: how features of more than two dimensions are reduced, or None.
        byte_budget: working memory of one chunk, in bytes.
        rule: how the head reads its parameters.
    """

    model: nn.Module
    head: Head
    reduction: FeatureReduction | None = None
    byte_budget: int = DEFAULT_BYTE_BUDGET
    rule: RuleDefaults = field(default_factory=LinearRule)

    @property
    def names(self) -> tuple[str, ...]:
        """The covered parameters."""
        return tuple(name for name in (self.head.weight, self.head.bias) if name is not None)

    @property
    def device(self) -> torch.device:
        """Device of the model's parameters."""
        return next(self.model.parameters()).device

    def features(self, inputs: Any, *, differentiable: bool = False) -> tuple[Tensor, Tensor]:
        """Outputs [m, C] and features φ [m, D] of one batch.

        Raises:
            ValueError: if the outputs are not W φ + b.
        """
        inputs = to_device(inputs, self.device)
        parts: Iterable[Any] = [inputs] if differentiable else pieces(inputs)
        outputs, features = zip(*(self._of(part, differentiable) for part in parts), strict=True)
        if len(outputs) == 1:
            return outputs[0], features[0]
        return torch.cat(outputs), torch.cat(features)

    def _of(self, inputs: Any, differentiable: bool) -> tuple[Tensor, Tensor]:
        """Of one forward pass."""
        head = self.head.module
        with outside_inference_mode(), torch.set_grad_enabled(differentiable):
            inputs = plain_tensors(inputs)
            with evaluation_mode(self.model), watching(head) as seen:
                outputs = invoke(self.model, inputs)
        if not isinstance(outputs, Tensor) or seen.features is None:
            raise ValueError(
                f"the network does not return the outputs of its last layer {self.head.name!r}."
            )
        length = batch_length(inputs)
        if not length:
            raise ValueError("the model inputs hold no sample.")
        if outputs.ndim == 3:
            raise ValueError(
                f"a last-layer posterior takes outputs (batch, outputs) = ({length}, C); got "
                f"{tuple(outputs.shape)}. For sequences, freeze all other parameters "
                "(requires_grad_(False)) and use subset_of_weights='all'."
            )
        check_outputs(outputs, length)
        features = reduced(seen.features, self.reduction)
        dtypes = [*seen.dtypes, outputs.dtype, features.dtype, head.weight.dtype]
        outputs, features = full_precision(outputs), full_precision(features)
        wrapped = torch._C._functorch.is_functorch_wrapped_tensor(features)
        if wrapped or features.numel() % len(outputs):
            raise ValueError(
                f"the last layer {self.head.name!r} does not read one row of features per sample: "
                "the model calls it on a part of the batch only, or within torch.vmap. Take "
                "subset_of_weights='all'."
            )
        features = features.reshape(len(outputs), -1)
        if features.shape[1] != (width := head.in_features):
            raise ValueError(
                f"the last layer {self.head.name!r} maps {width} features, but the network gives "
                f"{features.shape[1]} per sample. Pass feature_reduction='pick_first', 'pick_last' "
                "or 'average', as the model itself reduces them. Where each gives an output of its "
                "own (the rewards of a pair), freeze the other weights (requires_grad_(False)) and "
                "take subset_of_weights='all'."
            )
        _check_linear_head(self.head, outputs, features, dtypes)
        return outputs, features

    def outputs(self, inputs: Any) -> Tensor:
        """Network outputs [m, C] without a graph."""
        return self.features(inputs)[0].detach()

    @property
    def n_outputs(self) -> int:
        """C."""
        return self.head.module.out_features

    def output_shape(self, inputs: Any) -> torch.Size:
        """[C]."""
        return torch.Size([self.n_outputs])

    def chunks(
        self,
        inputs: Any,
        columns: Columns,
        *,
        n_columns: int | None = None,
        bases: Bases | None = None,
        streaming: bool = False,
        differentiable: bool = False,
    ) -> Iterator[Chunk]:
        """One forward pass over the batch, then chunks of its features."""
        outputs, features = self.features(inputs, differentiable=differentiable)
        m, n_outputs = outputs.shape
        per_column = 4 * n_outputs + features.shape[1]
        size = outputs.element_size() * per_column * (n_outputs if n_columns is None else n_columns)
        for rows in row_slices(m, max(1, min(m, self.byte_budget // max(1, size)))):
            yield self._chunk(outputs[rows], features[rows], rows, columns)

    def _chunk(self, outputs: Tensor, features: Tensor, rows: slice, columns: Columns) -> Chunk:
        calls = [self.head.call(features, self.rule)]
        found = columns(outputs, rows)
        assert isinstance(found, Tensor)  # unit columns are for a backward pass
        to_pull = found.transpose(1, 2)
        n_columns = to_pull.shape[1]

        def pull_back(part: slice, last: bool) -> list[Cotangents]:
            return [(to_pull[:, part],)]

        step = max(n_columns, 1)
        return Chunk(rows, outputs, calls, n_columns, step, self.byte_budget, pull_back)


def _check_linear_head(
    head: Head, outputs: Tensor, features: Tensor, dtypes: Sequence[torch.dtype]
) -> None:
    """Check that outputs [m, C] are W φ + b, of features φ [m, D] that went through some dtypes.

    Raises:
        ValueError: if the outputs are something else.
    """
    outputs, features = outputs.detach(), features.detach()
    weight, bias = head.module.weight.detach(), head.module.bias
    with torch.no_grad(), torch.autocast(outputs.device.type, enabled=False):
        expected = functional.linear(features.to(weight.dtype), weight, bias)
        if expected.shape != outputs.shape:
            found = f"they have shape {tuple(outputs.shape)}, the layer's {tuple(expected.shape)}"
        elif not outputs.numel():
            return
        else:
            expected = full_precision(expected).to(outputs.dtype)
            # Size of W φ if nothing cancelled, √(Σ w² φ²): rounding errors are relative to it.
            norms = [torch.linalg.vector_norm(t, dim=1).max() for t in (weight, features)]
            typical = norms[0].to(features) * norms[1] / math.sqrt(weight.shape[1])
            scale = torch.stack([outputs.abs().max(), expected.abs().max(), typical]).max()
            error = (outputs - expected).abs().max()
            if bool(error <= max(_RELATIVE_TOLERANCE.get(t, 0.0) for t in dtypes) * scale):
                return
            found = f"they differ by up to {float(error):.3g}, of outputs up to {float(scale):.3g}"
    raise ValueError(
        f"the network's outputs are not those of its last layer {head.name!r}: {found}. A last-"
        "layer posterior needs outputs W φ + b of a linear layer, not scaled, capped, reduced or "
        "normalised afterwards. Fold a scale into the layer's weights, pass the feature_reduction "
        "that the model applies ('pick_first', 'pick_last' or 'average'), or take "
        "subset_of_weights='all' with all other weights frozen."
    )


CurvaturePass = BackwardPass | FeaturePass
"""Walks a batch: forward, pull back columns, and hand over every parameter's rows."""
