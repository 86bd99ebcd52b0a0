"""Choosing the prior precision by the marginal likelihood of the training data."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor
from tqdm import tqdm

from laplace_debiased.checks import checked_integer, positive_value
from laplace_debiased.errors import NumericalError
from laplace_debiased.network.grad_modes import outside_inference_mode


def maximise_marginal_likelihood(
    evidence: Callable[[Tensor], Tensor],
    start: Tensor,
    n_steps: int,
    lr: float,
    progress_bar: bool,
) -> Tensor:
    """Gradient ascent on the log marginal likelihood in log prior precision (laplace-torch's).

    Args:
        evidence: log marginal likelihood of a prior precision, differentiable in it.
        start: prior precision to begin with, [1] or one entry per covered parameter tensor.
        n_steps: gradient steps.
        lr: their size.
        progress_bar: show progress.

    Returns:
        The best prior precision met, [1] or one entry per covered parameter tensor.

    Raises:
        ValueError: for numbers out of range.
        NumericalError: if the marginal likelihood is not finite.
    """
    positive_value("lr", lr)
    n_steps = checked_integer("n_steps", n_steps, 0)
    with outside_inference_mode(), torch.enable_grad():
        log_prior = start.log().requires_grad_(True)
        optimizer = torch.optim.Adam([log_prior], lr=lr)
        best, best_value = start, -math.inf
        for step in tqdm(
            range(n_steps + 1), disable=not progress_bar, desc="[Marginal likelihood]"
        ):
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
