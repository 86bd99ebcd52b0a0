"""The measured side: one network, its coverage, one fit and one prediction."""

from __future__ import annotations

import json
import sys
import warnings
from typing import Any

from torch import nn
from torch.utils.data import DataLoader, Dataset

from benchmarks.coverage.networks import CASES, Case


class _Samples(Dataset):
    """Pairs of a sample's inputs and its target."""

    def __init__(self, case: Case, n: int) -> None:
        self.inputs, self.targets = case.data(n)

    def __len__(self) -> int:
        return len(self.targets)

    def __getitem__(self, index: int) -> Any:
        if isinstance(self.inputs, dict):
            return {key: value[index] for key, value in self.inputs.items()}, self.targets[index]
        return self.inputs[index], self.targets[index]


class Subject:
    """One network.

    Args:
        name: its key in ``CASES``.
    """

    def __init__(self, name: str) -> None:
        from laplace_debiased import DebiasedLaplace

        self.case = CASES[name]
        self.model = self.case.network()
        # Outputs at every position are too many for all columns of the loss Hessian.
        options: dict[str, Any] = {"fisher": "mc"} if self.case.positions else {}
        self.posterior = DebiasedLaplace(self.model, "classification", **options)

    def fit(self, n_samples: int) -> dict[str, Any]:
        """Fit, and what is covered of the trainable parameters."""
        loader = DataLoader(_Samples(self.case, 4 * n_samples), batch_size=n_samples)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            self.posterior.fit(loader, n_samples=n_samples)
        return summary_of(self.posterior.coverage)

    def predict(self, batch: int) -> dict[str, Any]:
        """One batch; of a language model, its last position."""
        options = {"positions": "last"} if self.case.positions else {}
        self.posterior(self.case.data(batch)[0], **options)
        return {}


def coverage_of(model: nn.Module, inputs: Any) -> Any:
    """What a forward pass leaves of a network's coverage, in this or in an earlier version."""
    from laplace_debiased import curvature

    if hasattr(curvature, "inspected"):
        return curvature.inspected(model, curvature.operation_coverage(model), inputs)
    coverage, layers = curvature.layer_coverage(model)  # by module type
    return coverage.without(curvature.layer_problems(model, layers, inputs))


def coverage_without_a_fit(name: str) -> dict[str, Any]:
    """Trainable and covered entries of a network, and why the rest is left out."""
    model, (inputs, _) = CASES[name].network(), CASES[name].data(2)
    try:
        coverage = coverage_of(model, inputs)
    except Exception as error:  # an earlier version broke networks; that is a result
        return {"failure": f"{type(error).__name__}: {error}"[:80]}
    return summary_of(coverage)


def summary_of(coverage: Any) -> dict[str, Any]:
    """Counts of a coverage, of trainable entries."""
    reasons: dict[str, int] = {}
    for name, why in coverage.gaps.items():
        reasons[why] = reasons.get(why, 0) + coverage.sizes[name]
    trainable = coverage.n_covered + sum(reasons.values())
    return {"trainable": trainable, "covered": coverage.n_covered, "reasons": reasons}


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    for one in sys.argv[1:]:
        print(json.dumps({"name": one, **coverage_without_a_fit(one)}), flush=True)
