"""From a request to a fitted curvature: the one pipeline of all structures."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import asdict, replace
from enum import Enum
from functools import partial
from typing import Any

import torch

from laplace_debiased.curvature import Coverage
from laplace_debiased.curvature.inspection import MISMATCH
from laplace_debiased.data.build import Supply
from laplace_debiased.data.loaders import is_indexable
from laplace_debiased.data.plan import CurvaturePlan
from laplace_debiased.data.pool import anew
from laplace_debiased.errors import ModelChangedError
from laplace_debiased.estimation.arguments import Arguments, FitRequest
from laplace_debiased.estimation.checkpoint import FitCheckpoint
from laplace_debiased.estimation.plan import (
    Scorer,
    first_inputs_of_loader,
    first_inputs_of_plan,
    make_plan,
    supply_for,
)
from laplace_debiased.estimation.report import FitClock
from laplace_debiased.estimation.structure import Fit, Order, Structure, Task
from laplace_debiased.estimation.target import Target
from laplace_debiased.network.grad_modes import outside_inference_mode
from laplace_debiased.network.identity import ModelFingerprint, digest_of, fingerprint
from laplace_debiased.network.inputs import tensors_of
from laplace_debiased.network.last_layer import found_last_layer
from laplace_debiased.network.outputs import check_weights
from laplace_debiased.network.precision import exact_arithmetic
from laplace_debiased.network.probe import Probe
from laplace_debiased.network.rng import preserved_rng
from laplace_debiased.network.watch import Writes
from laplace_debiased.network.wrappers import check_whole
from laplace_debiased.parallel.ranks import Ranks


def run_fit(
    structure: Structure,
    target: Target,
    arguments: Arguments,
    request: FitRequest,
    earlier: Fit | None,
    chosen: Coverage | None,
    accept: Callable[[Coverage], None],
    ranks: Ranks,
) -> Fit:
    """Fit a curvature. Nothing outside is changed: who asked decides what to do with the result.

    Several ranks do this together: each walks a share of one plan, and all have the same result.

    Args:
        structure: Kronecker or low rank.
        target: the network, and which of its weights.
        arguments: what the posterior was asked for.
        request: the call of ``fit``, where the errors are listed.
        earlier: the fit that this one is added to; None for a new one.
        chosen: which parameters the structure named when the posterior was made, if any.
        accept: refuses a coverage that hyper-parameters do not fit, before the long work begins.
        ranks: all ranks, in a collective call.
    """
    clock, options = FitClock(shows=request.progress_bar), arguments.options_for(request)
    model, writes = _identified(target, earlier)
    loss = arguments.loss(positions=structure.takes_positions)
    # What a fit keeps must not be inference tensors, even where the caller is in that mode.
    with preserved_rng(request.seed), outside_inference_mode(), exact_arithmetic(target.device):
        target = _located(target, request, ranks)
        order = Order(target, arguments, request, options, loss, model, earlier, ranks, clock)
        coverage = structure.coverage(target, chosen)
        coverage.require(strict=arguments.strict)
        engine = structure.engine(target, coverage)
        recommended = partial(structure.recommended_samples, engine, request, loss)
        supply = supply_for(request, len(options.fold_fractions), recommended, ranks)
        kept = _begun(structure, order)
        score = Scorer(engine.outputs, target.model, loss, options.fisher)
        with clock.scoring(score) as counted:
            plan = make_plan(order, supply, counted, anew if kept is None else kept.scores)
            plan = _same_plan(plan, supply, request, ranks)
        coverage, sample, probe = _looked_at(structure, engine, order, plan, coverage, writes)
        _check_coverage(coverage, order)
        accept(coverage)
        if kept is not None:
            kept.bind(plan, covered=list(coverage.covered))
        is_drawn = supply is not None and supply.budget is not None
        task = Task(
            **vars(order),
            plan=plan,
            is_drawn=is_drawn,
            sample=sample,
            coverage=coverage,
            checkpoint=kept,
        )
        fit = structure.estimate(structure.engine(target, coverage), task)
        if kept is not None:
            ranks.meet("the end of the checkpoint")
            kept.remove()
    return replace(fit, report=clock.report(), probe=probe)


def _identified(target: Target, earlier: Fit | None) -> tuple[ModelFingerprint, Writes]:
    """The network as it is now, sound, and what tells whether it writes to itself.

    Raises:
        ModelChangedError: if it is another than at the fit that is added to.
    """
    check_whole(target.model)
    check_weights(target.model)
    model = fingerprint(target.model)
    if earlier is not None and earlier.model != model:
        raise ModelChangedError(
            "override=False adds to a fit at the same weights, but the model has changed since. "
            "Fit anew with override=True."
        )
    return model, Writes(target.model, model)


def _located(target: Target, request: FitRequest, ranks: Ranks) -> Target:
    """The target with its last layer known, from any rank that has samples."""
    if target.last_layer is None or target.last_layer.is_given:
        return target
    inputs = first_inputs_of_loader(request.train_loader, request.keys)
    name = None if inputs is None else found_last_layer(target.model, inputs)
    names = [found for found in ranks.gathered("the last layer", name) if found is not None]
    if not names:
        raise ValueError("train_loader is empty.")
    return target.at(names[0])


def _looked_at(
    structure: Structure,
    engine: Any,
    order: Order,
    plan: CurvaturePlan,
    coverage: Coverage,
    writes: Writes,
) -> tuple[Coverage, Any, Probe | None]:
    """What a look at the first batch leaves of the coverage; what any rank sees counts.

    Also this rank's first sample (the first batch where the network takes none alone; a whole one
    would be held as long as the fit takes), and how the network answers to it; None where it has
    none.
    """
    inputs, target = first_inputs_of_plan(plan), order.target
    try:
        own = coverage if inputs is None else structure.inspect(engine, target, inputs, coverage)
        general: frozenset[str] = frozenset()
        for excluded, theirs in order.ranks.gathered("coverage", (dict(own.excluded), own.general)):
            coverage, general = coverage.without(excluded), general | theirs
        coverage = replace(coverage, general=general - coverage.excluded.keys())
        mixes = MISMATCH in coverage.excluded.values()
        probe = None if inputs is None else Probe.of(target.model, inputs, may_mix=mixes)
    except ValueError:  # what writes to itself looks stochastic, or like other things
        writes.check(values=True)
        raise
    finally:
        writes.check()
    return coverage, inputs if probe is None else probe.inputs, probe


def _check_coverage(coverage: Coverage, order: Order) -> None:
    """Check what is covered after all: that it is something, and what the earlier fit covers."""
    coverage.require(strict=order.arguments.strict)
    little = coverage.low_share()
    if little is not None:
        warnings.warn(little, UserWarning, stacklevel=5)
    if order.earlier is not None and order.earlier.coverage.covered != coverage.covered:
        raise ValueError("override=False needs the same covered parameters as the earlier fit.")


def _same_plan(
    plan: CurvaturePlan, supply: Supply | None, request: FitRequest, ranks: Ranks
) -> CurvaturePlan:
    """Rank 0's plan, if all ranks read the same data set or streams of their own.

    Raises:
        ValueError: if they do not, if N of several streams is not given, or if a training set of
            the given N (1 asks for per-sample means) cannot hold what the fit looks at.
    """
    if ranks.world > 1 and any(source.is_own for source in plan.sources):
        if request.n_data is None:
            raise ValueError(
                "every rank's loader gives batches of its own, so that the size of the training "
                "set is unknown: pass n_data, the samples of all ranks together."
            )
        plan = plan.of_first(ranks)
    elif ranks.world > 1:
        pool = None if supply is None else supply.pool
        if pool is None and plan.indices is not None:
            pool = torch.unique(torch.cat(plan.indices))
        behind = None if pool is None else digest_of([pool])
        ranks.agree("fit", {"samples that a sampler leaves to it (pass whole data sets)": behind})
        plan = plan.of_first(ranks)
        labels = digest_of([next(plan.batches()).targets])
        ranks.agree("fit", {"labels of the first batch of the data set": labels})
    seen = max(len(source.draws) for source in plan.sources)
    if plan.indices is not None:
        seen = len(torch.cat(plan.indices).unique())
    if request.n_data is not None and 1 < request.n_data < seen:
        raise ValueError(
            f"n_data={request.n_data} is smaller than the {seen} samples that the fit looks at; it "
            "is the number of training samples (len(loader.dataset)), not of batches."
        )
    return plan


def _described(structure: Structure, order: Order) -> dict[str, Any]:
    """What identifies a fit, as plain values: the same on all ranks, and when it is continued."""
    request, arguments, earlier = order.request, order.arguments, order.earlier
    # Of a stream the plan knows more.
    sizes = [
        len(loader.dataset) if is_indexable(loader) else None
        for loader in (request.train_loader, request.magnitude_loader)
    ]
    before = None
    if earlier is not None:
        digest = digest_of(list(tensors_of(structure.to_state(earlier))))
        before = f"{digest} of {earlier.n_samples}, N {earlier.n_data}"
    last_layer = order.target.last_layer
    # The byte budget changes no result beyond rounding.
    options = {k: v for k, v in asdict(order.options).items() if k != "byte_budget"}
    return {
        "class": type(structure).__name__,
        "last layer": None if last_layer is None else last_layer.name,
        "model": order.model.digest,
        "likelihood": arguments.likelihood,
        "ignore_index": arguments.ignore_index,
        "n_samples": request.n_samples,
        "n_data": request.n_data,
        "seed": request.seed,
        "training set": sizes[0],
        "magnitude_loader": sizes[1],
        "earlier fit": before,
        "loader": type(request.train_loader).__name__,
        **{k: v.value if isinstance(v, Enum) else v for k, v in options.items()},
    }


def _begun(structure: Structure, order: Order) -> FitCheckpoint | None:
    """Check that all ranks mean the same fit, and open its checkpoint; None without a path.

    It is continued by the same fit only: what identifies a fit is stored with it.
    """
    described, request = _described(structure, order), order.request
    given = {"checkpoint": request.checkpoint is not None, "override": request.override}
    order.ranks.agree("fit", described | given)
    if request.checkpoint is None:
        return None
    if not structure.resumes:
        raise ValueError(
            "checkpoint needs hessian_structure='kron' and our own pass: drop backend, or fit "
            "without a checkpoint."
        )
    return FitCheckpoint(request.checkpoint, described, request.checkpoint_interval, order.ranks)
