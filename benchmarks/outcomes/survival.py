"""Down to which prior precision a posterior survives, by scheme: where curvature matters.

A network that does not interpolate its data (few epochs, noisy labels) has curvature along many
directions. With a small prior, predictions then stand or fall with the magnitudes along the
directions that a mini-batch chose (the paper's Figure 6).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from laplace.utils.enums import LinkApprox
from matplotlib.figure import Figure
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset
from tqdm import tqdm

from benchmarks.common.digits import network, shuffled_digits
from benchmarks.common.tables import table
from laplace_debiased import DebiasedLaplace, evaluate
from laplace_debiased.predictive.probabilities import class_probabilities

N_TRAIN = 1_200
SURVIVED = 0.5
"""Nats by which the NLL of a posterior that survives may exceed the MAP model's."""

SCHEMES: dict[str, dict[str, Any]] = {
    "single, kfac (laplace-torch's)": {"scheme": "single", "magnitudes": "kfac"},
    "single, ggn": {"scheme": "single", "magnitudes": "ggn"},
    "two_batch, kfac (the paper)": {"scheme": "two_batch", "magnitudes": "kfac"},
    "two_batch, ggn": {"scheme": "two_batch", "magnitudes": "ggn"},
    "cross_fit, ggn, uniform": {"sampling": "uniform"},
    "cross_fit, ggn (default)": {},
}


@dataclass(frozen=True)
class Curve:
    """NLL and ECE of one scheme against the prior precision, means over draws."""

    scheme: str
    nll: list[float]
    ece: list[float]

    def survives(self, priors: Sequence[float], map_nll: float) -> float:
        """The smallest prior from which on the NLL is nowhere far above the MAP model's."""
        smallest = math.inf
        for prior, loss in sorted(zip(priors, self.nll, strict=True), reverse=True):
            if loss > map_nll + SURVIVED:
                break
            smallest = prior
        return smallest


@dataclass(frozen=True)
class Survival:
    """Curves of all schemes, and the MAP model's figures."""

    priors: list[float]
    curves: list[Curve]
    map_nll: float
    map_ece: float
    about: str

    def to_dict(self) -> dict[str, Any]:
        """Plain numbers."""
        return asdict(self)


def measure(budget: int, draws: int, epochs: int, label_noise: float, seed: int = 0) -> Survival:
    """Train the network, fit every scheme, and sweep the prior."""
    x, y, generator = shuffled_digits(seed)
    wrong = torch.rand(len(y), generator=generator) < label_noise
    y = torch.where(wrong, torch.randint(10, y.shape, generator=generator), y)
    train, test = (x[:N_TRAIN], y[:N_TRAIN]), (x[N_TRAIN:], y[N_TRAIN:])
    model = _trained(*train, epochs=epochs, seed=seed)
    priors = torch.logspace(-3, 5, 17)
    loader = DataLoader(TensorDataset(*train), batch_size=64)
    curves = []
    for name, options in tqdm(SCHEMES.items(), desc="schemes"):
        scores = []
        for draw in range(draws):
            la = DebiasedLaplace(model, **options)
            la.fit(loader, n_samples=budget, seed=draw)
            scores.append([_score(p, test[1]) for p in _swept(la, test[0], priors)])
        means = torch.tensor(scores, dtype=torch.float64).mean(0)
        curves.append(Curve(name, means[:, 0].tolist(), means[:, 1].tolist()))
    with torch.no_grad():
        nll, ece = _score(model(test[0]).softmax(-1), test[1])
        train_nll = float(nn.functional.cross_entropy(model(train[0]), train[1]))
    about = (
        f"digits, a CNN of {sum(p.numel() for p in model.parameters())} parameters after {epochs} "
        f"epochs with {100 * label_noise:.0f} % random labels: training NLL {train_nll:.3f}, test "
        f"NLL {nll:.3f}. Curvature from {budget} of {N_TRAIN} samples, means of {draws} draws."
    )
    return Survival(priors.tolist(), curves, nll, ece, about)


def _trained(x: Tensor, y: Tensor, epochs: int, seed: int) -> nn.Module:
    model = network("pooled-relu", seed)
    optimiser = torch.optim.Adam(model.parameters(), 3e-3)
    generator = torch.Generator().manual_seed(seed)
    for _ in range(epochs):
        for batch in torch.randperm(len(x), generator=generator).split(64):
            optimiser.zero_grad()
            nn.functional.cross_entropy(model(x[batch]), y[batch]).backward()
            optimiser.step()
    model.zero_grad()
    return model.eval()


def _swept(la: Any, x: Tensor, priors: Tensor) -> list[Tensor]:
    """Probabilities [n, C] under every prior."""
    parts: list[list[Tensor]] = [[] for _ in priors]
    for inputs in x.split(128):
        swept = la.predictor.sweep(inputs, torch.ones(1), priors, diagonal=False)
        for part, covariance in zip(parts, swept.covariances, strict=True):
            part.append(class_probabilities(swept.outputs, covariance, LinkApprox.MC, 256))
    return [torch.cat(part) for part in parts]


def _score(probs: Tensor, labels: Tensor) -> tuple[float, float]:
    found = evaluate(probs, labels)
    return found.nll, float(found.ece or 0.0)


def markdown(found: Survival) -> str:
    """The table, and the smallest prior that each scheme survives."""
    shown = [p for p in found.priors if abs(math.log10(p) - round(math.log10(p))) < 1e-3]
    head = ["NLL (ECE %) at prior", *(f"{p:.0e}" for p in shown), "survives down to"]
    body = []
    for curve in found.curves:
        cells = [
            f"{curve.nll[k]:.3f} ({100 * curve.ece[k]:.1f})" for k in map(found.priors.index, shown)
        ]
        smallest = curve.survives(found.priors, found.map_nll)
        body.append([curve.scheme, *cells, "–" if math.isinf(smallest) else f"{smallest:.2g}"])
    return "\n\n".join(
        [
            "## Where curvature matters: the smallest prior that a scheme survives",
            f"{found.about} The MAP model's ECE: {100 * found.map_ece:.1f} %. Survival: an NLL at "
            f"most {SURVIVED:g} nats above the MAP model's, at this prior and at all larger ones.",
            table(head, body),
        ]
    )


def figure(found: Survival) -> Figure:
    """NLL and ECE against the prior precision."""
    drawn = Figure(figsize=(11.0, 4.4), layout="constrained")
    left, right = drawn.subplots(1, 2)
    for curve in found.curves:
        left.plot(found.priors, curve.nll, marker=".", label=curve.scheme)
        right.plot(found.priors, [100 * e for e in curve.ece], marker=".", label=curve.scheme)
    left.axhline(found.map_nll, color="0.4", linestyle="--", label="MAP")
    right.axhline(100 * found.map_ece, color="0.4", linestyle="--")
    left.set(xscale="log", xlabel="prior precision", ylabel="NLL (nats)")
    right.set(xscale="log", xlabel="prior precision", ylabel="ECE (%)")
    left.legend(frameon=False, fontsize="small")
    for axis in (left, right):
        axis.spines[["top", "right"]].set_visible(False)
    return drawn
