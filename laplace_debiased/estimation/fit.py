"""From a request to a fitted curvature: the one pipeline of all structures."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, replace
from enum import Enum
from typing import Any

import torch

from laplace_debiased.curvature import Coverage
from laplace_debiased.estimation.arguments import Arguments
from laplace_debiased.estimation.checkpoint import FitCheckpoint
from laplace_debiased.estimation.plan import (
    Scorer,
    first_inputs_of_loader,
    make_plan,
    supply_for,
)
from laplace_debiased.estimation.report import FitClock
from laplace_debiased.estimation.request import FitRequest
from laplace_debiased.estimation.structure import Structure, Task
from laplace_debiased.estimation.target import Target
from laplace_debiased.estimation.values import Earlier, Fit, check_same_model
from laplace_debiased.network.identity import ModelFingerprint, digest_of, fingerprint
from laplace_debiased.network.inputs import tensors_of
from laplace_debiased.network.outputs import check_weights
from laplace_debiased.network.precision import exact_arithmetic
from laplace_debiased.network.rng import preserved_rng
from laplace_debiased.options import CurvatureOptions


def run_fit(
    structure: Structure,
    target: Target,
    arguments: Arguments,
    request: FitRequest,
    previous: Fit | None,
    chosen: Coverage | None,
    accept: Callable[[Coverage], None],
) -> Fit:
    """Fit a curvature. Nothing outside is changed: who asked decides what to do with the result.

    Args:
        structure: Kronecker or low rank.
        target: the network, and which of its weights.
        arguments: what the posterior was asked for.
        request: the call of ``fit``.
        previous: the fit that this one is added to; None for a new one.
        chosen: which parameters the structure named when the posterior was made, if any.
        accept: refuses a coverage that hyper-parameters do not fit, before the long work begins.

    Raises:
        ValueError, TypeError: for bad data, budgets, a checkpoint of another fit, or arguments
            that contradict each other.
        NumericalError: for NaN or infinite weights, outputs or curvature.
        CoverageError: if nothing can be covered.
        ModelChangedError: if the fit to add to was made at other weights.
    """
    clock = FitClock(shows=request.progress_bar)
    options = arguments.options_for(request)
    check_weights(target.model)
    model = fingerprint(target.model)
    if previous is not None:
        check_same_model(previous, model)
    # What a fit keeps must not be inference tensors, even where the caller is in that mode.
    with preserved_rng(request.seed), torch.inference_mode(False), exact_arithmetic(target.device):
        target = target.located(
            lambda: first_inputs_of_loader(request.train_loader, request.dict_key_y)
        )
        loss = arguments.loss(positions=structure.takes_positions)
        coverage = structure.coverage(target, chosen)
        coverage.require(strict=arguments.strict)
        engine = structure.engine(target, coverage)
        supply = supply_for(
            request, options.n_folds, lambda: structure.recommended_samples(engine, request, loss)
        )
        earlier = None
        if previous is not None:
            earlier = Earlier(previous, supply is not None and supply.budget is not None)
        kept = _opened_checkpoint(structure, target, arguments, request, options, model, earlier)
        score = Scorer(engine, target.model, loss, options.fisher)
        with clock.scoring(score if kept is None else kept.scored(score)) as counted:
            plan = make_plan(supply, request, options, earlier, counted)
        coverage = coverage.without(structure.inspect(engine, target, plan))
        coverage.require(strict=arguments.strict)
        accept(coverage)
        if earlier is not None:
            earlier.check_coverage(coverage)
        if kept is not None:
            kept.bind(plan, covered=list(coverage.covered))
        task = Task(
            target, options, loss, request, supply, plan, coverage, model, clock, earlier, kept
        )
        fit = structure.estimate(structure.engine(target, coverage), task)
        if kept is not None:
            kept.remove()
    return replace(fit, report=clock.report())


_OF_NO_CONSEQUENCE = ("byte_budget",)
"""Options that change no result beyond rounding."""


def _opened_checkpoint(
    structure: Structure,
    target: Target,
    arguments: Arguments,
    request: FitRequest,
    options: CurvatureOptions,
    model: ModelFingerprint,
    earlier: Earlier | None,
) -> FitCheckpoint | None:
    """The checkpoint of a fit, with what an interrupted one left there; None without a path.

    It is continued by the same fit only: what identifies a fit is stored with it.
    """
    if request.checkpoint is None:
        return None
    if not structure.resumes:
        raise ValueError(
            "checkpoint needs hessian_structure='kron' and our own pass: drop backend, or fit "
            "without a checkpoint."
        )
    task: dict[str, Any] = {
        "class": type(structure).__name__,
        "last layer": None if target.last_layer is None else target.last_layer.name,
        "model": model.digest,
        "likelihood": arguments.likelihood,
        "ignore_index": arguments.ignore_index,
        "n_samples": request.n_samples,
        "n_data": request.n_data,
        "seed": request.seed,
        "training set": _length(request.train_loader),
        "magnitude_loader": _length(request.magnitude_loader),
        "earlier fit": None if earlier is None else _described(structure, earlier.fit),
        "loader": type(request.train_loader).__name__,
    }
    for name, value in asdict(options).items():
        if name not in _OF_NO_CONSEQUENCE:
            task[name] = value.value if isinstance(value, Enum) else value
    return FitCheckpoint(request.checkpoint, task, request.checkpoint_interval, target.device)


def _length(loader: Any) -> int | None:
    try:
        return len(getattr(loader, "dataset", loader))
    except (TypeError, NotImplementedError):
        return None


def _described(structure: Structure, fit: Fit) -> str:
    digest = digest_of(list(tensors_of(structure.to_state(fit))))
    return f"{digest} of {fit.n_samples}, N {fit.n_data}"
