"""What a search for the prior precision found."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field

_MATTERS = 1e-4
"""Nats per sample by which a validation NLL has to lie below another to be called better.

The posterior's tends to the MAP model's with the prior precision; smaller differences mean nothing.
"""


@dataclass(frozen=True)
class TuningResult:
    """What a grid search found. Losses are means over validation samples, in nats by default.

    Attributes:
        prior_precisions: the grid [G], ascending.
        losses: validation loss at every grid point under the chosen link [G]; NaN or infinite
            where it failed.
        best_grid_point: the grid point of the lowest finite loss.
        prior_precision: the refined optimum (or the best grid point, if nothing was lower).
        loss: validation loss there.
        map_loss: the MAP model's negative log likelihood on the same data (in regression with the
            same noise σ²); None with a loss of the user's own.
        link: the link of that loss; None where predictions are moments.
        losses_by_link: the same as ``losses`` under every link that was tried.
        prior_only_loss: the lowest loss of a posterior without any curvature (λ = 0), at a prior
            precision and under a link of its own; None with a loss of the user's own, and for
            sampled networks.
        prior_only_precision: its prior precision.
        prior_only_link: its link.
    """

    prior_precisions: tuple[float, ...]
    losses: tuple[float, ...]
    best_grid_point: float
    prior_precision: float
    loss: float
    map_loss: float | None = None
    link: str | None = None
    losses_by_link: Mapping[str, tuple[float, ...]] = field(default_factory=dict)
    prior_only_loss: float | None = None
    prior_only_precision: float | None = None
    prior_only_link: str | None = None

    @property
    def on_edge(self) -> bool:
        """Whether the best grid point is an end of the grid."""
        ends = (self.prior_precisions[0], self.prior_precisions[-1])
        return len(self.losses) > 1 and self.best_grid_point in ends

    def warn(self) -> None:
        """Warn if the optimum may lie beyond the grid, or is no better than the MAP model."""
        if self.on_edge:
            warnings.warn(
                f"the best prior precision {self.best_grid_point:.3g} is an end of the grid; the "
                "optimum may lie beyond. Leave out log_prior_prec_min and log_prior_prec_max: the "
                "search then goes as far as the loss asks.",
                UserWarning,
                stacklevel=4,
            )
        if self.map_loss is not None and self.loss > self.map_loss - _MATTERS:
            worse = self.loss > self.map_loss + _MATTERS
            warnings.warn(
                f"the best prior precision {self.prior_precision:.3g} has a validation NLL of "
                f"{self.loss:.4g}, {'worse' if worse else 'no better'} than the "
                f"{self.map_loss:.4g} of the MAP model on the same data: no prior that was tried "
                "beats it. Scale the temperature instead (fit_temperature), or take more data for "
                "the curvature and for validation.",
                UserWarning,
                stacklevel=4,
            )
