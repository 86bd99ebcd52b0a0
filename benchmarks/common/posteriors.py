"""The two libraries behind one interface; each lives in a worker process of its own."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

import torch
from laplace import KronLaplace, KronLLLaplace
from torch import Tensor

from benchmarks.common.cases import Case, build_case, predictive_flop
from laplace_debiased.factory import DebiasedLaplace

_PRIOR_PRECISION = 10.0


def ours(**arguments: Any) -> OurPosterior:
    """Factory of the worker that measures this library."""
    return OurPosterior(build_case(**arguments))


def reference(**arguments: Any) -> ReferencePosterior:
    """Factory of the worker that measures laplace-torch."""
    return ReferencePosterior(build_case(**arguments))


class OurPosterior:
    """Single batch and Kronecker magnitudes: the posterior that laplace-torch computes."""

    def __init__(self, case: Case) -> None:
        self.case = case
        last = case.last_layer
        arguments: dict[str, Any] = {} if last is None else {"last_layer_name": last}
        self.posterior = DebiasedLaplace(
            case.model,
            subset_of_weights="all" if last is None else "last_layer",
            prior_precision=_PRIOR_PRECISION,
            scheme="single",
            magnitudes="kfac",
            **arguments,
        )
        loader = case.fit_loader(batch=64)
        self.posterior.fit(loader, n_samples=None, n_data=case.n_data)

    def facts(self) -> dict[str, Any]:
        """Size of the posterior, work per sample, and speed of a matrix product here."""
        return {
            "parameters": self.posterior.n_params,
            "classes": self.posterior.n_outputs,
            "flop_per_sample": predictive_flop(self.case),
            "matmul_flop_per_s": _matmul_speed(),
        }

    def predict(self, batch: int) -> dict[str, Any]:
        """Probabilities [batch, C] of the first validation inputs."""
        return {"probabilities": self.posterior(self._inputs(batch), link_approx="probit")}

    def grid_search(self, batch: int, images: int, points: int) -> dict[str, Any]:
        """Tune on the first validation images, and say what was found."""
        loader = self.case.validation_loader(batch, images)
        self.posterior.optimize_prior_precision(
            method="gridsearch", val_loader=loader, grid_size=points
        )
        result = self.posterior.tuning_result
        return {
            "prior_precisions": result.prior_precisions,
            "losses": result.losses,
            "best_grid_point": result.best_grid_point,
            "prior_precision": result.prior_precision,
            "loss": result.loss,
        }

    def fresh_losses(
        self, prior_precisions: Sequence[float], batch: int, images: int
    ) -> dict[str, Any]:
        """Mean negative log-likelihood of plain predictions at every prior, in nats."""
        losses = []
        for prior in prior_precisions:
            self.posterior.prior_precision = prior
            total = torch.zeros((), dtype=torch.float64)
            for inputs, labels in self.case.validation_loader(batch, images):
                chosen = self.posterior(inputs, link_approx="probit").gather(
                    -1, labels.unsqueeze(-1)
                )
                total -= chosen.double().log().sum()
            losses.append(float(total) / images)
        return {"losses": losses}

    def _inputs(self, batch: int) -> Tensor:
        inputs = self.case.validation[0]
        if batch > len(inputs):
            raise ValueError(f"batch {batch} exceeds the {len(inputs)} validation samples.")
        return inputs[:batch]


class ReferencePosterior:
    """laplace-torch's Kronecker posterior on the same samples, scaled to the same N."""

    def __init__(self, case: Case) -> None:
        self.case = case
        kind = KronLaplace if case.last_layer is None else KronLLLaplace
        arguments = {} if case.last_layer is None else {"last_layer_name": case.last_layer}
        self.posterior = kind(
            case.model, "classification", prior_precision=_PRIOR_PRECISION, **arguments
        )
        self.posterior.fit(case.fit_loader(batch=64))
        # laplace-torch takes the size of the data set for N; the factors are a sum over it.
        self.posterior.H_facs = self.posterior.H_facs * (case.n_data / len(case.fit_data[0]))
        self.posterior.H = self.posterior.H_facs.decompose()

    def predict(self, batch: int) -> dict[str, Any]:
        """Probabilities [batch, C] of the first validation inputs."""
        inputs = self.case.validation[0][:batch]
        with torch.no_grad():
            return {"probabilities": self.posterior(inputs, pred_type="glm", link_approx="probit")}

    def grid_search(self, batch: int, images: int, points: int) -> dict[str, Any]:
        """Tune on the first validation images."""
        loader = self.case.validation_loader(batch, images)
        self.posterior.optimize_prior_precision(
            pred_type="glm", method="gridsearch", val_loader=loader, grid_size=points
        )
        return {"prior_precision": float(self.posterior.prior_precision)}


def _matmul_speed(size: int = 1024, repetitions: int = 8) -> float:
    """Best of several products of square float32 matrices, in operations per second."""
    left, best = torch.ones(size, size), float("inf")
    for _ in range(repetitions):
        start = time.perf_counter()
        left @ left
        best = min(best, time.perf_counter() - start)
    return 2.0 * size**3 / best
