"""Which outputs a prediction needs: the most probable of each sample, at which positions."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from laplace_debiased.network.inputs import batch_length

ALL_UP_TO = 64
"""With up to so many classes, ``n_outputs="auto"`` takes them all."""

MOST_PROBABLE = 32
"""With more, so many of each sample."""


@dataclass(frozen=True)
class OutputSelection:
    """Which of a network's outputs moments are computed of.

    Attributes:
        n_outputs: K, so many of the largest outputs of each sample (at each position); None for
            all.
        last_position: of a sequence only its last position.
    """

    n_outputs: int | None = None
    last_position: bool = False

    def chosen(self, outputs: Tensor) -> Tensor | None:
        """Indices [..., K] of the chosen ones of outputs [..., C], largest first; None for all."""
        if self.n_outputs is None or self.n_outputs >= outputs.shape[-1]:
            return None
        return outputs.detach().topk(self.n_outputs, dim=-1).indices

    def require_no_positions(self) -> None:
        """Refuse what only makes sense of sequences.

        Raises:
            ValueError: if it asks for a position.
        """
        if self.last_position:
            raise ValueError(
                "positions='last' needs a posterior over all weights, Kronecker, whose model "
                "returns outputs at several positions (batch, positions, classes); this one has "
                "one set of outputs per sample. Leave positions out."
            )


ALL_OUTPUTS = OutputSelection()


def resolved(n_outputs: int | str | None, n_classes: int) -> int | None:
    """K for a posterior's option; None for all outputs."""
    if isinstance(n_outputs, str):
        return None if n_classes <= ALL_UP_TO else MOST_PROBABLE
    return n_outputs


def at_positions(outputs: Tensor, positions: slice | Tensor | None, rows: slice) -> Tensor:
    """Outputs [m, T, C] at a group of positions [m, T', C], or at each sample's own one [m, C]."""
    if positions is None:
        return outputs
    if isinstance(positions, slice):
        return outputs[:, positions]
    index = positions[rows].to(outputs.device)
    return outputs[torch.arange(len(outputs), device=outputs.device), index]


def last_positions(inputs: Any, n_positions: int) -> Tensor:
    """The last position of every sample [m]; of a padded one the last that its mask attends to."""
    mask = inputs.get("attention_mask") if isinstance(inputs, Mapping) else None
    if not isinstance(mask, Tensor) or mask.ndim != 2 or mask.shape[1] != n_positions:
        return torch.full((batch_length(inputs),), n_positions - 1)
    order = torch.arange(1, n_positions + 1, device=mask.device)
    return ((mask != 0) * order).amax(-1).sub(1).clamp_min(0)


NO_LAST_LABEL = (
    " Under positions='last' the label of a sequence's last position counts, and where labels are "
    "the next tokens the last token has none: give inputs without it (input_ids[:, :-1], with "
    "labels input_ids[:, 1:])."
)


def last_labels(inputs: Any, targets: Tensor) -> Tensor:
    """Labels [m, T] of sequences at their last positions [m]; one label per sample as it is."""
    if targets.ndim != 2:
        return targets
    return at_positions(targets, last_positions(inputs, targets.shape[1]), slice(None))
