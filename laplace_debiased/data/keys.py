"""How the mappings that a loader yields are read."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from laplace_debiased.data.loaders import split_batch


@dataclass(frozen=True, eq=False)
class Keys:
    """Which entries of a loader's mappings a fitted network is given, and its targets.

    Attributes:
        targets: Key of the targets.
        entered: What the network takes of a batch's inputs.
    """

    targets: str = "labels"
    entered: Callable[[Any], Any] = lambda inputs: inputs

    def split(self, batch: Any) -> tuple[Any, Tensor]:
        """What the network takes of a batch, and its targets [m, ...], as :func:`split_batch`."""
        inputs, targets = split_batch(batch, self.targets)
        return self.entered(inputs), targets


AS_LABELLED = Keys()
"""Mappings go in whole, with their labels under the usual key."""
