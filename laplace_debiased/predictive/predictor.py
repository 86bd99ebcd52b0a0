"""What every fitted curvature can predict before it is given a prior."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum
from typing import Any, Protocol

from torch import Tensor

from laplace_debiased.predictive.selection import ALL_OUTPUTS, OutputSelection


class OutputCovariance(Enum):
    """How much of the covariance of the outputs is computed."""

    DIAGONAL = "diagonal"
    """Variances [m, C]."""

    PER_SAMPLE = "per_sample"
    """Covariances over the outputs of each sample [m, C, C]."""

    JOINT = "joint"
    """Covariance over all samples and outputs [m·C, m·C]."""


@dataclass(frozen=True, eq=False)
class OutputMoments:
    """Mean and covariance of the linearised outputs.

    Attributes:
        mean: f [m, C], of all outputs; [m, T, C] where a sample has outputs at T positions.
        covariance: of all outputs, in the shape that :class:`OutputCovariance` says; of the K
            chosen ones of each sample (at each position) the same with K in place of C.
        chosen: which these are [m, K] or [m, T, K], the largest first; None for all.
    """

    mean: Tensor
    covariance: Tensor
    chosen: Tensor | None = None


@dataclass(frozen=True, eq=False)
class Sweep:
    """Output moments under a grid of prior precisions, from one pass.

    Attributes:
        outputs: f [m, C] ([m, T, C] where a sample has outputs at T positions).
        covariances: under each of G scalar prior precisions, [G, m, C] or [G, m, C, C].
        prior_only: without any curvature (λ = 0) at the prior precision δ = 1, [m, C] or
            [m, C, C]; divided by δ it is that of any other.
        chosen: which outputs the covariances are of, as in :class:`OutputMoments`; they have K
            in place of C.
    """

    outputs: Tensor
    covariances: Tensor
    prior_only: Tensor
    chosen: Tensor | None = None


class Predictor(Protocol):
    """One fitted curvature without a prior: everything under a prior is a function of it.

    A precision is h·N·λ + δ along the curvature's directions, with h = 1/(σ²·temperature) and δ
    the prior precision; it is prepared once and serves every prediction until h or δ change.
    """

    def outputs(self, inputs: Any) -> Tensor:
        """Network outputs f [m, C], without a graph."""

    def precision(self, h: Tensor, prior: Tensor) -> Any:
        """The posterior precision under h and δ, as :meth:`moments` takes it."""

    def moments(
        self,
        inputs: Any,
        precision: Any,
        covariance: OutputCovariance,
        selection: OutputSelection = ALL_OUTPUTS,
        *,
        differentiable: bool = False,
    ) -> OutputMoments:
        """Mean and covariance of the linearised outputs.

        Args:
            inputs: one batch of model inputs, m samples.
            precision: from :meth:`precision`.
            covariance: how much of it; a joint one is of all outputs.
            selection: of which outputs.
            differentiable: keep the graph, for gradients with respect to ``inputs``.
        """

    def sweep(
        self,
        inputs: Any,
        h: Tensor,
        priors: Tensor,
        selection: OutputSelection = ALL_OUTPUTS,
        *,
        diagonal: bool,
    ) -> Sweep:
        """Moments under each of G scalar prior precisions, and without curvature.

        Args:
            inputs: one batch of model inputs, m samples.
            h: 0-d or [1].
            priors: δ [G].
            selection: of which outputs.
            diagonal: variances only.
        """
