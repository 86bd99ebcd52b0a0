"""Sums over all ranks in buckets: as many messages as there are megabytes, not as tensors."""

from __future__ import annotations

from collections.abc import Collection, Sequence

import torch
from torch import Tensor

from laplace_debiased.parallel.ranks import Ranks

BUCKET_BYTES = 25 * 2**20
"""Size of a message. Small ones cost latency, large ones memory (25 MB is DDP's choice, too)."""


def summed(
    ranks: Ranks, what: str, tensors: Sequence[Tensor], symmetric: Collection[int] = ()
) -> list[Tensor]:
    """The sum of every rank's tensors, as many and of the same shapes, in their own dtype.

    Of symmetric matrices [..., D, D], by their indices, the upper triangles are sent.
    """
    if ranks.world == 1:
        return list(tensors)
    ranks.meet(what)
    results: list[Tensor] = []
    bucket: list[Tensor] = []

    def send() -> None:
        flat = torch.cat([part.reshape(-1) for part in bucket]).to(ranks.device)
        for message in flat.split(max(1, BUCKET_BYTES // flat.element_size())):
            ranks.add_up(message)
        for packed, part in zip(bucket, flat.split([one.numel() for one in bucket]), strict=True):
            like, is_triangle = tensors[len(results)], len(results) in symmetric
            found = part.to(like.device).reshape(packed.shape)
            results.append(from_triangle(found, like.shape[-1]) if is_triangle else found)
        bucket.clear()

    for index, tensor in enumerate(tensors):
        packed = triangle_of(tensor.detach()) if index in symmetric else tensor.detach()
        size = sum(part.nbytes for part in bucket) + packed.nbytes
        if bucket and (packed.dtype is not bucket[0].dtype or size > BUCKET_BYTES):
            send()
        bucket.append(packed)
    if bucket:
        send()
    return results


def assembled(ranks: Ranks, what: str, part: Tensor, positions: Tensor, n: int) -> Tensor:
    """Rows [n, ...] of which every rank has some, on every rank.

    ``part`` [k, ...] has this rank's rows, of a real dtype, ``positions`` [k] their places; no
    place is another rank's as well. Its trailing shape does not count where k is 0.
    """
    if ranks.world == 1:
        return part
    form = (tuple(part.shape[1:]), part.dtype) if len(part) else None
    forms = ranks.gathered(f"the form of {what}", form)
    shape, dtype = next((form for form in forms if form is not None), (part.shape[1:], part.dtype))
    whole = torch.zeros((n, *shape), dtype=dtype, device=part.device)
    if len(part):
        whole[positions.to(part.device)] = part.detach()
    return summed(ranks, what, [whole])[0]


def triangle_of(matrix: Tensor) -> Tensor:
    """The upper triangle, row by row [..., D(D + 1)/2], of a symmetric matrix [..., D, D]."""
    return matrix[..., _upper(matrix)]


def from_triangle(triangle: Tensor, side: int) -> Tensor:
    """The matrix [..., D, D] of :func:`triangle_of`; ``side`` is D."""
    whole = triangle.new_zeros(*triangle.shape[:-1], side, side)
    whole[..., _upper(whole)] = triangle
    return whole + whole.triu(1).mT


def _upper(matrix: Tensor) -> Tensor:
    """Mask of the upper triangle [D, D]; it takes an eighth of what indices would."""
    return torch.ones(matrix.shape[-2:], dtype=torch.bool, device=matrix.device).triu()
