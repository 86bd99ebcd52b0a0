"""A loader that all ranks walk together, for what is scored rather than summed into a curvature."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import chain
from typing import Any, TypeVar

from laplace_debiased.data.loaders import index_batches, inner_loader, whole_loader
from laplace_debiased.data.sources import content_checksum
from laplace_debiased.network.inputs import map_tensors
from laplace_debiased.parallel.ranks import ALONE, Ranks

T = TypeVar("T")


class Block:
    """The batches of a loader that one rank walks.

    Of a map-style data set a rank takes one run of samples, in the loader's order, so that the
    blocks of all ranks one after the other are what one process walks. Of a stream it takes all;
    streams that turn out to be the same on all ranks count once.

    Args:
        loader: The loader, or any iterable of batches.
        ranks: All ranks.
        name: What the user calls the loader.
    """

    def __init__(self, loader: Any, ranks: Ranks = ALONE, name: str = "loader") -> None:
        self._loader, self._ranks = whole_loader(loader, name), ranks
        self._is_stream, self._content = False, 0
        if ranks.world == 1:
            return
        listed = index_batches(self._loader, 0)
        # Rank 0's order: one of its own might be another rank's as well.
        [listed] = ranks.from_first(f"the samples of {name}", lambda: [listed])
        if listed is None:
            self._is_stream = True
            return
        indices, size = list(chain.from_iterable(listed)), max(map(len, listed), default=1)
        ends = (len(indices) * (ranks.rank + k) // ranks.world for k in (0, 1))
        own = indices[slice(*ends)]
        batches = [own[i : i + size] for i in range(0, len(own), size)]
        self._loader = inner_loader(self._loader, batches)

    def __iter__(self) -> Iterator[Any]:
        content = 0
        for batch in self._loader:
            if self._is_stream:
                content = content_checksum(batch, content)
            yield batch
        self._content = content

    def __len__(self) -> int:
        return len(self._loader)

    def everyones(self, what: str, value: T) -> list[T]:
        """What every rank found in its block, in the order of the loader; after a walk.

        The value is of plain values and CPU tensors.
        """
        if self._ranks.world == 1:
            return [value]
        found = self._ranks.gathered(what, (self._is_stream, self._content, value))
        if all(is_stream and content == self._content for is_stream, content, _ in found):
            return [found[0][2]]  # to the last digit the same on every rank
        return [theirs for _, _, theirs in found]

    def joined(self, what: str, *lists: list[Any]) -> list[list[Any]]:
        """Lists that every rank made of its batches, as one process would have made them.

        Their values are per batch; tensors come out on the CPU.
        """
        if self._ranks.world == 1:
            return list(lists)
        everyones = self.everyones(what, map_tensors(lambda t: t.detach().cpu(), list(lists)))
        return [list(chain.from_iterable(theirs)) for theirs in zip(*everyones, strict=True)]
