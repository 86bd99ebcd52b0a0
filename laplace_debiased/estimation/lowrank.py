"""The low-rank structure: eigenpairs of the curvature over all covered parameters."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from laplace_debiased.curvature import Coverage
from laplace_debiased.curvature.coverage import parameter_coverage
from laplace_debiased.curvature.lowrank.over_ranks import pairs_of_first
from laplace_debiased.curvature.lowrank.rows import FeatureRowPass, RowPass
from laplace_debiased.curvature.lowrank.span import Eigenpairs, matrix_average
from laplace_debiased.data.loaders import can_draw, loader_length, sampler_indices
from laplace_debiased.estimation.arguments import Arguments, FitRequest
from laplace_debiased.estimation.lowrank_estimator import LowRankEstimator, max_gram_rows
from laplace_debiased.estimation.plan import first_inputs_of_loader
from laplace_debiased.estimation.structure import Fit, Task
from laplace_debiased.estimation.target import Target
from laplace_debiased.estimation.walking import columns_per_sample
from laplace_debiased.likelihoods import LossModel
from laplace_debiased.network.functional import FunctionalNetwork
from laplace_debiased.options import Scheme
from laplace_debiased.predictive import LowRankPredictor, Predictor


@dataclass(frozen=True, eq=False)
class LowRankStructure:
    """Leading eigenpairs, of any differentiable network."""

    arguments: Arguments
    takes_positions = False
    resumes = False

    def coverage(self, target: Target, chosen: Coverage | None = None) -> Coverage:
        """What requires gradients now."""
        if target.last_layer is not None:
            return target.last_layer_coverage(chosen)
        return parameter_coverage(target.model)

    def engine(self, target: Target, coverage: Coverage) -> RowPass:
        """Rows by backward passes; for a last layer from its features."""
        network = FunctionalNetwork(target.model, coverage.covered)
        byte_budget = self.arguments.options.byte_budget
        if target.last_layer is None:
            return RowPass(network, byte_budget)
        features = target.feature_pass(coverage, byte_budget)
        return FeatureRowPass(network=network, byte_budget=byte_budget, feature_pass=features)

    def recommended_samples(
        self, engine: RowPass, request: FitRequest, loss: LossModel
    ) -> int | None:
        """Without a rank as many as fit in memory, with one everything."""
        if self.arguments.rank is not None:
            return None
        inputs = first_inputs_of_loader(request.train_loader, request.keys)
        if inputs is None:
            raise ValueError("train_loader is empty.")
        loader = request.train_loader
        n_data = loader_length(loader, request.n_data)
        if can_draw(loader):
            n_data = min(n_data, len(sampler_indices(loader)))
        options = self.arguments.options_for(request)
        outputs, n_folds = engine.outputs(inputs)[:1], len(options.fold_fractions)
        n_columns = columns_per_sample(options, options.sketched(outputs[0].numel()))
        if n_columns is None:
            n_columns = loss.hessian_root(outputs).shape[-1]
        fitting = max_gram_rows(engine, options.byte_budget) // n_columns
        if n_data <= fitting:
            return None
        if fitting < n_folds:
            raise ValueError(
                f"the curvature rows of {n_folds} samples do not fit byte_budget="
                f"{options.byte_budget}. Pass a larger byte_budget, or a rank: that many leading "
                "directions are then found without rows."
            )
        return fitting

    def inspect(self, engine: RowPass, target: Target, inputs: Any, coverage: Coverage) -> Coverage:
        """Nothing is excluded; samples that depend on each other are an error."""
        engine.check_samples_are_independent(inputs)
        return coverage

    def estimate(self, engine: RowPass, task: Task) -> Fit:
        """Directions, magnitudes along them, and the schemes' averages.

        Fits are averaged as matrices, weighted by the number of draws (same N), or by N where the
        new data extend the training set, and decomposed again.
        """
        earlier = task.earlier
        estimator = LowRankEstimator(engine, task, self.arguments.rank)
        survey = estimator.survey()
        pairs, comparisons = estimator.estimate(survey)
        if task.options.scheme is Scheme.SINGLE:
            comparisons = []
        if earlier is not None:
            weights, rank = task.weights(earlier), self.arguments.rank
            shares, parts = [w / sum(weights) for w in weights], (earlier.curvature, pairs)
            pairs = pairs_of_first(task.ranks, lambda: matrix_average(parts, shares, rank))
            comparisons = [*earlier.comparisons, *comparisons]
        return task.result(pairs, comparisons, survey.tally)

    def predictor(self, engine: RowPass, fit: Fit) -> Predictor:
        """From the eigenpairs of the mean."""
        sizes = tuple(fit.coverage.sizes[name] for name in fit.coverage.covered)
        return LowRankPredictor(engine, fit.curvature, fit.n_data, sizes)

    def to_state(self, fit: Fit) -> dict[str, Any]:
        """Eigenpairs."""
        pairs: Eigenpairs = fit.curvature
        return {"H": [pairs.basis.clone(), pairs.eigenvalues.clone()]}

    def from_state(self, state: Mapping[str, Any], device: torch.device) -> Eigenpairs:
        """Curvature of :meth:`to_state`.

        Raises:
            ValueError: if the basis does not fit its eigenvalues or the parameters, or they are no
                eigenpairs of a curvature.
        """
        basis, eigenvalues = (tensor.to(device) for tensor in state["H"])
        if basis.ndim != 2 or basis.shape != (len(state["mean"]), len(eigenvalues)):
            raise ValueError(
                f"the state's basis {list(basis.shape)} does not fit its {len(eigenvalues)} "
                f"eigenvalues and {len(state['mean'])} parameter entries."
            )
        finite = all(bool(torch.isfinite(one).all()) for one in (basis, eigenvalues))
        if not finite or bool((eigenvalues < 0).any()):
            raise ValueError("the state's eigenpairs are not finite, or one is negative.")
        return Eigenpairs(basis, eigenvalues)
