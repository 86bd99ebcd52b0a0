"""A posterior as tensors and plain values, and back."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import asdict, fields
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import Tensor

from laplace_debiased.curvature import BlockFactors, KroneckerFactors
from laplace_debiased.curvature.factors import BlockBasis
from laplace_debiased.estimation.fitting import Fitted
from laplace_debiased.estimation.kron_estimator import KronEstimate
from laplace_debiased.network.identity import ModelFingerprint, fingerprint
from laplace_debiased.network.watch import ModelWatch
from laplace_debiased.options import Scheme, parse_choice
from laplace_debiased.tuning.grid import TuningResult

if TYPE_CHECKING:
    from laplace_debiased.posterior.kron_base import KronPosterior

STATE_VERSION = 2
"""1: no fingerprint of the model, no tuning result, blocks as lists. 2: as below."""

Block = TypeVar("Block", BlockBasis, BlockFactors)


def common_state(posterior: Any) -> dict[str, Any]:
    """The entries that every posterior's state has, laplace-torch's among them."""
    fitted: Fitted[Any] = posterior._fitted
    return {
        "version": STATE_VERSION,
        "cls_name": type(posterior).__name__,
        "mean": posterior.mean.detach().clone(),
        "loss": float(posterior.loss),
        "prior_mean": posterior.prior_mean.detach().clone(),
        "prior_precision": posterior.prior_precision.detach().clone(),
        "sigma_noise": posterior.sigma_noise.detach().clone(),
        "n_data": posterior.n_data,
        "n_outputs": posterior.n_outputs,
        "likelihood": posterior.likelihood,
        "temperature": posterior.temperature,
        "enable_backprop": posterior.enable_backprop,
        "covered": list(posterior.coverage.covered),
        "excluded": dict(posterior.coverage.excluded),
        "tuned_link_approx": None
        if posterior.tuned_link_approx is None
        else posterior.tuned_link_approx.value,
        "tuning_result": _tuning_to_state(getattr(posterior, "tuning_result", None)),
        "model": posterior._watch.reference.to_state(),
        "mean_loss": fitted.estimate.mean_loss,
        "n_samples": fitted.estimate.n_samples,
        "effective_samples": fitted.estimate.effective_samples,
        "scheme": fitted.scheme.value,
        "drawn": sorted(fitted.drawn),
    }


def check_common_state(posterior: Any, state: Mapping[str, Any]) -> None:
    """Check that a state fits a posterior before anything is changed; the weights come after.

    Raises:
        ValueError: naming the entry that does not.
    """
    missing = {"cls_name", "mean", "likelihood", "covered", "version"} - set(state)
    if missing:
        raise ValueError(
            f"the state has no {sorted(missing)[0]!r}; it is not a debiased posterior's."
        )
    if state["cls_name"] != type(posterior).__name__:
        raise ValueError(
            f"the state belongs to a {state['cls_name']}, not to a {type(posterior).__name__}; "
            "check subset_of_weights and hessian_structure."
        )
    if not isinstance(state["version"], int) or state["version"] > STATE_VERSION:
        raise ValueError(
            f"the state has version {state['version']}, newer than {STATE_VERSION}; upgrade "
            "laplace-debiased."
        )
    if state["likelihood"] != posterior.likelihood:
        raise ValueError(
            f"the state is for likelihood={state['likelihood']!r}, not {posterior.likelihood!r}."
        )
    known = dict(posterior._covered_model.named_parameters())
    unknown = [name for name in state["covered"] if name not in known]
    if unknown:
        raise ValueError(f"the model has no parameter {unknown[0]!r}, which the state covers.")
    size = sum(known[name].numel() for name in state["covered"])
    if len(state["mean"]) != size:
        raise ValueError(
            f"the state covers {len(state['mean'])} parameter entries; the model has {size} there."
        )


def watch_from_state(
    posterior: Any, state: Mapping[str, Any], *, check_weights: bool = True
) -> ModelWatch:
    """The watch over the posterior's model, which must be the one that the state was made with.

    A state of version 1 does not say which model it belongs to: it is taken to be this one, with
    a warning.

    Args:
        posterior: the posterior with its model.
        state: the state.
        check_weights: whether the model's weights must be those of the fit, or only its names and
            shapes. The model as it is now is then the one to be watched.

    Raises:
        ValueError: naming what the model has differently.
    """
    present = fingerprint(posterior._covered_model)
    if "model" not in state:
        warnings.warn(
            "this state was made by an early version, which did not record its model: whether the "
            "weights are the right ones cannot be checked. Save it again to record them.",
            UserWarning,
            stacklevel=5,
        )
        return ModelWatch(present)
    stored = ModelFingerprint.from_state(state["model"])
    changes = stored.differences(present, values=check_weights)
    if changes:
        more = f" and {len(changes) - 3} more" if len(changes) > 3 else ""
        raise ValueError(
            "the state belongs to another model or to other weights: "
            f"{', '.join(changes[:3])}{more}. Load the weights that the posterior was fitted with "
            "first (model.load_state_dict), or pass check_weights=False if they are equal but for "
            "a cast."
        )
    return ModelWatch(present)


def adopt_state(
    posterior: Any, state: Mapping[str, Any], estimate: Any, *, check_weights: bool
) -> None:
    """Take over an estimate and what else a state holds; the posterior's own part is checked.

    Args:
        posterior: the posterior with its model.
        state: the state.
        estimate: the curvature that it holds.
        check_weights: as in :func:`watch_from_state`.

    Raises:
        ValueError: as :func:`watch_from_state`; nothing is changed then.
    """
    names, scheme = tuple(state["covered"]), parse_choice(Scheme, state["scheme"], "scheme")
    fitted = Fitted(estimate, int(state["n_data"]), scheme, names, frozenset(state["drawn"]))
    coverage = posterior._coverage_from_names(names, state["excluded"])
    watch = watch_from_state(posterior, state, check_weights=check_weights)
    posterior._adopt(fitted, coverage, watch)
    _adopt_hyper_parameters(posterior, state)


def _adopt_hyper_parameters(posterior: Any, state: Mapping[str, Any]) -> None:
    from laplace.utils.enums import LinkApprox

    device, dtype = posterior._device, posterior._dtype
    posterior.mean = state["mean"].to(device, dtype)
    posterior.loss = state["loss"]
    posterior.prior_mean = state["prior_mean"].to(device, dtype)
    posterior.prior_precision = state["prior_precision"].to(device, dtype)
    posterior.sigma_noise = state["sigma_noise"].to(device, dtype)
    posterior.temperature = state["temperature"]
    posterior.enable_backprop = state["enable_backprop"]
    link = state["tuned_link_approx"]
    posterior.tuned_link_approx = None if link is None else LinkApprox(link)
    posterior.tuning_result = _tuning_from_state(state.get("tuning_result"))


def _tuning_to_state(result: TuningResult | None) -> dict[str, Any] | None:
    if result is None:
        return None
    return {k: list(v) if isinstance(v, tuple) else v for k, v in asdict(result).items()}


def _tuning_from_state(state: Mapping[str, Any] | None) -> TuningResult | None:
    if state is None:
        return None
    values: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in state.items()}
    return TuningResult(**values)


def kron_to_state(posterior: KronPosterior) -> dict[str, Any]:
    """State of a Kronecker posterior."""
    assert posterior._fitted is not None
    estimate = posterior._fitted.estimate
    return common_state(posterior) | {
        "H": [_block_to_state(block) for block in estimate.basis],
        "tables": [table.detach().clone() for table in estimate.tables],
        "folds": [_factors_to_state(fold) for fold in estimate.folds],
        "comparisons": [[list(own), list(other)] for own, other in estimate.comparisons],
    }


def kron_from_state(
    posterior: KronPosterior, state: Mapping[str, Any], *, check_weights: bool = True
) -> None:
    """Restore a Kronecker posterior.

    Raises:
        ValueError: if the state does not fit; nothing is changed then.
    """
    check_common_state(posterior, state)
    names = tuple(state["covered"])
    device = posterior._device
    basis = tuple(
        _block_from_state(BlockBasis, name, entry, device)
        for name, entry in zip(names, state["H"], strict=True)
    )
    tables = tuple(table.to(device) for table in state["tables"])
    for block, table in zip(basis, tables, strict=True):
        if tuple(table.shape) != block.table_shape:
            raise ValueError(f"the state's table of {block.name!r} does not fit its eigenbasis.")
    estimate = KronEstimate(
        basis,
        tables,
        tuple(_factors_from_state(names, fold, device) for fold in state["folds"]),
        tuple(
            (tuple(t.to(device) for t in own), tuple(t.to(device) for t in other))
            for own, other in state["comparisons"]
        ),
        float(state["mean_loss"]),
        int(state["n_outputs"]),
        int(state["n_samples"]),
        state.get("effective_samples"),
    )
    adopt_state(posterior, state, estimate, check_weights=check_weights)


def _block_to_state(block: BlockBasis | BlockFactors) -> dict[str, Any]:
    """Every field but the name, tensors as copies; what is None or a plain value stays."""
    values = ((field.name, getattr(block, field.name)) for field in fields(block))
    return {
        name: value.detach().clone() if isinstance(value, Tensor) else value
        for name, value in values
        if name != "name"
    }


def _block_from_state(
    kind: type[Block],
    name: str,
    entry: Mapping[str, Any] | Sequence[Tensor],
    device: torch.device,
) -> Block:
    if not isinstance(entry, Mapping):  # version 1: tensors in the order of the fields
        keys = [field.name for field in fields(kind)][1:]
        entry = dict(zip(keys, entry, strict=False))
    values = {k: v.to(device) if isinstance(v, Tensor) else v for k, v in entry.items()}
    return kind(name=name, **values)


def _factors_to_state(factors: KroneckerFactors) -> dict[str, Any]:
    return {
        "n_samples": factors.n_samples,
        "blocks": [_block_to_state(block) for block in factors.blocks],
    }


def _factors_from_state(
    names: Sequence[str], state: Mapping[str, Any], device: torch.device
) -> KroneckerFactors:
    blocks = tuple(
        _block_from_state(BlockFactors, name, entry, device)
        for name, entry in zip(names, state["blocks"], strict=True)
    )
    return KroneckerFactors(blocks, state["n_samples"])
