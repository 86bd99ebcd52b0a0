"""The choice of the prior precision, as a method that all debiased posteriors have."""

from __future__ import annotations

import warnings
from collections.abc import Callable

import torch
import torchmetrics
from laplace.utils.enums import LinkApprox, PredType, PriorStructure, TuningMethod
from torch import Tensor
from torch.utils.data import DataLoader

from laplace_debiased.data.loaders import loader_generators
from laplace_debiased.network.precision import exact_arithmetic
from laplace_debiased.network.rng import preserved_rng
from laplace_debiased.options import parse_choice
from laplace_debiased.posterior.base import DebiasedPosterior
from laplace_debiased.tuning.grid import GridSearch, PriorGrid
from laplace_debiased.tuning.marglik import maximise_marginal_likelihood


class TunablePosterior(DebiasedPosterior):
    """A posterior whose prior precision follows validation data or the marginal likelihood."""

    def optimize_prior_precision(
        self,
        pred_type: PredType | str = PredType.GLM,
        method: TuningMethod | str | None = None,
        n_steps: int = 100,
        lr: float = 1e-1,
        init_prior_prec: float | Tensor = 1.0,
        prior_structure: PriorStructure | str = PriorStructure.SCALAR,
        val_loader: DataLoader | None = None,
        loss: torchmetrics.Metric | Callable[..., Tensor | float] | None = None,
        log_prior_prec_min: float = -4,
        log_prior_prec_max: float = 4,
        grid_size: int = 100,
        link_approx: LinkApprox | str = LinkApprox.PROBIT,
        n_samples: int = 100,
        verbose: bool = False,
        progress_bar: bool = False,
        log_prior_prec_base: float = 10.0,
        *,
        refine: bool = True,
        seed: int = 0,
    ) -> None:
        """Choose the prior precision on validation data, or by the marginal likelihood.

        A grid search leaves ``tuning_result`` and ``tuned_link_approx``, the link that predictions
        then use; "marglik" leaves None in both. Like the prior precision they stay through a new
        ``fit``, which does not tune: call this again for the new curvature. The search warns where
        its best prior predicts the validation data worse than the MAP model does (by more than
        1e-4 nats per sample): then the posterior costs accuracy of the probabilities.

        Args:
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
            log_prior_prec_min: exponent of the grid's lower end.
            log_prior_prec_max: exponent of its upper end.
            grid_size: number of grid points.
            link_approx: how probabilities are approximated; remembered for predictions.
            n_samples: draws for "mc" and "nn".
            verbose: print the result.
            progress_bar: show progress.
            log_prior_prec_base: base of the grid's exponents.
            refine: search on between the best grid point's neighbours, at no further pass.
            seed: seed of the draws for "mc" and "nn", the same at every grid point.

        Raises:
            ValueError: for impossible arguments.
            NumericalError: if no grid point has a finite loss. The prior is left as it was.
            ModelChangedError: if the model is no longer the one of the fit.
        """
        self._check_H_init()
        self._check_model()
        pred = parse_choice(PredType, pred_type, "pred_type")
        if method is None:
            method = TuningMethod.MARGLIK if val_loader is None else TuningMethod.GRIDSEARCH
        match parse_choice(TuningMethod, method, "method"):
            case TuningMethod.MARGLIK:
                if val_loader is not None:
                    warnings.warn(
                        "method='marglik' does not read val_loader; use method='gridsearch'.",
                        UserWarning,
                        stacklevel=2,
                    )
                best = maximise_marginal_likelihood(
                    self, init_prior_prec, prior_structure, n_steps, lr, progress_bar
                )
                self.prior_precision = best
                self.tuning_result, self.tuned_link_approx = None, None
            case TuningMethod.GRIDSEARCH:
                link = self._checked_link(link_approx)
                if pred is PredType.NN:
                    link = LinkApprox.MC
                if val_loader is None:
                    raise ValueError("method='gridsearch' needs a val_loader.")
                if not hasattr(val_loader, "__iter__"):
                    raise TypeError(
                        "val_loader must be a DataLoader or an iterable of batches; got "
                        f"{type(val_loader).__name__}."
                    )
                grid = PriorGrid(
                    log_prior_prec_min, log_prior_prec_max, grid_size, log_prior_prec_base
                )
                search = GridSearch(self, grid, pred, link, n_samples, loss, refine, seed)
                with (
                    preserved_rng(None, generators=loader_generators(val_loader)),
                    exact_arithmetic(self._device),
                ):
                    result = search.run(val_loader, progress_bar)
                result.warn_on_edge()
                result.warn_if_worse()
                self.prior_precision = torch.as_tensor(result.prior_precision, dtype=torch.float64)
                self.tuning_result = result
                self.tuned_link_approx = link
                self._warned_about_link = False
        if verbose:
            print(f"Optimized prior precision is {self.prior_precision}.")
