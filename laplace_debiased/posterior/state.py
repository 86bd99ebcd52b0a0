"""A posterior as tensors and plain values, and back."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from laplace_debiased.curvature import BlockFactors, KroneckerFactors
from laplace_debiased.curvature.factors import BlockBasis
from laplace_debiased.options import Scheme, parse_choice
from laplace_debiased.posterior.estimation import KronEstimate
from laplace_debiased.posterior.fitting import FittedKron

if TYPE_CHECKING:
    from laplace_debiased.posterior.kron_base import KronPosterior

STATE_VERSION = 1


def common_state(posterior: Any) -> dict[str, Any]:
    """The entries that every posterior's state has, laplace-torch's among them."""
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
    }


def check_common_state(posterior: Any, state: Mapping[str, Any]) -> None:
    """Check that a state fits a posterior before anything is changed.

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
    if state["version"] > STATE_VERSION:
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


def adopt_common_state(posterior: Any, state: Mapping[str, Any]) -> None:
    """Set what every state holds; call after everything was checked."""
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


def kron_to_state(posterior: KronPosterior) -> dict[str, Any]:
    """State of a Kronecker posterior."""
    fitted = posterior._fitted
    assert fitted is not None
    estimate = fitted.estimate
    return common_state(posterior) | {
        "H": [_basis_to_state(block) for block in estimate.basis],
        "tables": [table.detach().clone() for table in estimate.tables],
        "folds": [_factors_to_state(fold) for fold in estimate.folds],
        "comparisons": [[list(own), list(other)] for own, other in estimate.comparisons],
        "mean_loss": estimate.mean_loss,
        "n_samples": estimate.n_samples,
        "scheme": fitted.scheme.value,
        "drawn": sorted(fitted.drawn),
    }


def kron_from_state(posterior: KronPosterior, state: Mapping[str, Any]) -> None:
    """Restore a Kronecker posterior.

    Raises:
        ValueError: if the state does not fit; nothing is changed then.
    """
    check_common_state(posterior, state)
    names = tuple(state["covered"])
    device = posterior._device
    basis = tuple(
        _basis_from_state(name, entry, device)
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
    )
    scheme = parse_choice(Scheme, state["scheme"], "scheme")
    fitted = FittedKron(estimate, int(state["n_data"]), scheme, names, frozenset(state["drawn"]))
    coverage = posterior._coverage_from_names(names, state["excluded"])
    posterior._adopt(fitted, coverage)
    adopt_common_state(posterior, state)


def _basis_to_state(block: BlockBasis) -> list[Tensor]:
    entries = [block.output_basis, block.output_eigenvalues]
    if block.input_basis is not None and block.input_eigenvalues is not None:
        entries += [block.input_basis, block.input_eigenvalues]
    return [entry.detach().clone() for entry in entries]


def _basis_from_state(name: str, entry: Sequence[Tensor], device: torch.device) -> BlockBasis:
    return BlockBasis(name, *(tensor.to(device) for tensor in entry))


def _factors_to_state(factors: KroneckerFactors) -> dict[str, Any]:
    return {
        "n_samples": factors.n_samples,
        "blocks": [
            [block.output] if block.input is None else [block.output, block.input]
            for block in factors.blocks
        ],
    }


def _factors_from_state(
    names: Sequence[str], state: Mapping[str, Any], device: torch.device
) -> KroneckerFactors:
    blocks = tuple(
        BlockFactors(name, *(tensor.to(device) for tensor in entry))
        for name, entry in zip(names, state["blocks"], strict=True)
    )
    return KroneckerFactors(blocks, state["n_samples"])
