"""Whether a network's outputs are those of its last linear layer."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional

from laplace_debiased.network.precision import full_precision

_RELATIVE_TOLERANCE = {
    torch.float64: 1e-6,
    torch.float32: 1e-3,
    torch.float16: 2e-2,
    torch.bfloat16: 5e-2,
}
"""By the coarsest dtype in which the layer worked, well above the rounding of its products: up to
5e-4 for float32 as TF32, 4e-3 for bfloat16."""


def check_linear_head(
    name: str, head: nn.Linear, outputs: Tensor, features: Tensor, dtypes: Sequence[torch.dtype]
) -> None:
    """Check that outputs are W φ + b, which the curvature of a last layer takes for granted.

    Args:
        name: the layer's name.
        head: the layer.
        outputs: network outputs [m, C].
        features: φ [m, D].
        dtypes: dtypes that the numbers went through on the way.

    Raises:
        ValueError: if the outputs are something else.
    """
    outputs, features = outputs.detach(), features.detach()
    weight, bias = head.weight.detach(), head.bias
    with torch.no_grad(), torch.autocast(outputs.device.type, enabled=False):
        expected = functional.linear(
            features.to(weight.dtype), weight, None if bias is None else bias.detach()
        )
        if expected.shape == outputs.shape:
            expected = full_precision(expected).to(outputs.dtype)
            error = (outputs - expected).abs().max() if outputs.numel() else outputs.new_zeros(())
            scale = torch.stack(
                [_largest(outputs), _largest(expected), _typical_product(weight, features)]
            ).max()
            tolerance = max(_RELATIVE_TOLERANCE.get(dtype, 0.0) for dtype in dtypes)
            if bool(error <= tolerance * scale):
                return
            found = f"they differ by up to {float(error):.3g}, of outputs up to {float(scale):.3g}"
        else:
            found = f"they have shape {tuple(outputs.shape)}, the layer's {tuple(expected.shape)}"
    raise ValueError(
        f"the network's outputs are not those of its last layer {name!r}: {found}. A last-layer "
        "posterior needs outputs W φ + b of a linear layer, not scaled, capped, reduced or "
        "normalised afterwards. Fold a scale into the layer's weights, pass the feature_reduction "
        "that the model applies ('pick_first', 'pick_last' or 'average'), or take "
        "subset_of_weights='all' with all other weights frozen."
    )


def _largest(values: Tensor) -> Tensor:
    return values.abs().max() if values.numel() else values.new_zeros(())


def _typical_product(weight: Tensor, features: Tensor) -> Tensor:
    """Size of W φ if nothing cancelled, √(Σ w² φ²): rounding errors are relative to it."""
    if not features.numel():
        return features.new_zeros(())
    rows = torch.linalg.vector_norm(weight, dim=1).max().to(features.dtype)
    return rows * torch.linalg.vector_norm(features, dim=1).max() / math.sqrt(weight.shape[1])
