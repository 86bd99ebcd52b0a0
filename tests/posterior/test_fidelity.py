"""At equal budget and prior, ours is closer to the full-data posterior than laplace-torch's.

The reference is the Kronecker posterior with exact magnitudes on all training data; it shares our
structure, so KL to the dense GGN posterior is printed beside it, whoever wins there.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass

import pytest
import torch
from laplace import FullLaplace, KronLaplace
from laplace.utils.matrix import Kron
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.utils.data import DataLoader, Subset, TensorDataset

from laplace_debiased.posterior import DebiasedKronLaplace

PRIOR, BUDGET, DRAWS, N_TRAIN = 1.0, 64, 5, 1200


@dataclass(frozen=True)
class Digits:
    model: nn.Module
    train: TensorDataset
    test_inputs: Tensor

    @property
    def loader(self) -> DataLoader:
        return DataLoader(self.train, batch_size=200)


@pytest.fixture(scope="module")
def digits() -> Digits:
    """A small CNN, trained for a few seconds."""
    raw = load_digits()
    x = torch.tensor(raw.images, dtype=torch.float32).unsqueeze(1) / 16
    y = torch.tensor(raw.target)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        order = torch.randperm(len(x))
        x, y = x[order], y[order]
        model = nn.Sequential(
            nn.Conv2d(1, 6, 3, stride=2, padding=1),
            nn.ReLU(),
            nn.Conv2d(6, 8, 3, stride=2, padding=1),
            nn.ReLU(),
            nn.Flatten(),
            nn.Linear(32, 10),
        )
        train = TensorDataset(x[:N_TRAIN], y[:N_TRAIN])
        optimizer = torch.optim.Adam(model.parameters(), lr=5e-3)
        for _ in range(25):
            for inputs, labels in DataLoader(train, batch_size=50, shuffle=True):
                optimizer.zero_grad()
                nn.functional.cross_entropy(model(inputs), labels).backward()
                optimizer.step()
        optimizer.zero_grad()
    return Digits(model, train, x[N_TRAIN : N_TRAIN + 80])


def kl(reference: Tensor, other: Tensor) -> float:
    """Mean over inputs of KL(reference ‖ other) in nats."""
    return float((reference * (reference.log() - other.log())).sum(-1).mean())


def host_prediction(la: KronLaplace, x: Tensor) -> Tensor:
    return torch.cat([la(part, link_approx="probit") for part in x.split(25)])


def host_on_subset(digits: Digits, index: Tensor) -> dict[str, Tensor]:
    """laplace-torch on a Subset, as it comes (scaled to m) and rescaled to N."""
    model = copy.deepcopy(digits.model)
    la = KronLaplace(model, "classification", prior_precision=PRIOR)
    la.fit(DataLoader(Subset(digits.train, index.tolist()), batch_size=200))
    plain = host_prediction(la, digits.test_inputs)
    scale = N_TRAIN / len(index)
    la.H_facs = Kron([[f[0] * scale, *f[1:]] for f in la.H_facs.kfacs])
    la.H = la.H_facs.decompose()
    return {"host, as it comes": plain, "host, rescaled": host_prediction(la, digits.test_inputs)}


def ours(digits: Digits, n_samples: int | None, seed: int = 0, **options: str) -> Tensor:
    la = DebiasedKronLaplace(digits.model, prior_precision=PRIOR, **options)
    la.fit(digits.loader, n_samples=n_samples, seed=seed)
    return la(digits.test_inputs, link_approx="probit")


def test_cross_fit_is_closer_to_the_full_data_posterior_than_laplace_torch(
    digits: Digits, capsys: pytest.CaptureFixture[str]
) -> None:
    """Five draws of 64 of 1 200 samples, seeds 0 to 4; ours must win against both, every draw."""
    full = FullLaplace(copy.deepcopy(digits.model), "classification", prior_precision=PRIOR)
    full.fit(digits.loader)
    references = {
        "Kronecker, exact, all data": ours(digits, None, scheme="single", magnitudes="ggn"),
        "dense GGN, all data": host_prediction(full, digits.test_inputs),
    }
    figures: dict[str, dict[str, list[float]]] = {}
    for seed in range(DRAWS):
        order = torch.randperm(N_TRAIN, generator=torch.Generator().manual_seed(seed))
        candidates = host_on_subset(digits, order[:BUDGET])
        for scheme in ("cross_fit", "two_batch", "single"):
            name = f"ours, {scheme}, ggn"
            candidates[name] = ours(digits, BUDGET, seed, scheme=scheme, magnitudes="ggn")
        for name, probabilities in candidates.items():
            row = figures.setdefault(name, {reference: [] for reference in references})
            for reference, target in references.items():
                row[reference].append(kl(target, probabilities))
    everything = ours(digits, None, scheme="cross_fit", magnitudes="ggn")
    figures["ours, cross_fit, ggn, all data"] = {
        name: [kl(target, everything)] for name, target in references.items()
    }
    with capsys.disabled():
        print(f"\nKL in nats to {' | '.join(references)} (mean over draws of {BUDGET})")
        for name, row in figures.items():
            means = (sum(v) / len(v) for v in row.values())
            print(f"  {name:<32}" + " | ".join(f"{m:.5f}" for m in means))
    main = next(iter(references))
    for host in ("host, as it comes", "host, rescaled"):
        for mine, theirs in zip(
            figures["ours, cross_fit, ggn"][main], figures[host][main], strict=True
        ):
            assert mine < theirs
