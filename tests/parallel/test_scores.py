"""Tuning, evaluation and comparison over ranks say what one process says."""

from __future__ import annotations

import dataclasses
import math
import warnings
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch

from tests.parallel.cases import tunings
from tests.parallel.crowd import run


def numbers(value: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    """Everything in a nest of records, by where it is."""
    if dataclasses.is_dataclass(value):
        value = {field.name: getattr(value, field.name) for field in dataclasses.fields(value)}
    if isinstance(value, dict):
        for key, entry in value.items():
            yield from numbers(entry, f"{path}.{key}")
    elif isinstance(value, list | tuple):
        for index, entry in enumerate(value):
            yield from numbers(entry, f"{path}[{index}]")
    elif isinstance(value, torch.Tensor | np.ndarray):
        yield from numbers(value.tolist(), path)
    else:
        yield path, value


def tolerance(path: str) -> float:
    """How well a number is determined.

    The mc link takes a root of covariances that are next to singular under a small prior: known to
    the root of a rounding error (4e-9 seen, in low rank). A metric may compute in float32.
    """
    if "a metric" in path:
        return 1e-5
    if ".result." in path and "probit" not in path:
        return 1e-8 if "low rank" in path else 1e-9
    return 1e-10


@pytest.fixture(scope="module")
def alone() -> dict[str, Any]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return dict(numbers(tunings(0)))


@pytest.mark.parametrize("world", [2, 3])
def test_worlds_agree(world: int, alone: dict[str, Any]) -> None:
    found = [dict(numbers(theirs)) for theirs in run(world, tunings)]
    wrong = []
    for theirs in found:
        assert theirs.keys() == alone.keys()
        for path, value in alone.items():
            if isinstance(value, float) and math.isnan(value):
                continue
            expected = value
            if isinstance(value, float):
                expected = pytest.approx(value, rel=tolerance(path), abs=1e-10)
            if theirs[path] != expected or theirs[path] != found[0][path]:
                wrong.append((path, value, theirs[path], found[0][path]))
    assert not wrong, "\n".join(map(str, wrong))
