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
    """The sum of every rank's tensors, in their own dtype.

    Args:
        ranks: all ranks; each gives as many tensors, of the same shapes and dtypes.
        what: their name.
        tensors: this rank's.
        symmetric: which of them are symmetric matrices [..., D, D]: their upper triangles are sent.
    """
    if ranks.world == 1:
        return list(tensors)
    ranks.meet(what)
    results: list[Tensor] = []
    bucket: list[Tensor] = []

    def send() -> None:
        for packed in _sent(ranks, bucket):
            index = len(results)
            results.append(_unpacked(packed, tensors[index], index in symmetric))
        bucket.clear()

    for index, tensor in enumerate(tensors):
        packed = _packed(tensor.detach(), index in symmetric)
        size = sum(part.nbytes for part in bucket) + packed.nbytes
        if bucket and (packed.dtype is not bucket[0].dtype or size > BUCKET_BYTES):
            send()
        bucket.append(packed)
    if bucket:
        send()
    return results


def assembled(ranks: Ranks, what: str, part: Tensor, positions: Tensor, n: int) -> Tensor:
    """Rows [n, ...] of which every rank has some, on every rank.

    Args:
        ranks: all ranks.
        what: their name.
        part: this rank's rows [k, ...], of a real dtype; their trailing shape does not count where
            k is 0.
        positions: where they belong [k]; no position is another rank's as well.
        n: how many there are.
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


def _packed(tensor: Tensor, symmetric: bool) -> Tensor:
    return triangle_of(tensor) if symmetric else tensor


def _unpacked(flat: Tensor, like: Tensor, symmetric: bool) -> Tensor:
    flat = flat.to(like.device)
    if not symmetric:
        return flat.reshape(like.shape)
    side = like.shape[-1]
    return from_triangle(flat.reshape(*like.shape[:-2], side * (side + 1) // 2), side)


def _upper(matrix: Tensor) -> Tensor:
    """Mask of the upper triangle [D, D]; it takes an eighth of what indices would."""
    return torch.ones(matrix.shape[-2:], dtype=torch.bool, device=matrix.device).triu()


def _sent(ranks: Ranks, bucket: Sequence[Tensor]) -> list[Tensor]:
    """One bucket, summed; a tensor that is larger than a bucket goes in several messages."""
    flat = torch.cat([part.reshape(-1) for part in bucket]).to(ranks.device)
    for message in flat.split(max(1, BUCKET_BYTES // flat.element_size())):
        ranks.add_up(message)
    return list(flat.split([part.numel() for part in bucket]))
