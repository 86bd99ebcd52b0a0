"""The measured side: one network, its coverage, one fit and one prediction."""

from __future__ import annotations

import json
import sys
import warnings
from typing import Any

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
        coverage = self.posterior.coverage
        trainable = coverage.n_covered + sum(coverage.sizes[name] for name in coverage.gaps)
        reasons: dict[str, int] = {}
        for name, why in coverage.gaps.items():
            reasons[why] = reasons.get(why, 0) + coverage.sizes[name]
        return {"trainable": trainable, "covered": coverage.n_covered, "reasons": reasons}

    def predict(self, batch: int) -> dict[str, Any]:
        """One batch; of a language model, its last position."""
        options = {"positions": "last"} if self.case.positions else {}
        self.posterior(self.case.data(batch)[0], **options)
        return {}


def share_before(checkout: str, name: str) -> float:
    """Share of the trainable entries that an earlier commit covers, which went by module type."""
    sys.path.insert(0, checkout)
    from laplace_debiased.curvature import (  # type: ignore[attr-defined]
        layer_coverage,
        layer_problems,
    )

    model, (inputs, _) = CASES[name].network(), CASES[name].data(2)
    coverage, layers = layer_coverage(model)
    coverage = coverage.without(layer_problems(model, layers, inputs))
    trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
    return coverage.n_covered / trainable


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    print(json.dumps(share_before(sys.argv[1], sys.argv[2])))
