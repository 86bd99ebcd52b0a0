"""Chunks are larger where memory is, and never other than asked for."""

import pytest
import torch

from laplace_debiased.network.memory import memory_of_one, working_memory
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


def test_a_large_sample_may_take_more_than_a_chunk_by_default_and_only_then() -> None:
    cpu = torch.device("cpu")
    by_default = memory_of_one(DEFAULT_BYTE_BUDGET, cpu)
    assert DEFAULT_BYTE_BUDGET <= by_default <= 2**31
    for asked in (1, DEFAULT_BYTE_BUDGET - 1, DEFAULT_BYTE_BUDGET + 1):
        assert memory_of_one(asked, cpu) == asked
    assert memory_of_one(DEFAULT_BYTE_BUDGET, torch.device("cuda")) == DEFAULT_BYTE_BUDGET
