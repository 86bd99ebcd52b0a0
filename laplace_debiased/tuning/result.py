"""What a search for the prior precision found."""

from __future__ import annotations

import warnings
from dataclasses import dataclass

_WORSE_BY = 1e-4
"""Nats per sample by which a validation NLL has to exceed another to be called worse.

The posterior's tends to the MAP model's with the prior precision; a prior at the end of the grid
leaves differences that mean nothing.
"""


@dataclass(frozen=True)
class TuningResult:
    """What a grid search found.

    Attributes:
        prior_precisions: the grid [G].
        losses: validation loss at every grid point [G]; NaN or infinite where it failed.
        best_grid_point: the grid point of the lowest finite loss.
        prior_precision: the refined optimum (or the best grid point, if nothing was lower).
        loss: validation loss there.
        map_loss: the MAP model's negative log likelihood on the same data, in nats, mean over
            samples (in regression with the same noise σ²); None with a loss of the user's own.
    """

    prior_precisions: tuple[float, ...]
    losses: tuple[float, ...]
    best_grid_point: float
    prior_precision: float
    loss: float
    map_loss: float | None = None

    @property
    def on_edge(self) -> bool:
        """Whether the best grid point is an end of the grid."""
        ends = (self.prior_precisions[0], self.prior_precisions[-1])
        return len(self.losses) > 1 and self.best_grid_point in ends

    def warn_on_edge(self) -> None:
        """Warn if the optimum may lie beyond the grid."""
        if self.on_edge:
            warnings.warn(
                f"the best prior precision {self.best_grid_point:.3g} is an end of the grid; the "
                "optimum may lie beyond. Widen log_prior_prec_min and log_prior_prec_max.",
                UserWarning,
                stacklevel=4,
            )

    def warn_if_worse(self) -> None:
        """Warn if the posterior predicts the validation data worse than the MAP model does."""
        if self.map_loss is not None and self.loss > self.map_loss + _WORSE_BY:
            warnings.warn(
                f"the best prior precision {self.prior_precision:.3g} has a validation NLL of "
                f"{self.loss:.4g}, worse than the {self.map_loss:.4g} of the MAP model on the same "
                "data. Widen the grid towards larger priors (log_prior_prec_max), scale the "
                "temperature (fit_temperature), or take more data for the curvature and for "
                "validation.",
                UserWarning,
                stacklevel=4,
            )
