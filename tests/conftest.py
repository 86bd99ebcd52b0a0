"""Fixtures of the core's tests."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager

import pytest
import torch

from tests.untouched import untouched as _untouched


@pytest.fixture
def untouched() -> Callable[..., AbstractContextManager[None]]:
    """A context manager that asserts that nothing of the user's changed inside it."""
    return _untouched


@pytest.fixture(autouse=True, scope="session")
def _double_is_not_the_default() -> Iterator[None]:
    """No test may leave another default dtype behind."""
    yield
    assert torch.get_default_dtype() is torch.float32
