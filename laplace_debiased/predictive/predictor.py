"""What every fitted curvature can predict before it is given a prior."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from enum import Enum
from typing import Any

import torch
from torch import Tensor

from laplace_debiased.network.grad_modes import outside_inference_mode
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


@dataclass(frozen=True, eq=False)
class Ask:
    """What moments are asked for.

    Attributes:
        inputs: one batch of model inputs, m samples.
        covariance: how much of it; a joint one is of all outputs.
        selection: of which outputs.
        differentiable: keep the graph, for gradients with respect to ``inputs``.
    """

    inputs: Any
    covariance: OutputCovariance
    selection: OutputSelection = ALL_OUTPUTS
    differentiable: bool = False

    @property
    def diagonal(self) -> bool:
        """Whether variances are asked for."""
        return self.covariance is OutputCovariance.DIAGONAL

    @property
    def joint(self) -> bool:
        """Whether the covariance is over samples, too."""
        return self.covariance is OutputCovariance.JOINT

    def chosen(self, outputs: Tensor) -> Tensor | None:
        """Indices of the outputs whose covariance is asked for; None for all."""
        return None if self.joint else self.selection.chosen(outputs)


class Predictor(ABC):
    """One fitted curvature without a prior: everything under a prior is a function of it.

    A precision is h·N·λ + δ along the curvature's directions, with h = 1/(σ²·temperature) and δ
    the prior precision; it is prepared once and serves every prediction until h or δ change.
    """

    engine: Any

    def outputs(self, inputs: Any) -> Tensor:
        """Network outputs f [m, C], without a graph."""
        found: Tensor = self.engine.outputs(inputs)
        return found

    @abstractmethod
    def precision(self, h: Tensor, prior: Tensor) -> Any:
        """The posterior precision under h (0-d or [1]) and δ, as :meth:`moments` takes it."""

    @abstractmethod
    def under(self, ask: Ask, precision: Any, priors: Tensor | None = None) -> OutputMoments:
        """Moments under a precision, with a covariance [1, ...]; with G ``priors`` [G + 1, ...].

        Each of these scalars is added to the precision; last is no curvature at δ = 1.
        """

    def moments(
        self,
        inputs: Any,
        precision: Any,
        covariance: OutputCovariance,
        selection: OutputSelection = ALL_OUTPUTS,
        *,
        differentiable: bool = False,
    ) -> OutputMoments:
        """Mean and covariance of the linearised outputs under a :meth:`precision`; see ``Ask``."""
        ask = Ask(inputs, covariance, selection, differentiable)
        found = self.under(ask, precision)
        return replace(found, covariance=found.covariance[0])

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

        None of what a pass computes depends on the prior precision, and the covariances (variances
        if ``diagonal``) are linear in 1/(h·N·λ + δ).
        """
        kind = OutputCovariance.DIAGONAL if diagonal else OutputCovariance.PER_SAMPLE
        with torch.no_grad():
            precision = self.precision(h, torch.zeros(1))
        found = self.under(Ask(inputs, kind, selection), precision, priors)
        whole = found.covariance
        return Sweep(found.mean, whole[:-1], whole[-1], found.chosen)


def beside(parts: Sequence[Any], dim: int) -> Any:
    """Parts along an axis; a single one as it is, None where there is nothing to put together."""
    return parts[0] if len(parts) == 1 or parts[0] is None else torch.cat(list(parts), dim)


class PreparedPrecision:
    """The posterior precision under the present hyper-parameters, built once for all predictions.

    It is built anew when one of them is another object or was written to in place, and not kept at
    all where one requires gradients: a kept one would carry a graph that the first backward pass
    frees.
    """

    def __init__(self) -> None:
        self._kept: tuple[tuple[Any, ...], Any] | None = None

    def get(self, build: Callable[[], Any], *dependencies: Any, differentiable: bool) -> Any:
        """The precision, from ``build`` unless it is kept from a call with the same dependencies.

        Args:
            build: makes it.
            dependencies: the hyper-parameters, and the curvature itself.
            differentiable: whether the graph of hyper-parameters that require gradients counts.
        """
        tensors = [value for value in dependencies if isinstance(value, Tensor)]
        if differentiable and any(tensor.requires_grad for tensor in tensors):
            return build()
        versions = (None if tensor.is_inference() else tensor._version for tensor in tensors)
        key = (*dependencies, *versions)
        if self._kept is None or not all(map(_same, self._kept[0], key)):
            # Kept beyond a caller's inference mode, whose tensors autograd could not use later.
            with outside_inference_mode(), torch.no_grad():
                self._kept = key, build()
        return self._kept[1]


def _same(one: Any, two: Any) -> bool:
    numbers = isinstance(one, int | float) and isinstance(two, int | float)
    return one == two if numbers else one is two
