"""Models that take their inputs in different ways and compute the same thing."""

from __future__ import annotations

from collections import UserDict
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn


class Twin(nn.Module):
    """Logits from two tensors [m, 4] and [m, 2]."""

    def __init__(self) -> None:
        super().__init__()
        self.left, self.right = nn.Linear(4, 5), nn.Linear(2, 5)
        self.head = nn.Linear(5, 3)

    def logits(self, a: Tensor, b: Tensor) -> Tensor:
        return self.head(torch.tanh(self.left(a) + self.right(b)))

    def forward(self, x: Tensor) -> Tensor:
        return self.logits(x[:, :4], x[:, 4:])


class OneTuple(Twin):
    def forward(self, pair: Any) -> Tensor:  # type: ignore[override]
        return self.logits(pair[0], pair[1])


class TwoArguments(Twin):
    def forward(self, a: Tensor, b: Tensor) -> Tensor:  # type: ignore[override]
        return self.logits(a, b)


class OptionalSecond(Twin):
    def forward(self, a: Tensor, b: Tensor | None = None) -> Tensor:  # type: ignore[override]
        assert b is not None
        return self.logits(a, b)


class AnyNumber(Twin):
    def forward(self, *tensors: Tensor) -> Tensor:  # type: ignore[override]
        return self.logits(*tensors)


class OneMapping(Twin):
    def forward(self, batch: Any) -> Tensor:  # type: ignore[override]
        return self.logits(batch["a"], batch["b"])


class OneBatch(Twin):
    """Reads the batch by attribute, as a tokenizer's batch allows."""

    def forward(self, batch: Any) -> Tensor:  # type: ignore[override]
        return self.logits(batch.a, batch.b)


class Keywords(Twin):
    def forward(self, a: Tensor, b: Tensor) -> Tensor:  # type: ignore[override]
        return self.logits(a, b)


class OnlyKeywords(Twin):
    def forward(self, **batch: Tensor) -> Tensor:  # type: ignore[override]
        assert "labels" not in batch
        return self.logits(batch["a"], batch["b"])


class HuggingFaceStyle(Twin):
    """Keyword arguments, labels that would change it, and a record as output."""

    def forward(self, a=None, b=None, labels=None, return_dict=True):  # type: ignore[override]
        if labels is not None:
            self.problem_type = "set by a call with labels"
        return SimpleNamespace(loss=None, logits=self.logits(a, b))


class Batch(UserDict):
    """A mapping with attributes and a ``to``, like a tokenizer's ``BatchEncoding``."""

    def __getattr__(self, name: str) -> Any:
        if name == "data":
            raise AttributeError(name)
        try:
            return self.data[name]
        except KeyError:
            raise AttributeError(name) from None

    def to(self, device: torch.device) -> Batch:
        return Batch({k: v.to(device) if isinstance(v, Tensor) else v for k, v in self.items()})


class LoRALinear(nn.Module):
    """A frozen linear map plus one of low rank."""

    def __init__(self, base: nn.Linear, rank: int) -> None:
        super().__init__()
        self.base = base.requires_grad_(False)
        self.down = nn.Linear(base.in_features, rank, bias=False)
        self.up = nn.Linear(rank, base.out_features, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x) + self.up(self.down(x))
