"""One call of ``optimize_prior_precision``: its arguments checked, and what they find."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torchmetrics
from laplace.utils.enums import LinkApprox, PredType, PriorStructure, TuningMethod
from torch import Tensor

from laplace_debiased.checks import checked_flag, positive_value
from laplace_debiased.data.loaders import check_loader, loader_generators
from laplace_debiased.network.grad_modes import outside_inference_mode
from laplace_debiased.network.precision import exact_arithmetic
from laplace_debiased.network.rng import preserved_rng
from laplace_debiased.options import parse_choice
from laplace_debiased.parallel import Ranks
from laplace_debiased.tuning import (
    GridSearch,
    PriorGrid,
    Subject,
    TuningResult,
    Validation,
    maximise_marginal_likelihood,
)


@dataclass(frozen=True, eq=False)
class TuningCall:
    """The arguments of a tuning that do not depend on its method; checked where they are used."""

    val_loader: Any
    pred_type: PredType
    links: tuple[LinkApprox, ...]
    loss: torchmetrics.Metric | Callable[..., Tensor | float] | None
    n_samples: int | None
    progress_bar: bool
    refine: bool
    seed: int

    def search(self, subject: Subject, grid: PriorGrid, ranks: Ranks) -> TuningResult:
        """Search a grid on the validation data, and warn of what a user should know.

        Raises:
            ValueError, TypeError: for impossible arguments.
            NumericalError: if no grid point has a finite loss.
        """
        if self.val_loader is None:
            raise ValueError("method='gridsearch' needs a val_loader.")
        check_loader(self.val_loader, "val_loader")
        checked_flag("refine", self.refine)
        search = GridSearch(
            Validation(subject, self.val_loader, self.loss, ranks),
            grid,
            self.pred_type,
            self.links,
            self.n_samples,
            self.refine,
            self.seed,
        )
        with (
            preserved_rng(None, generators=loader_generators(self.val_loader)),
            exact_arithmetic(subject.device),
        ):
            result = search.run(self.progress_bar and ranks.is_first)
        if ranks.is_first:
            result.warn_on_edge()
            result.warn_if_worse()
        return result


def tuning_method(method: TuningMethod | str | None, val_loader: Any) -> TuningMethod:
    """The method of a tuning; None means "gridsearch" with validation data, else "marglik".

    Raises:
        ValueError: for an unknown one.
    """
    if method is None:
        return TuningMethod.MARGLIK if val_loader is None else TuningMethod.GRIDSEARCH
    chosen = parse_choice(TuningMethod, method, "method")
    if chosen is TuningMethod.MARGLIK and val_loader is not None:
        warnings.warn(
            "method='marglik' does not read val_loader; use method='gridsearch'.",
            UserWarning,
            stacklevel=4,
        )
    return chosen


def by_evidence(
    evidence: Callable[[Tensor], Tensor],
    initial: float | Tensor,
    structure: PriorStructure | str,
    like: Tensor,
    sizes: tuple[int, ...],
    *,
    takes_diagonal: bool,
    n_steps: int,
    lr: float,
    progress_bar: bool,
) -> Tensor:
    """The prior precision of the largest marginal likelihood.

    Args:
        evidence: log marginal likelihood of a prior precision.
        initial: where to start.
        structure: "scalar", "layerwise", or "diag" where the posterior takes it.
        like: gives dtype and device.
        sizes: entries of every covered parameter tensor.
        takes_diagonal: whether the posterior takes one prior precision per entry.
        n_steps: gradient steps.
        lr: their size, on log prior precision.
        progress_bar: show progress.

    Raises:
        ValueError: for a structure that the posterior does not take, or numbers out of range.
        NumericalError: if the marginal likelihood is not finite.
    """
    positive_value("init_prior_prec", initial)
    with outside_inference_mode():
        start = torch.as_tensor(initial, dtype=like.dtype, device=like.device)
        start = start.detach().clone().reshape(-1)
    match parse_choice(PriorStructure, structure, "prior_structure"):
        case PriorStructure.SCALAR:
            pass
        case PriorStructure.LAYERWISE:
            start = start.expand(len(sizes)).clone() if len(start) == 1 else start
        case PriorStructure.DIAG if not takes_diagonal:
            raise ValueError(
                "a Kronecker posterior takes a scalar or layer-wise prior; use "
                "prior_structure='scalar' or 'layerwise'."
            )
        case PriorStructure.DIAG if len(start) == len(sizes) and len(start) > 1:
            start = start.repeat_interleave(torch.tensor(sizes, device=start.device))
        case PriorStructure.DIAG:
            start = start.expand(sum(sizes)).clone()
    return maximise_marginal_likelihood(evidence, start, n_steps, lr, progress_bar)
