"""Kronecker factors from laplace-torch's own curvature backends, checked and isolated.

The backends differ in what they leave behind (hooks, gradients, reseeded generators) and in what
they get silently wrong, so each runs on a copy of the model and its factors are checked block by
block before they are used.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from laplace.curvature.backpack import BackPackInterface
from laplace.curvature.curvature import CurvatureInterface, EFInterface
from laplace.curvature.curvlinops import CurvlinopsGGN
from laplace.utils.feature_extractor import FeatureExtractor
from torch import Tensor, nn

from laplace_debiased.curvature import BlockFactors, Coverage, KroneckerFactors, host_coverage
from laplace_debiased.curvature.over_ranks import Key, summed_factors
from laplace_debiased.curvature.rows.gram import dense
from laplace_debiased.data.sources import Batch
from laplace_debiased.estimation.arguments import Backend
from laplace_debiased.estimation.kron_estimator import FoldStatistics
from laplace_debiased.estimation.structure import Task
from laplace_debiased.estimation.tally import Tally
from laplace_debiased.estimation.target import Target
from laplace_debiased.estimation.walking import rows_of
from laplace_debiased.network.inputs import to_device
from laplace_debiased.network.rng import preserved_rng

_SEED_STEP = 1_000_003
"""Spreads the seeds of successive batches, so that no two share their label draws."""


def check_backend(backend: type[CurvatureInterface], model: nn.Module, coverage: Coverage) -> None:
    """Refuse combinations for which a backend is known to be wrong.

    Raises:
        ValueError: with the reason and what to use.
    """
    for layer in host_coverage(model)[1]:
        if not {layer.weight, layer.bias} & set(coverage.covered):
            continue
        module = layer.module
        if issubclass(backend, BackPackInterface) and isinstance(module, nn.Conv2d):
            raise ValueError(
                f"{backend.__name__}'s Kronecker factors are wrong for convolutions "
                f"({layer.name!r}); use backend=None or CurvlinopsGGN."
            )
        has_bias = isinstance(getattr(module, "bias", None), nn.Parameter)
        if layer.weight is None or (has_bias and layer.bias is None):
            raise ValueError(
                f"{backend.__name__} needs the weight and the bias of {layer.name!r} both "
                "trainable or both frozen; use backend=None."
            )


@dataclass(frozen=True, eq=False)
class BackendFactors:
    """First walk over a plan through a laplace-torch backend."""

    backend: Backend
    task: Task

    def fold_statistics(self) -> FoldStatistics:
        """Factors of every fold as means over its samples, and the loss.

        Raises:
            RuntimeError: if the backend returns blocks that do not fit the covered parameters.
        """
        task, arguments, ranks = self.task, self.task.arguments, self.task.ranks
        model = isolated_network(task.target, task.coverage)
        engine = self.backend.kind(
            model,
            arguments.likelihood,
            dict_key_x=arguments.dict_key_x,
            dict_key_y=arguments.dict_key_y,
            **self.backend.kwargs,
            **({} if task.target.last_layer is None else {"last_layer": True}),
        )
        sums: dict[Key, Tensor] = {}
        tally, n_calls = Tally(), ranks.rank
        for batch in task.clock.walk(task.plan.share(ranks), "factors"):
            for fold in batch.folds.unique().tolist():
                part = batch.select((batch.folds == fold).nonzero().squeeze(-1))
                seed = task.request.seed + _SEED_STEP * n_calls
                with preserved_rng(seed), torch.enable_grad():
                    kfacs = self._call(engine, model, part, seed, tally)
                for name, factors in zip(task.coverage.covered, kfacs, strict=True):
                    for side, factor in zip(("rows", "columns"), factors, strict=False):
                        key = (fold, side, name)
                        sums[key] = sums[key] + factor if key in sums else factor
                n_calls += ranks.world
        tally = tally.over_ranks(ranks)
        tally.require_usable(task.loss)
        found = summed_factors(ranks, sums)
        means = {key: dense(f) / task.plan.fold_sizes[key[0]] for key, f in found.items()}
        return FoldStatistics(
            tuple(self._factors(means, fold, n) for fold, n in enumerate(task.plan.fold_sizes)),
            tally,
        )

    def _factors(self, means: Mapping[Key, Tensor], fold: int, size: int) -> KroneckerFactors:
        return KroneckerFactors(
            tuple(
                BlockFactors(name, means[fold, "rows", name], means.get((fold, "columns", name)))
                for name in self.task.coverage.covered
            ),
            size,
        )

    def _call(
        self, engine: CurvatureInterface, model: nn.Module, part: Batch, seed: int, tally: Tally
    ) -> list[list[Tensor]]:
        """Factors summed over samples, which the tally counts."""
        device = next(model.parameters()).device
        inputs, part = to_device(part.inputs, device), rows_of(part, slice(None), device)
        targets = part.targets
        with torch.no_grad():
            outputs = model(inputs)
        self.task.loss.check_targets(outputs, targets)
        tally.add(self.task.loss, outputs, part)
        model.output_size = outputs.shape[-1]  # read by BackPACK's interface
        kwargs = dict(self.backend.kron_kwargs)
        if isinstance(engine, CurvlinopsGGN) and engine.stochastic:
            # Its own default is one fixed seed: every batch would draw the same labels.
            kwargs.setdefault("seed", seed)
        model.zero_grad()
        _, kron = engine.kron(inputs, targets, N=len(targets), **kwargs)
        shapes = [tuple(len(factor) for factor in block) for block in kron.kfacs]
        parameters = self.task.target.parameters(self.task.coverage)
        needed = [tuple(p.flatten(1).shape) if p.ndim > 1 else (len(p),) for p in parameters]
        if shapes != needed:
            raise RuntimeError(
                f"{self.backend.kind.__name__} returned Kronecker blocks {shapes} where the "
                f"parameters need {needed}; use backend=None."
            )
        # Every empirical-Fisher backend is twice the true one in regression.
        doubled = isinstance(engine, EFInterface) and self.task.arguments.likelihood == "regression"
        return [
            [output.detach() / (2.0 if doubled else 1.0), *(a.detach() * len(part) for a in mean)]
            for output, *mean in kron.kfacs
        ]


def isolated_network(target: Target, coverage: Coverage) -> nn.Module:
    """A copy that a backend may do with as it likes; only the covered parameters need gradients.

    In evaluation mode; of a last layer in laplace-torch's own feature extractor.
    """
    duplicate = copy.deepcopy(target.model).eval()
    covered = frozenset(coverage.covered)
    for name, parameter in duplicate.named_parameters():
        parameter.requires_grad_(name in covered)
        parameter.grad = None
    if target.last_layer is None:
        return duplicate
    extractor = FeatureExtractor(
        duplicate,
        last_layer_name=target.last_layer.name,
        feature_reduction=target.last_layer.reduction,
    )
    return extractor.eval()
