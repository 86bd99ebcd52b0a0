"""What the Kronecker posteriors share: fitting, the precision operator, moments, state."""

from __future__ import annotations

import torch
from laplace.utils.matrix import Kron
from torch import Tensor, nn
from torch.utils.data import DataLoader

from laplace_debiased.checks import as_integer
from laplace_debiased.curvature import (
    BackwardPass,
    Coverage,
    CurvaturePass,
    KroneckerFactors,
    layer_problems,
    layers_of,
)
from laplace_debiased.data import CurvaturePlan
from laplace_debiased.debiasing import scheme_plan
from laplace_debiased.debiasing.bias import BiasReport, bias_report
from laplace_debiased.estimation.backends import (
    BackendFactors,
    block_shape,
    check_backend,
    isolated_copy,
)
from laplace_debiased.estimation.budget import RECOMMENDED_SAMPLES, kron_budget
from laplace_debiased.estimation.checkpoint import DEFAULT_INTERVAL, FitCheckpoint
from laplace_debiased.estimation.fitting import (
    FirstWalk,
    FitRequest,
    FittedKron,
    fit_kron,
    make_plan,
    scorer,
)
from laplace_debiased.estimation.kron_estimator import KronEstimate, KronEstimator
from laplace_debiased.estimation.resuming import opened_checkpoint
from laplace_debiased.estimation.walking import first_inputs_of_plan
from laplace_debiased.files import PathLike
from laplace_debiased.network.locks import model_lock
from laplace_debiased.network.modes import requiring_grad
from laplace_debiased.network.precision import exact_arithmetic
from laplace_debiased.network.rng import preserved_rng
from laplace_debiased.network.watch import ModelWatch
from laplace_debiased.operators import EigenBlock, EigenKron
from laplace_debiased.options import CurvatureOptions, Magnitudes
from laplace_debiased.posterior.base import Inputs
from laplace_debiased.posterior.configure import Settings
from laplace_debiased.posterior.fitted import FittedPosterior
from laplace_debiased.posterior.priors import check_prior_length, check_prior_mean
from laplace_debiased.posterior.state import kron_from_state, kron_to_state
from laplace_debiased.predictive import (
    NamedBlocks,
    OutputCovariance,
    functional_moments,
    prior_sweep,
)


