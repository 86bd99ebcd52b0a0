"""Choosing the prior precision by the marginal likelihood of the training data."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch
from laplace.utils.enums import PriorStructure
from torch import Tensor
from tqdm import tqdm

from laplace_debiased.checks import checked_integer, positive_value
from laplace_debiased.errors import NumericalError
from laplace_debiased.options import parse_choice

if TYPE_CHECKING:
    from laplace_debiased.posterior.base import DebiasedPosterior


class temporary_prior:  # noqa: N801
    """Another prior precision inside, the old one outside."""

    def __init__(self, posterior: DebiasedPosterior, prior: float | Tensor | None) -> None:
        self._posterior, self._prior = posterior, prior

    def __enter__(self) -> None:
        self._old = self._posterior.prior_precision
        if self._prior is not None:
            prior = self._prior
            exact = None if isinstance(prior, Tensor) else torch.float64
            self._posterior.prior_precision = torch.as_tensor(prior, dtype=exact)

    def __exit__(self, *exception: object) -> None:
        self._posterior.prior_precision = self._old


def maximise_marginal_likelihood(
    posterior: DebiasedPosterior,
    initial: float | Tensor,
    structure: PriorStructure | str,
    n_steps: int,
    lr: float,
    progress_bar: bool,
) -> Tensor:
    """Gradient ascent on the log marginal likelihood in log prior precision (laplace-torch's).

    Returns:
        The best prior precision met, [1] or one entry per covered parameter tensor. The posterior
        keeps its own prior.

    Raises:
        ValueError: for a diagonal prior structure, or numbers out of range.
        NumericalError: if the marginal likelihood is not finite.
    """
    positive_value("init_prior_prec", initial)
    positive_value("lr", lr)
    n_steps = checked_integer("n_steps", n_steps, 0)
    with torch.inference_mode(False):
        start = torch.as_tensor(initial, dtype=posterior.mean.dtype, device=posterior.mean.device)
        start = start.detach().clone().reshape(-1)
    match parse_choice(PriorStructure, structure, "prior_structure"):
        case PriorStructure.SCALAR:
            pass
        case PriorStructure.LAYERWISE:
            start = start.expand(posterior.n_layers).clone() if len(start) == 1 else start
        case PriorStructure.DIAG:
            start = posterior._diagonal_prior(start)
    with temporary_prior(posterior, start), torch.inference_mode(False), torch.enable_grad():
        log_prior = start.log().requires_grad_(True)
        optimizer = torch.optim.Adam([log_prior], lr=lr)
        best, best_value = start, -math.inf
        for step in tqdm(
            range(n_steps + 1), disable=not progress_bar, desc="[Marginal likelihood]"
        ):
            optimizer.zero_grad()
            value = posterior.log_marginal_likelihood(prior_precision=log_prior.exp())
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
