"""Leaving the caller's inference mode, for good measure also when interrupted."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from laplace_debiased.network.interrupts import unbroken


@unbroken
def outside_inference_mode() -> Iterator[None]:
    """No inference mode in the block; gradients are on, until something in it says otherwise.

    An interrupt between ``torch.inference_mode`` and its block would leave it to the garbage
    collector to go back: to the gradient mode of then, in the middle of what runs by that time.
    """
    with torch.inference_mode(False):
        yield
