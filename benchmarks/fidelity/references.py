"""Reference predictives: from all of the training data."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor, nn

from benchmarks.fidelity.measure import log_predictive
from benchmarks.fidelity.problems import Problem
from laplace_debiased.factory import DebiasedLaplace
from laplace_debiased.likelihoods import SoftmaxCrossEntropy


def kronecker_reference(problem: Problem, priors: Tensor, cache: Path | None = None) -> Tensor:
    """Kronecker posterior with exact magnitudes on all training data; log predictive [G, n, C].

    Args:
        problem: the network and its data.
        priors: prior precisions [G].
        cache: file that keeps the fitted state between runs.
    """
    la = DebiasedLaplace(problem.model, scheme="single", magnitudes="ggn")
    if cache is not None and cache.exists():
        la.load_state_dict(torch.load(cache, weights_only=True))
    else:
        la.fit(problem.train, n_samples=None, progress_bar=True)
        if cache is not None:
            torch.save(la.state_dict(), cache)
    return log_predictive(*la._sweep(problem.test_inputs, priors, diagonal=True))


def dense_reference(problem: Problem, priors: Tensor) -> Tensor:
    """Posterior with the dense GGN of all training data; log predictive [G, n, C], float64."""
    inputs = problem.train.dataset.tensors[0]  # type: ignore[attr-defined]
    ggn = sum_ggn(problem.model, inputs)
    outputs, jacobians = _jacobians(problem.model, problem.test_inputs)
    eigenvalues, eigenvectors = torch.linalg.eigh(ggn)
    squares = (jacobians @ eigenvectors).square()
    variances = torch.stack(
        [squares @ (eigenvalues.clamp_min(0.0) + prior).reciprocal() for prior in priors.double()]
    )
    return log_predictive(outputs, variances)


def sum_ggn(model: nn.Module, inputs: Tensor, chunk: int = 128) -> Tensor:
    """Dense GGN [P, P] in float64, summed over the data."""
    total: Tensor | None = None
    for part in inputs.split(chunk):
        outputs, jacobians = _jacobians(model, part)
        roots = SoftmaxCrossEntropy().hessian_root(outputs)
        rows = torch.einsum("ncr,ncp->nrp", roots, jacobians).flatten(0, 1)
        total = rows.T @ rows if total is None else total + rows.T @ rows
    assert total is not None
    return total


def _jacobians(model: nn.Module, inputs: Tensor) -> tuple[Tensor, Tensor]:
    """Outputs [n, C] and Jacobians [n, C, P] in float64."""
    parameters = {
        name: value.detach().double()
        for name, value in model.named_parameters()
        if value.requires_grad
    }
    buffers = {name: value.double() for name, value in model.named_buffers()}

    def outputs_of(values: dict[str, Tensor], x: Tensor) -> Tensor:
        return torch.func.functional_call(model, (values, buffers), (x.unsqueeze(0),)).squeeze(0)

    jacobian = torch.func.vmap(torch.func.jacrev(outputs_of), in_dims=(None, 0))
    parts = jacobian(parameters, inputs.double())
    with torch.no_grad():
        outputs = torch.func.vmap(outputs_of, in_dims=(None, 0))(parameters, inputs.double())
    flat = [part.flatten(2) for part in parts.values()]
    return outputs, torch.cat(flat, dim=-1)
