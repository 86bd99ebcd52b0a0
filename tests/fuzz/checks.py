"""What must hold for any network: dense oracles by plain automatic differentiation, per sample."""

from __future__ import annotations

import warnings
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from laplace_debiased.errors import CoverageError
from laplace_debiased.posterior import DebiasedKronLaplace
from tests import oracles
from tests.fuzz.networks import Case
from tests.moments import sweep as sweep_of
from tests.tolerances import EXACT, relative_error

B, OTHER = slice(0, 4), slice(4, 8)
TOLERANCE = EXACT[torch.float64]


def jacobian(model: nn.Module, x: Tensor, names: Sequence[str]) -> Tensor:
    """Jacobian [m, C, P], sample by sample and output by output."""
    parameters = dict(model.named_parameters())
    chosen = [parameters[name] for name in names]
    rows = []
    for n in range(len(x)):
        outputs = model(x[n : n + 1])[0]
        for output in outputs:
            found = torch.autograd.grad(output, chosen, retain_graph=True, allow_unused=True)
            filled = [
                torch.zeros_like(p) if g is None else g for p, g in zip(chosen, found, strict=True)
            ]
            rows.append(torch.cat([g.flatten() for g in filled]))
    return torch.stack(rows).reshape(len(x), -1, sum(p.numel() for p in chosen))


def ggn(case: Case, jac: Tensor, rows: slice) -> Tensor:
    """Per-sample mean GGN [P, P] of some samples."""
    with torch.no_grad():
        outputs = case.model(case.x)
    middle = oracles.loss_hessians(case.likelihood, outputs, case.y)
    return torch.einsum("mcp,mcd,mdq->pq", jac[rows], middle[rows], jac[rows]) / len(jac[rows])


def loader(case: Case, rows: slice) -> DataLoader:
    return DataLoader(TensorDataset(case.x[rows], case.y[rows]), batch_size=3)


def problems(case: Case) -> list[str]:
    """What is wrong with the posteriors of a case; nothing if all is well."""
    frozen = {name for name, p in case.model.named_parameters() if not p.requires_grad}
    expected = frozen | case.gaps
    options = {"prior_precision": 0.7, "byte_budget": (1, 2**28)[case.seed % 2]}
    magnitudes = ("ggn", "ggn", "kfac")[case.seed % 3]
    la = DebiasedKronLaplace(case.model, case.likelihood, magnitudes=magnitudes, **options)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        la.fit(loader(case, B), magnitude_loader=loader(case, OTHER), n_data=1)
    found = []
    if set(la.coverage.excluded) != expected:
        wrong = set(la.coverage.excluded) ^ expected
        found.append(f"coverage: {sorted((n, la.coverage.excluded.get(n)) for n in wrong)}")
    total = sum(p.numel() for p in case.model.parameters())
    if la.coverage.n_covered + la.coverage.n_excluded != total or la.n_params != len(la.mean):
        found.append("coverage does not add up")
    jac = jacobian(case.model, case.x, la.coverage.covered)
    if magnitudes == "ggn":
        expected_table = oracles.directional(la.H, ggn(case, jac, OTHER), la.fitted.curvature.basis)
        found += _different("table", oracles.table(la.H), expected_table)
    return found + _prediction_problems(la, case, jac)


def _prediction_problems(la: DebiasedKronLaplace, case: Case, jac: Tensor) -> list[str]:
    precision = oracles.dense_precision(la.H, la.prior_precision.double(), float(la._H_factor))
    rows = jac.flatten(0, 1)
    joint = rows @ torch.linalg.solve(precision, rows.T)
    m, n_outputs = jac.shape[:2]
    blocks = joint.reshape(m, n_outputs, m, n_outputs)
    each = torch.stack([blocks[n, :, n] for n in range(m)])
    found = _different("covariance", la._glm_predictive_distribution(case.x)[1], each)
    variance = la._glm_predictive_distribution(case.x, diagonal_output=True)[1]
    found += _different("variance", variance, each.diagonal(dim1=1, dim2=2))
    found += _different("joint", la._glm_predictive_distribution(case.x, joint=True)[1], joint)
    sweep = sweep_of(la, case.x, la.prior_precision.double(), False)[1][0]
    found += _different("sweep", sweep, each)
    found += _different("log det", la.posterior_precision.logdet(), torch.logdet(precision))
    restored = DebiasedKronLaplace(case.model, case.likelihood)
    restored.load_state_dict(la.state_dict())
    found += _different("state", restored._glm_predictive_distribution(case.x)[1], each)
    return found


def _different(what: str, actual: Tensor, expected: Tensor) -> list[str]:
    error = relative_error(actual, expected)
    return [] if error <= TOLERANCE else [f"{what}: relative error {error:.1e}"]


def outcome(case: Case) -> list[str]:
    """As :func:`problems`; a network of which nothing can be covered must be refused."""
    trainable = {name for name, p in case.model.named_parameters() if p.requires_grad}
    if trainable <= case.gaps:
        try:
            problems(case)
        except CoverageError:
            return []
        return ["nothing can be covered, but nothing was raised"]
    return problems(case)
