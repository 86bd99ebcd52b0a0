"""Telling a lack of memory from other failures, which another way of computing may avoid."""

from __future__ import annotations

import torch

_MESSAGES = (
    "out of memory",  # CUDA calls outside of torch's allocator, MPS
    "can't allocate memory",  # DefaultCPUAllocator on Linux and macOS
    "not enough memory",  # DefaultCPUAllocator on Windows
    "_STATUS_ALLOC_FAILED",  # cuBLAS, cuSOLVER and their kin
)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether memory ran out, on a GPU or on the CPU (where torch raises a plain RuntimeError).

    Whoever catches RuntimeError to try another way must let these pass: the other way says nothing
    about the first, and the caller may free memory or ask for smaller pieces.
    """
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    return isinstance(error, RuntimeError) and any(text in str(error) for text in _MESSAGES)
