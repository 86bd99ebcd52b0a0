"""How a convolution moves over its input."""

from __future__ import annotations

from dataclasses import dataclass

Sizes = tuple[int, ...]


@dataclass(frozen=True)
class Kernel:
    """How a convolution moves over its input, one number per spatial dimension.

    Attributes:
        size: of the kernel.
        stride: between windows.
        padding: zeros before and after each dimension.
        dilation: between entries of the kernel.
        groups: of channels.
    """

    size: Sizes
    stride: Sizes
    padding: tuple[tuple[int, int], ...]
    dilation: Sizes
    groups: int

    @property
    def pads(self) -> list[int]:
        """As ``torch.nn.functional.pad`` takes it."""
        return [side for sides in reversed(self.padding) for side in sides]
