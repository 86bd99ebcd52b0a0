"""What the choice of the most probable outputs leaves out."""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from laplace.utils.enums import LinkApprox
from torch import Tensor

from laplace_debiased.predictive.predictive import Predictive


@dataclass(frozen=True)
class OutputsReport:
    """How much depends on the number K of outputs whose moments are computed.

    Attributes:
        n_outputs: K.
        n_classes: C.
        n_samples: samples (or positions) that were looked at.
        mass_outside: mean predictive probability of all classes beyond the K.
        max_mass_outside: the largest of any sample.
        change: mean Kullback-Leibler divergence of the prediction from K outputs to that from 2K,
            in nats; 0 where K is C.
        max_change: the largest of any sample.
    """

    n_outputs: int
    n_classes: int
    n_samples: int
    mass_outside: float
    max_mass_outside: float
    change: float
    max_change: float

    def to_dict(self) -> dict[str, Any]:
        """Plain numbers by name."""
        return asdict(self)

    def __str__(self) -> str:
        return (
            f"{self.n_outputs} of {self.n_classes} outputs, {self.n_samples} samples: probability "
            f"outside {self.mass_outside:.3g} (at most {self.max_mass_outside:.3g}); "
            f"{2 * self.n_outputs} outputs change predictions by {1e3 * self.change:.3g}e-3 nats "
            f"(at most {1e3 * self.max_change:.3g}e-3)"
        )


def outputs_report(
    predictive: Predictive, inputs: Any, link: LinkApprox, n_points: int | None = None
) -> OutputsReport:
    """Compare predictions from K and from 2K outputs.

    Args:
        predictive: the linearised network with its selection.
        inputs: model inputs of a few samples.
        link: how the inverse link is averaged.
        n_points: points of "mc".
    """

    def probabilities(n_outputs: int | None) -> Tensor:
        selected = replace(predictive.selection, n_outputs=n_outputs)
        chosen = replace(predictive, selection=selected, differentiable=False)
        p = chosen.probabilities(inputs, link, n_points, diagonal_output=False, generator=None)
        return p.detach().double().flatten(0, -2)

    k = predictive.selection.n_outputs
    p = probabilities(k)
    n_samples, n_classes = p.shape
    if k is None or k >= n_classes:
        return OutputsReport(n_classes, n_classes, n_samples, 0.0, 0.0, 0.0, 0.0)
    outside = 1.0 - p.topk(k, dim=-1).values.sum(-1)
    q = probabilities(2 * k)
    tiny = torch.finfo(torch.float64).tiny
    # Sums of p log(p/q) − p + q: no term is negative, so that small ones do not cancel.
    ratio = (p.clamp_min(tiny) / q.clamp_min(tiny)).log()
    divergence = (p * ratio - p + q).sum(-1).clamp_min(0.0)
    return OutputsReport(
        k,
        n_classes,
        n_samples,
        *(float(v) for values in (outside, divergence) for v in (values.mean(), values.max())),
    )
