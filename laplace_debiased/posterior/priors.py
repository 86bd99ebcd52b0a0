"""Priors: what fits a posterior, their evidence, and their choice."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
import torchmetrics
from laplace.baselaplace import ParametricLaplace
from laplace.utils.enums import LinkApprox, PredType, PriorStructure, TuningMethod
from torch import Tensor
from torch.utils.data import DataLoader

from laplace_debiased.checks import checked_flag, positive_value, shortened
from laplace_debiased.curvature import Coverage
from laplace_debiased.errors import ArgumentTypeError, NotFittedError
from laplace_debiased.estimation.plan import training_sample
from laplace_debiased.likelihoods import LikelihoodName
from laplace_debiased.network.interrupts import unbroken, uninterrupted
from laplace_debiased.network.memory import working_memory
from laplace_debiased.network.modes import public_call
from laplace_debiased.network.precision import exact_arithmetic
from laplace_debiased.options import Positions
from laplace_debiased.parallel.ranks import Ranks
from laplace_debiased.posterior.predicting import selection_of
from laplace_debiased.posterior.shell import Shell
from laplace_debiased.predictive.call import checked_positions, checked_pred_type
from laplace_debiased.tuning import GridSearch, PriorGrid, Subject, Validation
from laplace_debiased.tuning.marglik import (
    N_SAMPLES,
    by_evidence,
    tuning_method,
    warn_if_harmful,
)


def check_prior(value: object, coverage: Coverage, *, takes_diagonal: bool) -> None:
    """Check that a prior precision is scalar or has one entry per covered parameter tensor.

    With ``takes_diagonal`` there may be one per covered entry, too.

    Raises:
        ValueError: naming the tensors it would have to match.
    """
    if not isinstance(value, Tensor) or value.numel() == 1:
        return
    names = coverage.covered
    lengths = (len(names), *((coverage.n_covered,) if takes_diagonal else ()))
    if value.ndim != 1 or len(value) not in lengths:
        other = f", or one per entry ({coverage.n_covered})" if takes_diagonal else ""
        raise ValueError(
            f"prior_precision has shape {tuple(value.shape)}; this posterior takes a scalar or "
            f"one entry per covered parameter tensor, {len(names)} here: "
            f"{', '.join(names)}{other}."
        )


def check_prior_mean(value: object, n_params: int | None) -> None:
    """Check that a prior mean is finite, and scalar or one entry per covered parameter entry.

    ``n_params`` is their number, None while it is not known.

    Raises:
        ArgumentTypeError: if it is neither a number nor a tensor of real ones.
        ValueError: if it is not finite, or of another length.
    """
    if isinstance(value, bool) or not isinstance(value, int | float | Tensor):
        raise ArgumentTypeError(f"prior_mean must be numbers; got {type(value).__name__}.")
    value = value if isinstance(value, Tensor) else torch.tensor(float(value))
    if value.is_complex() or value.is_meta or value.layout is not torch.strided:
        raise ArgumentTypeError("prior_mean must be real, dense and hold data.")
    if not bool(torch.isfinite(value).all()):
        raise ValueError(f"prior_mean must be finite; got {shortened(value.detach())}.")
    if n_params is not None and value.numel() not in (1, n_params):
        raise ValueError(
            f"prior_mean has {value.numel()} entries; {n_params} parameter entries are covered. "
            "Pass a scalar, or one entry per covered parameter entry (see la.coverage)."
        )


@public_call
def log_marginal_likelihood(
    self: Shell,
    prior_precision: Tensor | None = None,
    sigma_noise: Tensor | None = None,
) -> Tensor:
    """Laplace approximation of the log marginal likelihood, differentiable in both arguments.

    As in laplace-torch, values that are passed stay set; not so if they are refused.

    Raises:
        NotFittedError: before ``fit``.
        ValueError: for values that are not positive, or a sigma in classification.
    """
    self._check_H_init()
    before = self._checked_prior(), self._sigma_noise
    if sigma_noise is not None:
        positive_value("sigma_noise", sigma_noise, single=True)
        if self.likelihood != LikelihoodName.REGRESSION:
            raise ValueError("sigma_noise is for likelihood='regression' only.")
    try:
        return ParametricLaplace.log_marginal_likelihood(self, prior_precision, sigma_noise)
    except BaseException:
        self._prior_precision, self._sigma_noise = before
        raise


def log_prob(self: Shell, value: Tensor, normalized: bool = True) -> Tensor:
    """Log density of a weight vector [P]; before a fit under the prior, as in laplace-torch.

    Args:
        self: a posterior.
        value: covered weights, flat.
        normalized: with the normalising constant.

    Raises:
        NotFittedError: before ``fit``, while the last layer is not known.
        ValueError: if ``value`` does not have one entry per covered weight.
    """
    if self._coverage is None:
        raise NotFittedError("the last layer is not known yet: call fit(train_loader) first.")
    check_value(self, value)
    if self._fit is not None:
        return ParametricLaplace.log_prob(self, value, normalized)
    precision = self.prior_precision_diag
    square = (precision * (value - self.prior_mean).square()).sum()
    constant = precision.log().sum() - self.n_params * math.log(2 * math.pi)
    return 0.5 * (constant - square) if normalized else -0.5 * square


def check_value(self: Shell, value: object, *, one: bool = True) -> None:
    """Check that a value of the covered weights is one [P], or holds several [..., P].

    Raises:
        ValueError: if not.
    """
    shape = tuple(value.shape) if isinstance(value, Tensor) else ()
    if shape[-1:] != (self.n_params,) or (one and len(shape) != 1):
        got = f"shape {shape}" if isinstance(value, Tensor) else type(value).__name__
        raise ValueError(
            f"value must be a tensor with one entry per covered weight, [{self.n_params}]; got "
            f"{got}."
        )


def prior_precision_diag(self: Shell) -> Tensor:
    """Prior precision of every covered entry [P]."""
    prior = self.prior_precision.to(self.mean)
    if len(prior) == 1:
        return prior.expand(self.n_params)
    if len(prior) == self.n_params:
        return prior
    sizes = torch.tensor([parameter.numel() for parameter in self.params], device=prior.device)
    return prior.repeat_interleave(sizes)


def loss_scale(self: Shell) -> Tensor:
    """What the curvature is multiplied by, h = 1/(σ² temperature).

    Raises:
        ValueError: if it is zero or infinite in the posterior's dtype.
    """
    exact = 1 / self.sigma_noise.double().square() / self.temperature
    positive_value("1 / (sigma_noise² · temperature)", exact, self._dtype)
    return 1 / self.sigma_noise.square() / self.temperature


@public_call
def optimize_prior_precision(
    self: Shell,
    pred_type: PredType | str = PredType.GLM,
    method: TuningMethod | str | None = None,
    n_steps: int = 100,
    lr: float = 1e-1,
    init_prior_prec: float | Tensor = 1.0,
    prior_structure: PriorStructure | str = PriorStructure.SCALAR,
    val_loader: DataLoader | None = None,
    loss: torchmetrics.Metric | Callable[..., Tensor | float] | None = None,
    log_prior_prec_min: float | None = None,
    log_prior_prec_max: float | None = None,
    grid_size: int | None = None,
    link_approx: LinkApprox | str | None = None,
    n_samples: int | None = None,
    verbose: bool = False,
    progress_bar: bool = False,
    log_prior_prec_base: float = 10.0,
    *,
    refine: bool = True,
    seed: int = 0,
    positions: Positions | str = Positions.ALL,
) -> None:
    """Choose prior precision and link on validation data, or the prior by the marginal likelihood.

    A grid search scores every prior precision under every link, in one pass over the validation
    data, and goes as far beyond 1e-4 and 1e4 as the loss asks. It leaves ``tuning_result`` (which
    also has the MAP model's loss, and that of a posterior without curvature) and
    ``tuned_link_approx``, the link that predictions then use; "marglik" leaves None in both. Like
    the prior precision they stay through a new ``fit``, which does not tune: call this again for
    the new curvature. The search warns where no prior predicts the validation data better than the
    MAP model does (by 1e-4 nats per sample). After "marglik" some training samples are predicted
    (of a posterior that was fitted, not loaded), with a warning where its prior does harm.

    Args:
        self: a fitted posterior.
        pred_type: prediction whose loss is compared.
        method: "gridsearch" or "marglik"; None means "gridsearch" with a ``val_loader``, else
            "marglik".
        n_steps: gradient steps of "marglik".
        lr: their step size, on log prior precision.
        init_prior_prec: where "marglik" starts.
        prior_structure: "scalar" or "layerwise" (one entry per covered parameter tensor).
        val_loader: validation data for "gridsearch".
        loss: torchmetrics metric or callable. By default the mean negative log likelihood:
            of the probabilities in classification, of a Gaussian with variance epistemic + σ²
            in regression.
        log_prior_prec_min: exponent of the grid's lower end; None for -4 and as far below as the
            loss asks (sampled networks: -4).
        log_prior_prec_max: exponent of its upper end; None for 4 and as far above.
        grid_size: grid points between these ends; None for two per decade.
        link_approx: how probabilities are approximated; None for the better one of "mc" and
            "probit".
        n_samples: points of "mc" (as many as are accurate by default), networks of "nn" (100).
        verbose: print the result.
        progress_bar: show progress.
        log_prior_prec_base: base of the grid's exponents.
        refine: search on between the best grid point's neighbours, at no further pass.
        seed: seed of the sampled networks, the same at every grid point.
        positions: of sequences "all", whose labels all count, or "last" for "gridsearch": only the
            last position is predicted and scored (the last that an ``attention_mask`` attends to).

    Raises:
        ValueError: for impossible arguments.
        NumericalError: if no grid point has a finite loss. The prior is left as it was.
        ModelChangedError: if the model is no longer the one of the fit.
    """
    ranks = Ranks.present(self._device)
    with ranks.together("optimize_prior_precision"):
        self._check_H_init()
        self._check_model()
        pred = checked_pred_type(pred_type)
        checked_flag("verbose", verbose)
        shows = checked_flag("progress_bar", progress_bar) and ranks.is_first
        at = checked_positions(positions, pred)
        how = tuning_method(method, val_loader, at)
        grid = log_prior_prec_min, log_prior_prec_max, grid_size, log_prior_prec_base
        given = {
            "model": self.fitted.model.digest,
            "fit": (self.fitted.n_samples, self.fitted.n_data, self.fitted.mean_loss),
            "grid": str(grid),
            "arguments": str((pred, how, link_approx, loss is None, n_samples, refine, seed, at)),
        }
        ranks.agree("optimize_prior_precision", given)
        result = link = None
        if how is TuningMethod.MARGLIK:
            best = _by_evidence(self, init_prior_prec, prior_structure, n_steps, lr, shows, ranks)
        else:
            validation = Validation(subject_of(self, at), val_loader, loss, ranks)
            search = GridSearch(
                validation, PriorGrid(*grid), pred, link_approx, n_samples, refine, seed
            )
            result = search.run(shows)
            if ranks.is_first:
                result.warn()
            link = result.link or search.links[0]
            best = torch.as_tensor(result.prior_precision, dtype=torch.float64)
        ranks.meet("the end of the tuning")
        with uninterrupted():
            self.prior_precision = best
            vars(self)["tuning_result"] = result
            self.tuned_link_approx = link
            self._warned_about_link = False
    if verbose and ranks.is_first:
        print(f"Optimized prior precision is {self.prior_precision}.")


def _by_evidence(
    self: Shell,
    initial: float | Tensor,
    structure: PriorStructure | str,
    n_steps: int,
    lr: float,
    shows: bool,
    ranks: Ranks,
) -> Tensor:
    """The prior of the largest marginal likelihood; a warning if it harms training samples.

    A posterior from a file knows none, and sampled rewards have no likelihood to compare.
    """

    def evidence(prior: Tensor) -> Tensor:
        with _prior_set_to(self, prior):
            return self.log_marginal_likelihood()

    best = by_evidence(
        evidence,
        initial,
        structure,
        self.mean,
        tuple(parameter.numel() for parameter in self.params),
        takes_diagonal=self._takes_diagonal_prior,
        n_steps=n_steps,
        lr=lr,
        progress_bar=shows,
    )
    [best] = ranks.from_first("the prior precision", lambda: [best])
    has_likelihood = self.likelihood != LikelihoodName.REWARD_MODELING
    if ranks.is_first and has_likelihood and self._fitted_on is not None:
        with _prior_set_to(self, best):
            precision = self._precision(differentiable=False)
        with exact_arithmetic(self._device):
            batches = training_sample(self._fitted_on, N_SAMPLES)
            warn_if_harmful(Validation(subject_of(self), batches, None), best, precision)
    return best


def subject_of(self: Shell, positions: Positions = Positions.ALL) -> Subject:
    """What a tuning sees of the posterior, at some positions of sequences."""
    sigma = float(torch.as_tensor(self.sigma_noise).detach())
    return Subject(
        self.predictor,
        self.likelihood,
        self._arguments.loss(positions=self._structure.takes_positions),
        torch.as_tensor(self._H_factor).detach(),
        sigma * sigma,
        self._device,
        self._dtype,
        self._keys,
        self._target.model,
        partial(_sampled_at, self),
        selection_of(self._arguments, self.fitted, positions),
        self.fitted.n_outputs,
        working_memory(self._arguments.options.byte_budget, self._device),
    )


def _sampled_at(
    self: Shell, prior: float, inputs: Any, n_samples: int, generator: torch.Generator
) -> Tensor | tuple[Tensor, Tensor]:
    """Prediction of sampled networks under another prior."""
    with _prior_set_to(self, torch.tensor(prior, dtype=torch.float64)):
        return self(
            inputs,
            pred_type=PredType.NN,
            n_samples=n_samples,
            generator=generator,
            fitting=True,
        )


@unbroken
def _prior_set_to(self: Shell, prior: Tensor) -> Iterator[None]:
    before = self._prior_precision
    try:
        self.prior_precision = prior
        yield
    finally:
        self._prior_precision = before
