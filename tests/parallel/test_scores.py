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


REFINED = 1e-4
"""Where the loss is lowest, the prior is known to the root of a rounding error, or to 1e-3 if a
search stops for that; and in a comparison what is predicted under such a prior."""


def refined(path: str) -> bool:
    """Whether a number follows from a refined prior precision, or from a metric in float32."""
    inexact = (".tuned", "prior_precision", "prior_only_p", "comparison", "a metric")
    return any(part in path for part in inexact)


@pytest.fixture(scope="module")
def alone() -> dict[str, Any]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return dict(numbers(tunings(0)))


@pytest.mark.parametrize("world", [2, 3])
def test_worlds_agree(world: int, alone: dict[str, Any]) -> None:
    found = [dict(numbers(theirs)) for theirs in run(world, tunings)]
    for theirs in found:
        assert theirs.keys() == alone.keys()
        for path, value in alone.items():
            if not isinstance(value, float):
                assert theirs[path] == value, path
            elif not math.isnan(value):
                tolerance = REFINED if refined(path) else 1e-10
                assert theirs[path] == pytest.approx(value, rel=tolerance, abs=1e-10), path
                assert theirs[path] == found[0][path], path
