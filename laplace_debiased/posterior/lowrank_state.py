"""A low-rank posterior as tensors and plain values, and back."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from laplace_debiased.curvature.lowrank import Eigenpairs
from laplace_debiased.estimation.lowrank_estimator import LowRankEstimate
from laplace_debiased.posterior.state import (
    adopt_state,
    check_common_state,
    common_state,
)

if TYPE_CHECKING:
    from laplace_debiased.posterior.lowrank import DebiasedLowRankLaplace


def low_rank_to_state(posterior: DebiasedLowRankLaplace) -> dict[str, Any]:
    """State of a low-rank posterior."""
    assert posterior._fitted is not None
    estimate = posterior._fitted.estimate
    return common_state(posterior) | {
        "H": [estimate.pairs.basis.clone(), estimate.pairs.eigenvalues.clone()],
        "comparisons": [[own.clone(), other.clone()] for own, other in estimate.comparisons],
    }


def low_rank_from_state(
    posterior: DebiasedLowRankLaplace, state: Mapping[str, Any], *, check_weights: bool = True
) -> None:
    """Restore a low-rank posterior.

    Raises:
        ValueError: if the state does not fit; nothing is changed then.
    """
    check_common_state(posterior, state)
    device = posterior._device
    basis, eigenvalues = (tensor.to(device) for tensor in state["H"])
    if basis.ndim != 2 or basis.shape != (len(state["mean"]), len(eigenvalues)):
        raise ValueError(
            f"the state's basis {list(basis.shape)} does not fit its {len(eigenvalues)} "
            f"eigenvalues and {len(state['mean'])} parameter entries."
        )
    estimate = LowRankEstimate(
        Eigenpairs(basis, eigenvalues),
        tuple((own.to(device), other.to(device)) for own, other in state["comparisons"]),
        float(state["mean_loss"]),
        int(state["n_outputs"]),
        int(state["n_samples"]),
        state.get("effective_samples"),
    )
    adopt_state(posterior, state, estimate, check_weights=check_weights)
