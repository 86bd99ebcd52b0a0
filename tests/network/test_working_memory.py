"""Chunks are larger where memory is, and never other than asked for."""

import pytest
import torch

from laplace_debiased.network.memory import working_memory
from laplace_debiased.options import DEFAULT_BYTE_BUDGET

GPU = torch.device("cuda")


@pytest.mark.parametrize(
    ("free", "expected"),
    [(2**30, DEFAULT_BYTE_BUDGET), (2**34, 2**31), (2**40, 2**32)],
)
def test_the_default_grows_with_what_is_free_on_a_gpu(monkeypatch, free: int, expected: int):
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (free, 2**41))
    assert working_memory(DEFAULT_BYTE_BUDGET, GPU) == expected


def test_what_is_asked_for_is_what_is_taken():
    assert working_memory(12_345, GPU) == 12_345
    assert working_memory(DEFAULT_BYTE_BUDGET, torch.device("cpu")) == DEFAULT_BYTE_BUDGET
