"""Kronecker factors from laplace-torch's own curvature backends, checked and isolated.

The backends differ in what they leave behind (hooks, gradients, reseeded generators) and in what
they get silently wrong, so each runs on a copy of the model and its factors are checked block by
block before they are used.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from laplace.curvature.backpack import BackPackInterface
from laplace.curvature.curvature import CurvatureInterface, EFInterface
from laplace.curvature.curvlinops import CurvlinopsGGN
from laplace.utils.feature_extractor import FeatureExtractor
from torch import Tensor, nn

from laplace_debiased.curvature import BlockFactors, Coverage, KroneckerFactors, host_coverage
from laplace_debiased.curvature.over_ranks import Key, summed_factors
from laplace_debiased.curvature.rows.gram import Factor, scaled
from laplace_debiased.data import Batch
from laplace_debiased.estimation.arguments import Arguments, Backend
from laplace_debiased.estimation.kron_estimator import FoldStatistics
from laplace_debiased.estimation.structure import Task
from laplace_debiased.estimation.target import Target
from laplace_debiased.network.inputs import to_device
from laplace_debiased.network.rng import preserved_rng
from laplace_debiased.options import Fisher
from laplace_debiased.parallel import Ranks

_SEED_STEP = 1_000_003
"""Spreads the seeds of successive batches, so that no two share their label draws."""


def backend_fisher(backend: type[CurvatureInterface], backend_kwargs: Mapping[str, Any]) -> Fisher:
    """The Fisher type that a backend computes.

    Raises:
        ValueError: if it is neither a GGN, nor a Monte-Carlo nor an empirical Fisher.
    """
    if issubclass(backend, EFInterface):
        return Fisher.EMPIRICAL
    if "GGN" in backend.__name__:
        return Fisher.MC if backend_kwargs.get("stochastic", False) else Fisher.TYPE2
    raise ValueError(
        f"backend {backend.__name__} has no Kronecker factors of a GGN or Fisher matrix; use "
        "CurvlinopsGGN, CurvlinopsEF, BackPackGGN, AsdlGGN or AsdlEF, or backend=None."
    )


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
    """First walk over a plan through a laplace-torch backend.

    Args:
        backend: the backend with its arguments.
        task: what the fit works on.
        arguments: what the posterior was asked for.
    """

    backend: Backend
    task: Task
    arguments: Arguments

    def fold_statistics(self) -> FoldStatistics:
        """Factors of every fold as means over its samples, and the loss.

        Raises:
            RuntimeError: if the backend returns blocks that do not fit the covered parameters.
        """
        plan, request, ranks = self.task.plan, self.task.request, self.task.ranks
        model = isolated_network(self.task.target, self.task.coverage)
        engine = self.backend.kind(
            model,
            self.arguments.likelihood,
            dict_key_x=self.arguments.dict_key_x,
            dict_key_y=self.arguments.dict_key_y,
            **self._engine_kwargs(),
        )
        sums: list[list[KroneckerFactors]] = [[] for _ in plan.fold_sizes]
        loss, n_outputs, n_calls = 0.0, 0, ranks.rank
        for batch in self.task.clock.walk(plan.share(ranks), "factors"):
            for fold in batch.folds.unique().tolist():
                part = batch.select((batch.folds == fold).nonzero().squeeze(-1))
                with preserved_rng(request.seed + _SEED_STEP * n_calls), torch.enable_grad():
                    part_loss, factors, n_outputs = self._call(engine, model, part, n_calls)
                n_calls += ranks.world
                sums[fold].append(factors)
                loss += part_loss
        totals = ranks.gathered("the loss", (loss, n_outputs))
        return FoldStatistics(
            _over_ranks(ranks, self.task.names, sums, plan.fold_sizes),
            sum(loss for loss, _ in totals) / sum(plan.fold_sizes),
            max(n_outputs for _, n_outputs in totals),
        )

    def _engine_kwargs(self) -> dict[str, Any]:
        last_layer = {} if self.task.target.last_layer is None else {"last_layer": True}
        return {**self.backend.kwargs, **last_layer}

    def _call(
        self, engine: CurvatureInterface, model: nn.Module, part: Batch, n_calls: int
    ) -> tuple[float, KroneckerFactors, int]:
        device = next(model.parameters()).device
        inputs, targets = to_device(part.inputs, device), part.targets.to(device)
        with torch.no_grad():
            outputs = model(inputs)
        self.task.loss.check_targets(outputs, targets)
        model.output_size = outputs.shape[-1]  # read by BackPACK's interface
        kwargs = dict(self.backend.kron_kwargs)
        if isinstance(engine, CurvlinopsGGN) and engine.stochastic:
            # Its own default is one fixed seed: every batch would draw the same labels.
            kwargs.setdefault("seed", self.task.request.seed + _SEED_STEP * n_calls)
        model.zero_grad()
        loss, kron = engine.kron(inputs, targets, N=len(targets), **kwargs)
        scale = 2.0 if self._doubles_regression_ef(engine) else 1.0
        factors = self._checked(kron.kfacs, len(targets), scale)
        return float(loss), factors, outputs.shape[-1]

    def _doubles_regression_ef(self, engine: CurvatureInterface) -> bool:
        """Every empirical-Fisher backend is twice the true one in regression."""
        return isinstance(engine, EFInterface) and self.arguments.likelihood == "regression"

    def _checked(self, kfacs: list[list[Tensor]], m: int, excess: float) -> KroneckerFactors:
        shapes = [tuple(len(factor) for factor in block) for block in kfacs]
        needed = [_block_shape(p) for p in self.task.target.parameters(self.task.coverage)]
        if shapes != needed:
            raise RuntimeError(
                f"{self.backend.kind.__name__} returned Kronecker blocks {shapes} where the "
                f"parameters need {needed}; use backend=None."
            )
        blocks = []
        for name, factors in zip(self.task.names, kfacs, strict=True):
            output = factors[0].detach() / (m * excess)
            blocks.append(
                BlockFactors(name, output, factors[1].detach() if len(factors) == 2 else None)
            )
        return KroneckerFactors(tuple(blocks), m)


def _over_ranks(
    ranks: Ranks,
    names: Sequence[str],
    parts: Sequence[Sequence[KroneckerFactors]],
    sizes: Sequence[int],
) -> tuple[KroneckerFactors, ...]:
    """Per fold, the factors of all its parts on all ranks."""
    if ranks.world == 1:
        return tuple(KroneckerFactors.merge(of_fold) for of_fold in parts)
    own: dict[Key, Factor] = {}
    for fold, of_fold in enumerate(parts):
        if of_fold:
            merged = KroneckerFactors.merge(of_fold)
            for block in merged.blocks:
                own[fold, "rows", block.name] = scaled(block.output, merged.n_samples)
                if block.input is not None:
                    own[fold, "columns", block.name] = scaled(block.input, merged.n_samples)
    means = {key: scaled(f, 1 / sizes[key[0]]) for key, f in summed_factors(ranks, own).items()}
    return tuple(
        KroneckerFactors(
            tuple(
                BlockFactors(n, means[fold, "rows", n], means.get((fold, "columns", n)))
                for n in names
            ),
            size,
        )
        for fold, size in enumerate(sizes)
    )


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


def _block_shape(parameter: Tensor) -> tuple[int, ...]:
    """Sides of the Kronecker factors of a parameter tensor's block."""
    if parameter.ndim == 1:
        return (len(parameter),)
    return (len(parameter), parameter[0].numel())
