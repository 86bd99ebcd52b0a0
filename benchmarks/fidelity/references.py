"""Reference predictives: from all of the training data."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor, nn
from tqdm import tqdm

from benchmarks.fidelity.measure import log_predictive, swept
from benchmarks.fidelity.problems import Problem
from laplace_debiased.factory import DebiasedLaplace
from laplace_debiased.likelihoods import SoftmaxCrossEntropy

_LARGE = 100_000


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
    return log_predictive(*swept(la, problem.test_inputs, priors))


def dense_reference(problem: Problem, priors: Tensor, cache: Path | None = None) -> Tensor:
    """Posterior with the dense GGN of all training data; log predictive [G, n, C], float64.

    Args:
        problem: the network and its data.
        priors: prior precisions [G].
        cache: file that keeps the GGN between runs.
    """
    if cache is not None and cache.exists():
        ggn = torch.load(cache, weights_only=True)
    else:
        ggn = sum_ggn(problem.model, problem.train.dataset.tensors[0])  # type: ignore[attr-defined]
        if cache is not None:
            torch.save(ggn, cache)
    outputs, jacobians = _jacobians(problem.model, problem.test_inputs)
    eigenvalues, eigenvectors = torch.linalg.eigh(ggn)
    squares = (jacobians @ eigenvectors).square()
    variances = torch.stack(
        [squares @ (eigenvalues.clamp_min(0.0) + prior).reciprocal() for prior in priors.double()]
    )
    return log_predictive(outputs, variances)


def sum_ggn(model: nn.Module, inputs: Tensor, chunk: int = 64) -> Tensor:
    """Dense GGN [P, P] in float64, summed over the data."""
    total: Tensor | None = None
    for part in tqdm(inputs.split(chunk), desc="dense GGN"):
        outputs, jacobians = _jacobians(model, part)
        roots = SoftmaxCrossEntropy().hessian_root(outputs)
        rows = torch.einsum("ncr,ncp->nrp", roots, jacobians).flatten(0, 1)
        total = rows.T @ rows if total is None else total + rows.T @ rows
    assert total is not None
    return total


def _jacobians(model: nn.Module, inputs: Tensor) -> tuple[Tensor, Tensor]:
    """Outputs [n, C] and Jacobians [n, C, P] in the trainable parameters, in float64.

    Large networks are differentiated in float32, as in the fits; sums are in float64 all the same.
    """
    large = sum(parameter.numel() for parameter in model.parameters()) > _LARGE
    dtype = torch.float32 if large else torch.float64
    named = {name: value.detach().to(dtype) for name, value in model.named_parameters()}
    trainable = [name for name, value in model.named_parameters() if value.requires_grad]
    parameters = {name: named[name] for name in trainable}
    rest = {name: value for name, value in named.items() if name not in parameters}
    buffers = {
        name: value.to(dtype) if value.is_floating_point() else value
        for name, value in model.named_buffers()
    }

    def outputs_of(values: dict[str, Tensor], x: Tensor) -> Tensor:
        everything = ({**rest, **values}, buffers)
        return torch.func.functional_call(model, everything, (x.unsqueeze(0),)).squeeze(0)

    jacobian = torch.func.vmap(torch.func.jacrev(outputs_of), in_dims=(None, 0))
    parts = jacobian(parameters, inputs.to(dtype))
    with torch.no_grad():
        outputs = torch.func.vmap(outputs_of, in_dims=(None, 0))(parameters, inputs.to(dtype))
    flat = [part.flatten(2) for part in parts.values()]
    return outputs.double(), torch.cat(flat, dim=-1).double()
