"""What the debiased low-rank posteriors share, over all weights or the last layer."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor
from torch.utils.data import DataLoader

from laplace_debiased.checks import as_integer
from laplace_debiased.curvature import Coverage
from laplace_debiased.curvature.coverage import parameter_coverage
from laplace_debiased.curvature.lowrank import RowPass
from laplace_debiased.debiasing.bias import BiasReport, bias_report
from laplace_debiased.estimation.fitting import FitRequest, make_plan, scorer
from laplace_debiased.estimation.lowrank_budget import automatic_budget, checked_budget
from laplace_debiased.estimation.lowrank_estimator import LowRankEstimator
from laplace_debiased.estimation.lowrank_fitting import FittedLowRank, fit_low_rank
from laplace_debiased.estimation.walking import first_inputs_of_plan
from laplace_debiased.network.functional import FunctionalNetwork
from laplace_debiased.network.precision import exact_arithmetic
from laplace_debiased.network.rng import preserved_rng
from laplace_debiased.network.watch import ModelWatch
from laplace_debiased.operators import LowRank
from laplace_debiased.posterior.base import Inputs
from laplace_debiased.posterior.configure import Settings
from laplace_debiased.posterior.fitted import FittedPosterior
from laplace_debiased.posterior.lowrank_state import low_rank_from_state, low_rank_to_state
from laplace_debiased.posterior.priors import check_prior_mean
from laplace_debiased.predictive import OutputCovariance
from laplace_debiased.predictive.lowrank import (
    WhitenedFrame,
    diagonal_frame,
    low_rank_moments,
    low_rank_sweep,
    scalar_frame,
)


class LowRankPosterior(FittedPosterior):
    """What the low-rank posteriors share, over all weights or the last layer."""

    H: tuple[Tensor, Tensor] | None
    _fitted: FittedLowRank | None
    _operator: LowRank | None

    def _configure(self, settings: Settings, coverage: Coverage) -> None:
        super()._configure(settings, coverage)
        self._operator = None

    def _init_H(self) -> None:  # noqa: N802
        self.H = None

    # -- hyper-parameters ------------------------------------------------------------------

    def _check_prior_length(self, value: object) -> None:
        if not isinstance(value, Tensor) or value.numel() == 1:
            return
        if value.ndim != 1 or len(value) not in (self.n_layers, self.n_params):
            raise ValueError(
                f"prior_precision has shape {tuple(value.shape)}; a low-rank posterior takes a "
                f"scalar, one entry per covered parameter tensor ({self.n_layers} here: "
                f"{', '.join(self.coverage.covered)}) or one per entry ({self.n_params})."
            )

    def _diagonal_prior(self, start: Tensor) -> Tensor:
        if len(start) == self.n_layers and len(start) > 1:
            sizes = torch.tensor([p.numel() for p in self.params], device=start.device)
            return start.repeat_interleave(sizes)
        return start.expand(self.n_params).clone()

    # -- fitting ---------------------------------------------------------------------------

    def fit(
        self,
        train_loader: DataLoader,
        override: bool = True,
        progress_bar: bool = False,
        *,
        magnitude_loader: DataLoader | None = None,
        n_samples: int | str | None = "auto",
        n_data: int | None = None,
        seed: int = 0,
    ) -> None:
        """Estimate the curvature at the model's weights.

        The rows of all drawn samples are held in memory where they fit (four times
        ``byte_budget``); with a ``rank``, more are taken without rows, by Lanczos.

        Args:
            train_loader: training data; B with a ``magnitude_loader``.
            override: replace an earlier fit; False adds to it, as an average of matrices. With
                ``n_samples`` further samples are drawn and N stays; without, the new data extend
                the training set.
            progress_bar: show progress.
            magnitude_loader: B̃; both loaders are then walked whole.
            n_samples: curvature budget in all, drawn from the training set behind the loader; None
                for everything that the loader yields; "auto" for everything or, without a
                ``rank``, as many samples as fit in memory.
            n_data: N, when it is not the size of the training set behind the loader.
            seed: seed of every draw. The global generators are left as they are.

        Raises:
            ValueError: for bad data, budgets, or arguments that contradict each other.
            NumericalError: for NaN or infinite weights, outputs or curvature.
            An exception of the loader passes through. In all cases the earlier posterior and the
            model are left as they were.
        """
        automatic = n_samples == "auto"
        budget = None if automatic else checked_budget(n_samples)
        request = FitRequest(
            train_loader,
            magnitude_loader,
            budget,
            n_data,
            as_integer("seed", seed),
            override,
            progress_bar,
            self.dict_key_y,
        )
        with (
            self._begin(request) as (options, previous, watch),
            preserved_rng(seed),
            torch.inference_mode(False),
            exact_arithmetic(self._device),
        ):
            coverage = self._candidates(request)
            self._check_against(coverage)
            row_pass = self._make_pass(coverage)
            if automatic and magnitude_loader is None and self._settings.rank is None:
                loss, key = self._loss_model, self.dict_key_y
                budget = automatic_budget(train_loader, row_pass, loss, options, n_data, key)
                request = replace(request, n_samples=budget)
            plan = make_plan(request, options, previous, scorer(row_pass, self._loss_model))
            row_pass.check_samples_are_independent(first_inputs_of_plan(plan))
            estimator = LowRankEstimator(
                row_pass, self._loss_model, options, self._settings.rank, request.seed, progress_bar
            )
            fitted = fit_low_rank(plan, estimator, request, coverage.covered, previous)
            self._take_over(fitted, coverage, watch)

    def _candidates(self, request: FitRequest) -> Coverage:
        """The parameters to cover: what requires gradients now."""
        coverage = parameter_coverage(self._covered_model)
        coverage.require(strict=self._settings.strict)
        return coverage

    def _check_against(self, coverage: Coverage) -> None:
        """Check that the prior fits a coverage, before anything is computed."""
        entries = self._prior_precision.numel()
        if entries not in (1, len(coverage.covered), coverage.n_covered):
            raise ValueError(
                f"prior_precision has {entries} entries, but {len(coverage.covered)} parameter "
                f"tensors with {coverage.n_covered} entries are covered now; set it anew."
            )
        check_prior_mean(self.prior_mean, coverage.n_covered)

    def _make_pass(self, coverage: Coverage) -> RowPass:
        network = FunctionalNetwork(self._covered_model, coverage.covered)
        return RowPass(network, self._settings.options.byte_budget)

    def _adopt(self, fitted: FittedLowRank, coverage: Coverage, watch: ModelWatch) -> None:
        """Take over a finished estimate; nothing here can fail half-way."""
        pairs, n_data = fitted.estimate.pairs, fitted.n_data
        summed = (pairs.eigenvalues * n_data).to(pairs.basis)
        sizes = tuple(coverage.sizes[name] for name in coverage.covered)
        operator = LowRank(pairs.basis, summed, 1.0, sizes)
        row_pass, mean = self._make_pass(coverage), self._map_estimate(coverage)
        self._set_coverage(coverage)
        self._operator, self._pass, self._fitted = operator, row_pass, fitted
        self._watch = watch
        self.H = (pairs.basis, summed)
        self.mean = mean
        self.loss = fitted.estimate.mean_loss * n_data
        self.n_data, self.n_outputs = n_data, fitted.estimate.n_outputs

    @property
    def rank(self) -> int:
        """Number of directions of the fitted posterior.

        Raises:
            NotFittedError: before ``fit``.
        """
        self._check_H_init()
        assert self.H is not None
        return self.H[0].shape[1]

    def bias_report(self) -> BiasReport:
        """Own-batch against other-batch curvature along the directions that were measured.

        From the folds of the fit alone, no further pass.

        Raises:
            NotFittedError: before ``fit``.
            ValueError: under ``scheme="single"``, which has no other batch.
        """
        self._check_H_init()
        assert self._fitted is not None
        pairs = self._fitted.estimate.comparisons
        return bias_report([((own,), (other,)) for own, other in pairs], ("lowrank",))

    # -- the posterior ---------------------------------------------------------------------

    @property
    def posterior_precision(self) -> tuple[tuple[Tensor, Tensor], Tensor]:
        """((U [P, k], h·N·λ [k]), prior diagonal [P]), as laplace-torch gives it."""
        self._check_H_init()
        assert self.H is not None
        return (self.H[0], self._H_factor * self.H[1]), self.prior_precision_diag

    @property
    def precision_operator(self) -> LowRank:
        """The posterior precision (a sum over the training set, prior added) as an operator."""
        self._check_H_init()
        assert self._operator is not None
        prior = self.prior_precision.to(self._operator.dtype)
        return self._operator.scaled(self._H_factor).with_prior(prior)

    @property
    def log_det_posterior_precision(self) -> Tensor:
        """Log-determinant of the posterior precision, 0-d."""
        return self.precision_operator.logdet()

    @property
    def log_det_ratio(self) -> Tensor:
        """Log det P − log det D, 0-d; for a scalar D without the large terms that cancel."""
        self._check_H_init()
        assert self.H is not None
        if self.prior_precision.numel() == 1:
            return torch.log1p(self._H_factor * self.H[1] / self.prior_precision).sum()
        return super().log_det_ratio

    def square_norm(self, value: Tensor) -> Tensor:
        """(θ − mean)ᵀ P (θ − mean) for each θ in [..., P]."""
        return self.precision_operator.square_norm(value - self.mean)

    def functional_variance(self, Js: Tensor) -> Tensor:
        """Covariance [m, C, C] of linearised outputs from Jacobians [m, C, P]."""
        return self.precision_operator.inv_square_form(Js)

    def functional_covariance(self, Js: Tensor) -> Tensor:
        """Joint covariance [m·C, m·C] of linearised outputs from Jacobians [m, C, P]."""
        return self.precision_operator.inv_square_form(Js.flatten(0, 1).unsqueeze(0)).squeeze(0)

    def sample(self, n_samples: int = 100, generator: torch.Generator | None = None) -> Tensor:
        """Weight samples [n_samples, P] from the posterior."""
        operator = self.precision_operator.detach()
        noise = torch.randn(
            n_samples,
            self.n_params,
            device=operator.device,
            dtype=operator.dtype,
            generator=generator,
        )
        return self.mean + operator.sqrt_solve(noise)

    # -- prediction ------------------------------------------------------------------------

    def _scalar_frame(self, prior: Tensor) -> WhitenedFrame:
        assert self._fitted is not None
        assert self.H is not None
        scale = self._curvature_scale()
        return scalar_frame(self._fitted.estimate.pairs, scale, prior.reshape(()).to(scale))

    def _curvature_scale(self) -> Tensor:
        assert self.H is not None
        factor = torch.as_tensor(self._H_factor).detach().reshape(())
        return (factor * self.n_data).to(self.H[0])

    def _frame(self) -> WhitenedFrame:
        assert self._fitted is not None
        assert self.H is not None
        prior = self.prior_precision.detach()
        if prior.numel() == 1:
            return self._scalar_frame(prior)
        diagonal = self.prior_precision_diag.detach().to(self.H[0])
        return diagonal_frame(self._fitted.estimate.pairs, self._curvature_scale(), diagonal)

    def _moments(self, inputs: Inputs, covariance: OutputCovariance) -> tuple[Tensor, Tensor]:
        return low_rank_moments(
            self._pass, self._frame(), inputs, covariance, differentiable=self.enable_backprop
        )

    def _sweep(self, inputs: Inputs, priors: Tensor, diagonal: bool) -> tuple[Tensor, Tensor]:
        frame = self._scalar_frame(torch.ones(()))
        return low_rank_sweep(self._pass, frame, priors, inputs, diagonal=diagonal)

    _to_state = staticmethod(low_rank_to_state)
    _from_state = staticmethod(low_rank_from_state)
