"""Our factory, and laplace-torch's own, which must find ours and keep finding its own."""

import os
import subprocess
import sys

import pytest
import torch
from laplace import FullLaplace, KronLaplace, KronLLLaplace, Laplace
from torch import nn

import laplace_debiased.posterior as rooms
from laplace_debiased.factory import DebiasedLaplace
from laplace_debiased.options import HessianStructure, SubsetOfWeights
from tests.zoo import mlp, problem

CLASSES = {
    ("all", "kron"): "DebiasedKronLaplace",
    ("last_layer", "kron"): "DebiasedKronLLLaplace",
    ("all", "lowrank"): "DebiasedLowRankLaplace",
    ("last_layer", "lowrank"): "DebiasedLowRankLLLaplace",
}


@pytest.mark.parametrize("likelihood", ["classification", "regression"])
@pytest.mark.parametrize(("subset", "structure"), CLASSES)
def test_both_factories_give_the_class(subset: str, structure: str, likelihood: str) -> None:
    model, name = mlp(), CLASSES[subset, structure]
    ours = DebiasedLaplace(model, likelihood, subset, structure, prior_precision=2.0)
    theirs = Laplace(model, likelihood, subset, f"debiased_{structure}", prior_precision=2.0)
    for la in (ours, theirs):
        assert type(la) is getattr(rooms, name)
        assert la.likelihood == likelihood
        assert type(la)._key == (subset, f"debiased_{structure}")
        assert la.prior_precision.item() == 2.0


def test_defaults_are_classification_all_weights_kronecker() -> None:
    la = DebiasedLaplace(mlp())
    assert type(la) is rooms.DebiasedKronLaplace
    assert la.likelihood == "classification"
    again = DebiasedLaplace(
        mlp(), subset_of_weights=SubsetOfWeights.ALL, hessian_structure=HessianStructure.KRON
    )
    assert type(again) is type(la)


@pytest.mark.parametrize(
    ("subset", "structure", "host"),
    [
        ("all", "kron", KronLaplace),
        ("last_layer", "kron", KronLLLaplace),
        ("all", "full", FullLaplace),
    ],
)
def test_laplace_torchs_keys_stay_its_own(subset: str, structure: str, host: type) -> None:
    assert type(Laplace(mlp(), "classification", subset, structure)) is host


@pytest.mark.parametrize("seed", ["0", "1", "2"])
def test_laplace_torchs_keys_stay_its_own_whatever_the_hash_seed(seed: str) -> None:
    code = (
        "import laplace_debiased.factory, laplace, torch\n"
        "m = torch.nn.Linear(2, 2)\n"
        "for s in ('all', 'last_layer'):\n"
        "    for h in ('kron', 'debiased_kron'):\n"
        "        print(type(laplace.Laplace(m, 'classification', s, h)).__name__)\n"
    )
    run = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code],
        env={**os.environ, "PYTHONHASHSEED": seed},
        capture_output=True,
        text=True,
        check=True,
    )
    assert run.stdout.split() == [
        "KronLaplace",
        "DebiasedKronLaplace",
        "KronLLLaplace",
        "DebiasedKronLLLaplace",
    ]


def test_every_concrete_posterior_has_a_key_of_its_own() -> None:
    classes = [getattr(rooms, name) for name in CLASSES.values()]
    assert all("_key" in vars(cls) for cls in classes)
    assert len({cls._key for cls in classes}) == len(classes)


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"subset_of_weights": "first_layer"}, "subset_of_weights must be one of 'all'"),
        ({"hessian_structure": "diag"}, "hessian_structure must be one of 'kron'"),
    ],
)
def test_unknown_kind_lists_the_choices(kwargs: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        DebiasedLaplace(mlp(), **kwargs)


@pytest.mark.parametrize(("subset", "structure"), CLASSES)
def test_every_kind_goes_from_fit_to_saved_state(subset: str, structure: str) -> None:
    p = problem("mlp", dtype=torch.float32)
    la = DebiasedLaplace(p.model, "classification", subset, structure)
    la.fit(p.loader(), n_samples=20)
    la.optimize_prior_precision(n_steps=3)
    probabilities = la(p.x)
    torch.testing.assert_close(probabilities.sum(-1), torch.ones(len(p.x)))
    other = DebiasedLaplace(p.model, "classification", subset, structure)
    other.load_state_dict(la.state_dict())
    assert torch.equal(other(p.x), probabilities)
    assert isinstance(la.model, nn.Module)
