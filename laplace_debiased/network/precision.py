"""In which precision curvature is formed: float32 or better, without automatic casts."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, nn

from laplace_debiased.network.interrupts import unbroken

HALF_DTYPES = (torch.float16, torch.bfloat16)


@unbroken
def exact_arithmetic(device: torch.device) -> Iterator[None]:
    """No automatic casts inside: sums of squares are formed in the precision of their terms.

    A model that casts on its own does so without the cache of cast weights: inside another
    ``autocast`` it is not emptied after a forward pass, would grow with every transformed call,
    and would not notice a weight that has changed.
    """
    with torch.autocast(device.type, enabled=False, cache_enabled=False):
        yield


def in_precision_of(model: nn.Module, tensor: Tensor) -> Tensor:
    """The tensor in the model's dtype where that is of half precision, else as it is."""
    dtype = next((p.dtype for p in model.parameters() if p.is_floating_point()), tensor.dtype)
    return tensor.to(dtype) if dtype in HALF_DTYPES else tensor


def full_precision(tensor: Tensor) -> Tensor:
    """In float32 if of half precision, where sums of squares overflow or lose their digits."""
    return tensor.float() if tensor.dtype in HALF_DTYPES else tensor
