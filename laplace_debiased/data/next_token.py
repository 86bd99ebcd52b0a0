"""Labels of causal language models, for who scores every position by itself."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import default_collate

from laplace_debiased.errors import ArgumentTypeError, MissingKeyError

IGNORED = -100
"""The label that does not count, as in Hugging Face's models and ``torch.nn.CrossEntropyLoss``."""


@dataclass(frozen=True)
class NextTokenLabels:
    """A ``collate_fn`` whose labels are the next tokens, from one whose labels are the tokens.

    Hugging Face's causal language models, and so the data for their ``Trainer``, have labels that
    equal ``input_ids``, and shift them in the loss that the model computes. Here no loss of the
    model's is used, and a label belongs to the outputs at its own position: each position is given
    the label of the next, and the last one -100. Pass ``ignore_index=-100`` to the posterior.

    Attributes:
        collate_fn: from samples to a mapping, as ``transformers.DataCollatorForLanguageModeling``.
        dict_key_y: where that holds its labels [m, T].

    Example:
        >>> import torch
        >>> from laplace_debiased import NextTokenLabels
        >>> tokens = torch.tensor([5, 3, 8])
        >>> NextTokenLabels()([{"input_ids": tokens, "labels": tokens}])["labels"]
        tensor([[   3,    8, -100]])
    """

    collate_fn: Callable[[list[Any]], Any] = default_collate
    dict_key_y: str = "labels"

    def __post_init__(self) -> None:
        if not callable(self.collate_fn):
            kind = type(self.collate_fn).__name__
            raise ArgumentTypeError(
                f"collate_fn must make a batch of a list of samples; got {kind}."
            )

    def __call__(self, samples: list[Any]) -> Mapping[str, Any]:
        """A batch of samples.

        Raises:
            TypeError: if ``collate_fn`` gives no mapping, or its labels are no tensor.
            MissingKeyError: if that has no labels.
            ValueError: if they are not [m, T].
        """
        batch = self.collate_fn(samples)
        if not isinstance(batch, Mapping):
            raise TypeError(f"collate_fn must give a mapping; got {type(batch).__name__}.")
        if self.dict_key_y not in batch:
            raise MissingKeyError(
                f"collate_fn's batches have no key dict_key_y={self.dict_key_y!r}; they have "
                f"{sorted(map(str, batch))}."
            )
        labels = batch[self.dict_key_y]
        if not isinstance(labels, Tensor):
            raise TypeError(f"collate_fn's labels must be a tensor; got {type(labels).__name__}.")
        if labels.ndim != 2:
            raise ValueError(
                "collate_fn's labels must be of shape (batch, positions), as input_ids are; got "
                f"{tuple(labels.shape)}."
            )
        last = torch.full_like(labels[:, :1], IGNORED)
        return {**batch, self.dict_key_y: torch.cat([labels[:, 1:], last], 1)}
