"""Fits that several processes make as one would."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from itertools import compress
from typing import Any

import torch
from laplace.curvature import CurvlinopsGGN
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset
from torchmetrics.classification import MulticlassCalibrationError

from laplace_debiased import DebiasedLaplace, compare, evaluate
from laplace_debiased.network.identity import digest_of
from laplace_debiased.network.inputs import tensors_of
from tests.posterior.cases import STRUCTURES

N = 23
INPUTS = torch.linspace(-2, 2, N * 36, dtype=torch.float64).mul(11).sin().reshape(N, 36)
LABELS = torch.arange(N) % 3


def network(kind: str) -> nn.Module:
    """A network in float64 whose weights are sines."""
    layers: list[nn.Module]
    if kind == "images":
        layers = [nn.Unflatten(1, (1, 6, 6)), nn.Conv2d(1, 5, 3), nn.BatchNorm2d(5), nn.Tanh()]
        layers += [nn.Conv2d(5, 4, 3, groups=1), nn.Tanh(), nn.Flatten(), nn.Linear(16, 3)]
    else:
        layers = [nn.Linear(36, 12), nn.Tanh(), nn.Linear(12, 3)]
    model = nn.Sequential(*layers).double()
    with torch.no_grad():
        for number, tensor in enumerate(model.state_dict().values()):
            if tensor.is_floating_point():
                steps = torch.arange(tensor.numel(), dtype=torch.float64) + 10 * number
                tensor.copy_((0.5 * (1.7 * steps).sin()).reshape(tensor.shape))
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_var.abs_()
    return model.eval()


def loader(batch_size: int = 5, **kwargs: Any) -> DataLoader:
    return DataLoader(TensorDataset(INPUTS, LABELS), batch_size=batch_size, **kwargs)


@dataclass(frozen=True)
class Case:
    """One fit.

    Attributes:
        structure: a key of ``STRUCTURES``.
        options: of the posterior.
        arguments: of ``fit``.
        network: which one.
        loaders: makes the loaders.
        adds: whether a second fit is added.
    """

    structure: str = "kron"
    options: dict[str, Any] = field(default_factory=dict)
    arguments: dict[str, Any] = field(default_factory=lambda: {"n_samples": 17})
    network: str = "images"
    loaders: Callable[[], dict[str, Any]] = lambda: {"train_loader": loader()}
    adds: bool = False

    def posterior(self) -> Any:
        """Before its fit."""
        subset, hessian = STRUCTURES[self.structure]
        return DebiasedLaplace(
            network(self.network), "classification", subset, hessian, **self.options
        )

    def fitted(self) -> Any:
        """After it."""
        la = self.posterior()
        la.fit(**self.loaders(), **self.arguments)
        if self.adds:
            la.fit(**self.loaders(), **self.arguments, override=False)
        return la


def streams() -> dict[str, Any]:
    return {"train_loader": list(loader(4)), "n_data": 40}


def two_loaders() -> dict[str, Any]:
    batches = list(loader(4))
    return {"train_loader": batches[:2], "magnitude_loader": batches[2:], "n_data": 40}


def both_indexed() -> dict[str, Any]:
    data = TensorDataset(INPUTS, LABELS)
    return {
        "train_loader": DataLoader(torch.utils.data.Subset(data, range(9)), batch_size=4),
        "magnitude_loader": DataLoader(torch.utils.data.Subset(data, range(9, 20)), batch_size=3),
        "n_data": 40,
    }


ALL: dict[str, Any] = {"n_samples": None}
CASES = {
    "cross fit": Case(),
    "everything": Case(arguments=ALL),
    "three folds": Case(options={"folds": 3}),
    "two batches": Case(options={"scheme": "two_batch", "direction_fraction": 0.3}),
    "one batch": Case(options={"scheme": "single"}),
    "uniform": Case(options={"sampling": "uniform"}),
    "uniform, two batches": Case(options={"sampling": "uniform", "scheme": "two_batch"}),
    "factors": Case(options={"magnitudes": "kfac"}),
    "factors, two batches": Case(options={"magnitudes": "kfac", "scheme": "two_batch"}),
    "factors, one batch": Case(options={"magnitudes": "kfac", "scheme": "single"}),
    "a backend": Case(options={"magnitudes": "kfac", "backend": CurvlinopsGGN}, network="wide"),
    "few rows": Case(network="wide"),
    "few rows, three folds": Case(options={"folds": 3}, network="wide"),
    "few rows, two batches": Case(options={"scheme": "two_batch"}, network="wide"),
    "few directions": Case(options={"max_rank": 4}, network="wide"),
    "a rank without samples": Case(arguments={"n_samples": 2}),
    "few rows, a rank without samples": Case(arguments={"n_samples": 2}, network="wide"),
    "label draws": Case(options={"fisher": "mc", "mc_samples": 2}),
    "label draws of everything": Case(options={"fisher": "mc", "folds": 3}, arguments=ALL),
    "empirical": Case(options={"fisher": "empirical"}),
    "two fits": Case(adds=True),
    "two uniform fits": Case(
        options={"sampling": "uniform"}, arguments={"n_samples": 9}, adds=True
    ),
    "shuffled": Case(loaders=lambda: {"train_loader": loader(shuffle=True)}, arguments=ALL),
    "small chunks": Case(options={"byte_budget": 4000}),
    "one stream": Case(arguments=ALL, loaders=streams),
    "two streams": Case(arguments=ALL, loaders=two_loaders),
    "two loaders": Case(arguments=ALL, loaders=both_indexed),
    "last layer": Case("kron_last_layer"),
    "last layer, everything": Case("kron_last_layer", arguments=ALL),
    "last layer, factors": Case("kron_last_layer", {"magnitudes": "kfac"}),
    "last layer, one batch": Case("kron_last_layer", {"scheme": "single"}),
    "last layer, label draws": Case("kron_last_layer", {"fisher": "mc"}),
    "last layer, two samples": Case("kron_last_layer", arguments={"n_samples": 2}),
    "low rank": Case("lowrank", {"rank": 12}, network="wide"),
    "low rank, everything": Case("lowrank", arguments=ALL, network="wide"),
    "low rank, one batch": Case("lowrank", {"scheme": "single"}, network="wide"),
    "low rank, two batches": Case("lowrank", {"scheme": "two_batch", "rank": 9}, network="wide"),
    "low rank, three folds": Case("lowrank", {"folds": 3, "sampling": "uniform"}, network="wide"),
    "low rank, label draws": Case("lowrank", {"fisher": "mc"}, network="wide"),
    "low rank, two samples": Case("lowrank", arguments={"n_samples": 2}, network="wide"),
    "low rank, two fits": Case("lowrank", {"rank": 12}, network="wide", adds=True),
    "low rank of a last layer": Case("lowrank_last_layer"),
    "products": Case("lowrank", {"rank": 4, "byte_budget": 4000}, network="wide"),
    "products, label draws": Case(
        "lowrank", {"rank": 3, "byte_budget": 4000, "fisher": "mc"}, network="wide"
    ),
    "products, two samples": Case(
        "lowrank", {"rank": 2, "byte_budget": 500}, {"n_samples": 2}, network="wide"
    ),
}


def numbers(la: Any) -> dict[str, Tensor]:
    """What a posterior says that does not depend on the signs of eigenvectors."""
    mean, covariance = la._glm_predictive_distribution(INPUTS)
    fit = la.fitted
    found = {
        "mean": mean,
        "covariance": covariance,
        "probabilities": la(INPUTS, link_approx="probit"),
        "evidence": la.log_marginal_likelihood().reshape(1),
        "loss": torch.tensor([fit.mean_loss, fit.effective_samples or 0.0]).double(),
        "sizes": torch.tensor([fit.n_samples, fit.n_data, fit.n_outputs, len(fit.drawn)]),
    }
    for index, part in enumerate(fit.comparisons):
        # Directions without curvature of their own come in any order, so that of ``other`` it is
        # the sum that is well defined.
        found[f"own of directions {index}"] = part.own
        found[f"other of directions {index}"] = part.other.sum()
    return {name: value.detach() for name, value in found.items()}


def state(la: Any) -> list[Tensor]:
    """All tensors of a fit."""
    return list(tensors_of(la._structure.to_state(la.fitted)))


def fits(rank: int, names: list[str]) -> dict[str, Any]:
    """Numbers of some cases, and what identifies their fits to the bit."""
    found = {}
    for name in names:
        try:
            la = CASES[name].fitted()
            found[name] = numbers(la), digest_of(state(la))
        except Exception as error:
            error.add_note(f"in the case {name!r}")
            raise
    return found


def validation(batch_size: int = 4, **kwargs: Any) -> DataLoader:
    """13 samples that are no part of what is fitted; the network is right on most of them."""
    inputs = -INPUTS[:13]
    with torch.no_grad():
        labels = network("wide")(inputs).argmax(-1)
    labels[::4] = (labels[::4] + 1) % 3
    return DataLoader(TensorDataset(inputs, labels), batch_size=batch_size, **kwargs)


def mean_brier(probs: Tensor, labels: Tensor) -> Tensor:
    return (probs - nn.functional.one_hot(labels, probs.shape[-1])).square().sum(-1).mean()


def _well_posed(result: Any) -> dict[str, Any] | None:
    """A tuning result without the smallest priors, of which rounding leaves little."""
    if result is None:
        return None
    found = asdict(result)
    kept = [prior >= 1e-2 for prior in result.prior_precisions]
    for name in ("prior_precisions", "losses"):
        found[name] = list(compress(found[name], kept))
    for link, losses in found["losses_by_link"].items():
        found["losses_by_link"][link] = list(compress(losses, kept))
    return found


def tunings(rank: int) -> dict[str, Any]:
    """What tunings, evaluations and comparisons say, in numbers."""
    found: dict[str, Any] = {}
    tuned = {
        "kron": CASES["few rows"],
        "low rank": CASES["low rank"],
        "last layer": Case("kron_last_layer", network="wide"),
    }
    for name, case in tuned.items():
        la = case.fitted()
        for what, arguments in {
            "links": {"val_loader": validation()},
            "one batch": {"val_loader": validation(99, shuffle=True)},
            "no refinement": {"val_loader": validation(), "refine": False, "grid_size": 7},
            "the same list": {"val_loader": list(validation()), "link_approx": "probit"},
            "a function": {"val_loader": validation(), "loss": mean_brier, "grid_size": 5},
            "a metric": {
                "val_loader": validation(),
                "loss": MulticlassCalibrationError(3, n_bins=5),
                "grid_size": 5,
                "refine": False,
            },
            "evidence": {"method": "marglik", "n_steps": 5},
        }.items():
            la.optimize_prior_precision(**arguments)
            found[f"{name}, {what}"] = {
                "tuned": la.prior_precision,
                "result": _well_posed(la.tuning_result),
                "link": la.tuned_link_approx,
            }
        la.prior_precision = 2.0
        for what, loader_ in {
            "loader": validation(),
            "shuffled": validation(5, shuffle=True),
            "list": list(validation()),
        }.items():
            scores = evaluate(la, loader_, ood_loader=[(2.3 * INPUTS[:11], LABELS[:11])])
            found[f"{name}, scores of a {what}"] = scores.to_dict()
        if name == "kron":
            compared = compare(la, validation(), validation(6), progress_bar=False, n_bins=5)
            found["comparison"] = compared.to_dict()
    regression = DebiasedLaplace(network("wide"), "regression", sigma_noise="residual")
    data = TensorDataset(INPUTS, INPUTS[:, :3].sin())
    regression.fit(DataLoader(data, batch_size=6), n_samples=None)
    regression.optimize_prior_precision(val_loader=DataLoader(data, batch_size=5))
    found["regression"] = {
        "tuned": regression.prior_precision,
        "result": _well_posed(regression.tuning_result),
    }
    regression.prior_precision = 2.0
    found["noise"] = regression.sigma_noise
    found["scores of a regression"] = evaluate(regression, DataLoader(data, 4)).to_dict()
    return found
