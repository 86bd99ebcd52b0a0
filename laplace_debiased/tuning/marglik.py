"""The choice of a prior precision by the marginal likelihood, and whether it does harm."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from typing import Any

import torch
from laplace.utils.enums import LinkApprox, PriorStructure, TuningMethod
from torch import Tensor
from tqdm import tqdm

from laplace_debiased.checks import checked_integer, positive_value, shortened
from laplace_debiased.data.loaders import check_loader
from laplace_debiased.errors import NumericalError
from laplace_debiased.network.grad_modes import outside_inference_mode
from laplace_debiased.options import Positions, parse_choice
from laplace_debiased.predictive import OutputCovariance
from laplace_debiased.tuning.validation import Link, Validation

N_SAMPLES = 128
"""Training samples that are looked at."""

_HARM = 0.1
"""Nats per sample by which the posterior may fall behind the MAP model on training data.

A posterior is less certain than a network of its own training data, and should be. On 128 images of
a public CIFAR-10 ResNet-20 the prior tuned on validation data costs 0.01 to 0.03 nats; that of the
marginal likelihood, which makes predictions on other data useless, 0.5.
"""


def tuning_method(
    method: TuningMethod | str | None, val_loader: Any, positions: Positions
) -> TuningMethod:
    """The method of a tuning; None means "gridsearch" with validation data, else "marglik".

    Raises:
        ValueError: for an unknown one, a "gridsearch" without validation data, or a "marglik" at
            the last position.
        TypeError: for validation data that cannot be walked more than once.
    """
    if method is None:
        method = TuningMethod.MARGLIK if val_loader is None else TuningMethod.GRIDSEARCH
    chosen = parse_choice(TuningMethod, method, "method")
    if chosen is TuningMethod.MARGLIK and val_loader is not None:
        warnings.warn(
            "method='marglik' does not read val_loader; use method='gridsearch'.",
            UserWarning,
            stacklevel=4,
        )
    if chosen is TuningMethod.GRIDSEARCH:
        if val_loader is None:
            raise ValueError("method='gridsearch' needs a val_loader.")
        check_loader(val_loader, "val_loader")
    elif positions is Positions.LAST:
        raise ValueError(
            "positions='last' is for method='gridsearch': the marginal likelihood is of whole "
            "sequences. Leave positions out."
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
    """The best prior precision met by gradient ascent in its logarithm (laplace-torch's).

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
    kind = parse_choice(PriorStructure, structure, "prior_structure")
    if kind is PriorStructure.DIAG and not takes_diagonal:
        raise ValueError(
            "a Kronecker posterior takes a scalar or layer-wise prior; use "
            "prior_structure='scalar' or 'layerwise'."
        )
    positive_value("lr", lr, single=True)
    n_steps = checked_integer("n_steps", n_steps, 0)
    with outside_inference_mode(), torch.enable_grad():
        start = torch.as_tensor(initial, dtype=like.dtype, device=like.device)
        start = start.detach().clone().reshape(-1)
        if kind is PriorStructure.DIAG and 1 < len(start) == len(sizes):
            start = start.repeat_interleave(torch.tensor(sizes, device=start.device))
        elif kind is not PriorStructure.SCALAR and len(start) == 1:
            layerwise = kind is PriorStructure.LAYERWISE
            start = start.expand(len(sizes) if layerwise else sum(sizes))
        log_prior = start.log().requires_grad_(True)
        optimizer = torch.optim.Adam([log_prior], lr=lr)
        best, best_value = start, -math.inf
        steps = tqdm(range(n_steps + 1), disable=not progress_bar, desc="[Marginal likelihood]")
        for step in steps:
            optimizer.zero_grad()
            value = evidence(log_prior.exp())
            current = float(value.detach())
            if not math.isfinite(current):
                raise NumericalError(
                    f"the log marginal likelihood is {current} after {step} steps; lower lr, "
                    "or start from another init_prior_prec."
                )
            if current > best_value:
                best, best_value = log_prior.detach().exp(), current
            if step < n_steps:
                (-value).backward()
                optimizer.step()
    return best


def warn_if_harmful(validation: Validation, prior: Tensor, precision: Any) -> None:
    """Compare posterior and MAP model on training samples; warn if the posterior is far behind.

    Args:
        validation: training samples, and no loss of the user's own.
        prior: prior precision that the marginal likelihood chose.
        precision: the posterior precision under it, as the predictor prepares it.
    """
    subject = validation.subject
    link: Link = None if validation.regression else LinkApprox.MC
    covariance = validation.reads_covariance(link)
    kind = OutputCovariance.PER_SAMPLE if covariance else OutputCovariance.DIAGONAL
    posterior, network, n_samples = validation.fresh_scorer(), validation.fresh_scorer(), 0
    for inputs, targets in validation.batches(progress_bar=False):
        found = subject.predictor.moments(inputs, precision, kind, subject.selection)
        mean, targets, spread, picked = validation.counted(
            found.mean, targets, found.covariance.unsqueeze(0), found.chosen
        )
        posterior.update(validation.predict(mean, spread[0], link, None, picked), targets)
        network.update(validation.map_prediction(mean), targets)
        n_samples += len(targets)
    loss, map_loss = posterior.value(), network.value()
    if n_samples and loss > map_loss + _HARM:
        chosen = shortened(prior.detach(), digits=3)
        warnings.warn(
            f"the prior precision {chosen} that maximises the marginal likelihood "
            f"predicts training samples far worse than the MAP model: NLL {loss:.3g} "
            f"against {map_loss:.3g} on {n_samples} of them. Where a network fits its training "
            "data closely, the marginal likelihood asks for too small a prior. Choose it on "
            "validation data: optimize_prior_precision(val_loader=...).",
            UserWarning,
            stacklevel=5,
        )