class KronPosterior(FittedPosterior):
    """What the Kronecker posteriors share, over all weights or the last layer."""

    _fitted: FittedKron | None
    _takes_positions = True
    _recommended_samples = RECOMMENDED_SAMPLES

    def _configure(self, settings: Settings, coverage: Coverage) -> None:
        if settings.backend is not None:
            check_backend(settings.backend, self._covered_model, coverage)
        super()._configure(settings, coverage)

    def _init_H(self) -> None:  # noqa: N802
        # laplace-torch allocates dense zero factors here; before a fit there is nothing to hold.
        self.H: EigenKron | None = None

    # -- hyper-parameters ------------------------------------------------------------------

    def _check_prior_length(self, value: object) -> None:
        check_prior_length(value, self.coverage.covered, self.n_params)

    def _diagonal_prior(self, start: Tensor) -> Tensor:
        raise ValueError(
            "a Kronecker posterior takes a scalar or layer-wise prior; use "
            "prior_structure='scalar' or 'layerwise'."
        )

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
        checkpoint: PathLike | None = None,
        checkpoint_interval: float = DEFAULT_INTERVAL,
    ) -> None:
        """Estimate the curvature at the model's weights.

        Args:
            train_loader: training data; B with a ``magnitude_loader``.
            override: replace an earlier fit; False adds to it. With ``n_samples`` further samples
                are drawn and N stays; without, the new data extend the training set.
            progress_bar: show progress.
            magnitude_loader: B̃; both loaders are then walked whole.
            n_samples: curvature budget in all, drawn from the training set behind the loader; None
                for everything that the loader yields; "auto" for 256 (2,048 for a last layer)
                where the loader can be drawn from and holds more, else for everything, as with
                ``override=False`` and ``magnitude_loader``.
            n_data: N, when it is not the size of the training set behind the loader.
            seed: seed of every draw. The global generators are left as they are.
            checkpoint: file for what the fit has so far. The same call goes on from there after a
                crash, loading but not computing the batches behind it, and gives the same
                posterior; on success the file is removed.
            checkpoint_interval: seconds between two writes of it; 0 writes after every batch.

        Raises:
            ValueError: for bad data, budgets, a checkpoint of another fit, or arguments that
                contradict each other.
            NumericalError: for NaN or infinite weights, outputs or curvature.
            CoverageError: if the forward pass shows that nothing can be covered.
            An exception of the loader passes through. In all cases the earlier posterior and the
            model are left as they were.
        """
        budget = kron_budget(
            n_samples,
            train_loader,
            elsewhere=magnitude_loader is not None or not override,
            recommended=self._recommended_samples,
        )
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
        # What a fit keeps must not be inference tensors, even where the caller is in that mode.
        with (
            self._begin(request) as (options, previous, watch),
            preserved_rng(seed),
            torch.inference_mode(False),
            torch.no_grad(),
            exact_arithmetic(self._device),
        ):
            curvature_pass = self._make_pass(self._candidates(request))
            kept = opened_checkpoint(self, checkpoint, checkpoint_interval, request, options, watch)
            score = scorer(curvature_pass, self._loss_model)
            if kept is not None:
                score = kept.scored(score)
            plan = make_plan(request, options, previous, score)
            coverage = self._inspected_coverage(plan)
            if kept is not None:
                kept.bind(plan, covered=list(coverage.covered))
            curvature_pass = self._make_pass(coverage)
            walk, estimator = self._walks(curvature_pass, coverage, options, request, kept)
            fitted = fit_kron(plan, walk, estimator, options, request, coverage.covered, previous)
            self._take_over(fitted, coverage, watch)
            if kept is not None:
                kept.remove()

    def _candidates(self, request: FitRequest) -> Coverage:
        """Parameters that may be covered, as far as it is known before a forward pass."""
        return self._static_coverage

    def _inspected_coverage(self, plan: CurvaturePlan) -> Coverage:
        """Coverage after one look at how the network uses its layers."""
        inputs = first_inputs_of_plan(plan)
        model = self._covered_model
        layers = layers_of(model, self._static_coverage.covered)
        with model_lock(model), requiring_grad(self._tensors_of(self._static_coverage)):
            problems = layer_problems(model, layers, inputs)
        coverage = self._static_coverage.without(problems)
        coverage.require(strict=self._settings.strict)
        check_prior_length(self.prior_precision, coverage.covered, coverage.n_covered)
        check_prior_mean(self.prior_mean, coverage.n_covered)
        return coverage

    def _make_pass(self, coverage: Coverage) -> CurvaturePass:
        layers = layers_of(self.model, coverage.covered)
        return BackwardPass(self.model, layers, self._settings.options.byte_budget)

    def _walks(
        self,
        curvature_pass: CurvaturePass,
        coverage: Coverage,
        options: CurvatureOptions,
        request: FitRequest,
        kept: FitCheckpoint | None,
    ) -> tuple[FirstWalk, KronEstimator | None]:
        estimator = KronEstimator(
            curvature_pass,
            coverage.covered,
            self._loss_model,
            options,
            request.seed,
            request.progress_bar,
            kept,
        )
        if options.magnitudes is not Magnitudes.KFAC:
            return estimator, estimator
        if self._settings.backend is None:
            return estimator, None
        return self._backend_walk(coverage, request), None

    def _backend_walk(self, coverage: Coverage, request: FitRequest) -> FirstWalk:
        assert self._settings.backend is not None
        return BackendFactors(
            self._settings.backend,
            self._backend_kwargs,
            self._asdl_fisher_kwargs,
            lambda: self._isolated_model(coverage),
            coverage.covered,
            tuple(block_shape(parameter) for parameter in self._tensors_of(coverage)),
            self.likelihood,
            self._loss_model,
            (self.dict_key_x, self.dict_key_y),
            request.seed,
            request.progress_bar,
        )

    def _isolated_model(self, coverage: Coverage) -> nn.Module:
        """A copy of the model that a backend may do with as it likes."""
        return isolated_copy(self.model, coverage)

    def _adopt(self, fitted: FittedKron, coverage: Coverage, watch: ModelWatch) -> None:
        """Take over a finished estimate; nothing here can fail half-way."""
        estimate, n_data = fitted.estimate, fitted.n_data
        curvature_sum = EigenKron(_blocks(estimate, float(n_data)))
        factors = Kron(_host_factors(fitted))
        curvature_pass, mean = self._make_pass(coverage), self._map_estimate(coverage)
        self._set_coverage(coverage)
        self.H, self.H_facs = curvature_sum, factors
        self._fitted, self._pass = fitted, curvature_pass
        self._watch = watch
        self.mean = mean
        self.loss = estimate.mean_loss * n_data
        self.n_data, self.n_outputs = n_data, estimate.n_outputs
        self._posterior_scale = None

    def bias_report(self) -> BiasReport:
        """Own-batch against other-batch curvature along the posterior's directions.

        From the folds of the fit alone, no further pass.

        Raises:
            NotFittedError: before ``fit``.
            ValueError: under ``scheme="single"``, which has no other batch.
        """
        self._check_H_init()
        assert self._fitted is not None
        return bias_report(self._fitted.estimate.comparisons, self._fitted.names)

    # -- the posterior ---------------------------------------------------------------------

    @property
    def posterior_precision(self) -> EigenKron:
        """h·N·λ + δ in its eigenbasis, per block (a sum over the training set)."""
        self._check_H_init()
        assert self.H is not None
        return self.H * self._H_factor + self.prior_precision

    def sample(self, n_samples: int = 100, generator: torch.Generator | None = None) -> Tensor:
        """Weight samples [n_samples, P] from the posterior.

        Raises:
            NotFittedError: before ``fit``; no random number is drawn then.
        """
        self._check_H_init()
        return super().sample(n_samples, generator)

    def _blocks(self) -> NamedBlocks:
        return NamedBlocks(self.coverage.covered, self.posterior_precision)

    def _likelihood_blocks(self) -> NamedBlocks:
        assert self.H is not None
        return NamedBlocks(self.coverage.covered, self.H * self._H_factor)

    def _moments(self, inputs: Inputs, covariance: OutputCovariance) -> tuple[Tensor, Tensor]:
        blocks = self._blocks()
        if not self.enable_backprop:
            blocks = NamedBlocks(blocks.names, blocks.precision.detach())
        return functional_moments(
            self._pass, blocks, inputs, covariance, differentiable=self.enable_backprop
        )

    def _sweep(self, inputs: Inputs, priors: Tensor, diagonal: bool) -> tuple[Tensor, Tensor]:
        return prior_sweep(self._pass, self._likelihood_blocks(), priors, inputs, diagonal=diagonal)

    _to_state = staticmethod(kron_to_state)
    _from_state = staticmethod(kron_from_state)


def _blocks(estimate: KronEstimate, scale: float) -> tuple[EigenBlock, ...]:
    """Eigenbasis and magnitudes times ``scale``."""
    return tuple(
        EigenBlock(block.output_basis, block.input_basis, table * scale)
        for block, table in zip(estimate.basis, estimate.tables, strict=True)
    )


def _host_factors(fitted: FittedKron) -> list[list[Tensor]]:
    """The posterior directions' factors as laplace-torch keeps them: [N·B, A] and [N·B]."""
    folds = fitted.estimate.folds
    sizes = tuple(int(fold.n_samples) for fold in folds)
    chosen = scheme_plan(fitted.scheme, sizes).posterior_folds
    merged = KroneckerFactors.merge([folds[index] for index in chosen])
    return [
        [block.output * fitted.n_data]
        if block.input is None
        else [block.output * fitted.n_data, block.input]
        for block in merged.blocks
    ]
