"""Telling a lack of memory from other failures, which another way of computing may avoid."""

from __future__ import annotations

import os

import torch

from laplace_debiased.errors import MemoryExhaustedError
from laplace_debiased.options import DEFAULT_BYTE_BUDGET

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


def memory_exhausted(error: BaseException) -> MemoryExhaustedError:
    """What a public call raises where memory ran out in it, saying what takes less."""
    return MemoryExhaustedError(
        f"memory ran out ({str(error).strip().partition(chr(10))[0] or type(error).__name__}); "
        "nothing has been changed. What a pass needs beside the model follows from byte_budget "
        f"(by default {DEFAULT_BYTE_BUDGET} bytes; on a GPU an eighth of what is free, up to 4 "
        "GiB): make the posterior with a smaller one, DebiasedLaplace(..., byte_budget=2**26). If "
        "a single sample is too much: smaller batches, a smaller n_samples, or "
        "subset_of_weights='last_layer'."
    )


_SHARE_OF_FREE = 8
_MOST = 2**32
_MOST_ALONE = 2**31


def working_memory(byte_budget: int, device: torch.device) -> int:
    """Bytes that a pass may take at a time: as asked for, and by default more on a GPU.

    A GPU that waits for its next kernel is idle, and small chunks are little work per kernel: there
    the default is an eighth of the memory that is free, up to 4 GiB.
    """
    if byte_budget != DEFAULT_BYTE_BUDGET or device.type != "cuda":
        return byte_budget
    free, _ = torch.cuda.mem_get_info(device)
    return max(byte_budget, min(free // _SHARE_OF_FREE, _MOST))


def memory_of_one(byte_budget: int, device: torch.device) -> int:
    """Bytes that a sample may take which does not fit ``byte_budget`` with all its columns.

    Chunks of the default size suit a processor's caches. A sample of a wide network that is larger
    gains nothing from being cut further: what does not fit is pulled back again and again. So by
    default it may take an eighth of the machine's memory on the CPU, up to 2 GiB.
    """
    if byte_budget != DEFAULT_BYTE_BUDGET or device.type != "cpu":
        return byte_budget
    try:
        physical = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, OSError, ValueError):  # not told on every system
        return byte_budget
    return max(byte_budget, min(physical // _SHARE_OF_FREE, _MOST_ALONE))
