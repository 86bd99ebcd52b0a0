"""Sketched columns: unbiased, the same in every chunking, and what fits of many classes take."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from laplace_debiased import DebiasedLaplace
from laplace_debiased.curvature import BackwardPass, operation_coverage
from laplace_debiased.likelihoods import loss_model, models, sketched_columns
from laplace_debiased.options import CurvatureOptions, Sampling
from tests.likelihoods.problems import case
from tests.tolerances import assert_exact, assert_same, relative_error
from tests.zoo import mlp

LIKELIHOODS = ["classification", "bernoulli", "regression"]


def outputs_and_targets(likelihood: str, shape: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    g = torch.Generator().manual_seed(0)
    outputs = 3 * torch.randn(*shape, generator=g, dtype=torch.float64)
    if likelihood == "classification":
        return outputs, torch.randint(shape[-1], shape[:-1], generator=g)
    return outputs, torch.rand(shape, generator=g).double()


@pytest.mark.parametrize("likelihood", LIKELIHOODS)
def test_products_are_those_of_the_root(likelihood: str) -> None:
    """Also where one class has all of the probability but for 1e-17."""
    model = loss_model(likelihood)
    outputs, _ = outputs_and_targets(likelihood, (6, 5))
    outputs[0, 2], outputs[1, 0] = 40.0, 40.0
    root = model.hessian_root(outputs)
    z = torch.randn(6, 5, 3, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    product = model.root_product(outputs, z)
    expected = root @ z[:, : root.shape[-1]]
    for actual, wanted in zip(product, expected, strict=True):
        assert_exact(actual, wanted)


def every_sign(n: int) -> list[Tensor]:
    return [torch.tensor(s, dtype=torch.int8) for s in itertools.product((-1, 1), repeat=n)]


@pytest.mark.parametrize("likelihood", LIKELIHOODS)
@pytest.mark.parametrize("n_columns", [1, 2])
def test_the_mean_over_all_signs_is_the_loss_hessian(
    likelihood: str, n_columns: int, monkeypatch
) -> None:
    model = loss_model(likelihood)
    outputs, targets = outputs_and_targets(likelihood, (4, 3))
    root = model.hessian_root(outputs)
    everything = every_sign(3 * n_columns)
    total = torch.zeros(4, 3, 3, dtype=torch.float64)
    for z in everything:
        monkeypatch.setattr(
            models, "signs", lambda seeds, shape, z=z: z.reshape(shape).expand(4, *shape)
        )
        columns = sketched_columns(model, outputs, targets, torch.arange(4), n_columns)
        assert columns.shape == (4, 3, n_columns)
        total += columns @ columns.mT / len(everything)
    assert_exact(total, root @ root.mT)


@pytest.mark.parametrize("name", ["sequence", "sequence ignoring"])
def test_the_mean_over_all_signs_is_the_networks_ggn(name: str, monkeypatch) -> None:
    """Through the network, at 3 positions of 3 classes: 2⁶ signs, the last class reads none."""
    c = case(name, n=4)
    names = [n for n, _ in c.model.named_parameters()]
    loss = loss_model("classification", positions=True, ignore_index=c.options.get("ignore_index"))
    engine = BackwardPass(c.model, operation_coverage(c.model).covered)
    total = torch.zeros_like(c.ggn())
    everything = every_sign(6)
    for z in everything:
        padded = torch.cat([z.reshape(3, 2), torch.ones(3, 1, dtype=torch.int8)], 1)
        monkeypatch.setattr(
            models,
            "signs",
            lambda seeds, shape, z=padded: z.reshape(shape).expand(len(seeds), *shape),
        )

        def columns(outputs: Tensor, rows: slice) -> Tensor:
            return sketched_columns(loss, outputs, c.y[rows], torch.arange(4)[rows], 1)

        for chunk in engine.chunks(c.x, columns, n_columns=1):
            parts = {name: block.gradients() for name, block in chunk.blocks}
            rows = torch.cat([parts[n] for n in names], dim=-1).flatten(0, 1)
            total += rows.T @ rows / len(everything)
    assert_exact(total, c.ggn())


def many_classes(n_classes: int, n: int = 24) -> tuple[nn.Module, TensorDataset]:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = mlp(n_classes).double()
        x = torch.randn(n, 4, dtype=torch.float64)
        y = torch.randint(n_classes, (n,))
    return model, TensorDataset(x, y)


@pytest.mark.parametrize("structure", ["kron", "lowrank"])
def test_chunks_change_nothing(structure: str) -> None:
    model, data = many_classes(70)
    fits = []
    for budget, batch in ((1, 4), (2**30, 4)) if structure == "kron" else ((2**30, 4), (2**30, 12)):
        options = {"rank": 3} if structure == "lowrank" else {}
        la = DebiasedLaplace(model, hessian_structure=structure, byte_budget=budget, **options)
        la.fit(DataLoader(data, batch_size=batch), n_samples=None)
        fits.append(la(data.tensors[0], link_approx="probit"))
    assert_same(*fits)


def test_many_classes_are_sketched_and_few_are_not() -> None:
    options = CurvatureOptions(sampling=Sampling.UNIFORM)
    assert options.sketched(64) is None
    assert options.sketched(65) == 2
    assert CurvatureOptions(sampling=Sampling.UNIFORM, columns=None).sketched(10**6) is None
    assert CurvatureOptions(sampling=Sampling.UNIFORM, columns=5).sketched(10) == 5
    assert CurvatureOptions(sampling=Sampling.UNIFORM, columns=5).sketched(5) is None
    assert CurvatureOptions(sampling=Sampling.UNIFORM, fisher="mc").sketched(100) is None
    for bad in ("all", 0, 1.5):
        with pytest.raises((ValueError, TypeError), match="columns must be"):
            CurvatureOptions(sampling=Sampling.UNIFORM, columns=bad)


def test_the_default_fit_pulls_two_columns_back() -> None:
    seen: list[int] = []

    class Counting(BackwardPass):
        def chunks(self, inputs, columns, *, n_columns=None, **options):
            seen.append(n_columns)
            return super().chunks(inputs, columns, n_columns=n_columns, **options)

    model, data = many_classes(70)
    la = DebiasedLaplace(model)
    original = la._structure.engine

    def engine(target, coverage):
        found = original(target, coverage)
        return Counting(found.model, found.names, found.byte_budget)

    object.__setattr__(la._structure, "engine", engine)
    la.fit(DataLoader(data, batch_size=12), n_samples=None)
    assert set(seen) == {2}


def test_more_columns_come_closer_to_all() -> None:
    """Directional curvatures of one batch along a fixed basis; seed 0, 40 and 1 columns."""
    model, data = many_classes(70, n=8)
    tables = {}
    for columns in (None, 1, 40):
        la = DebiasedLaplace(model, scheme="single", magnitudes="kfac", columns=columns)
        la.fit(DataLoader(data, batch_size=8), n_samples=None)
        tables[columns] = torch.cat([f.diagonal() for b in la.H_facs.kfacs for f in b[:1]])
    few, many = (relative_error(tables[r], tables[None]) for r in (1, 40))
    assert many < 0.2
    assert many < few / 2


def test_the_choice_is_saved(tmp_path) -> None:
    model, data = many_classes(9)
    for columns in (None, 7, "auto"):
        la = DebiasedLaplace(model, columns=columns)
        la.fit(DataLoader(data, batch_size=12), n_samples=None)
        la.save(tmp_path / "la.pt")
        restored = DebiasedLaplace.load(tmp_path / "la.pt", model)
        assert restored.arguments.options.columns == columns


def test_the_default_budget_has_more_samples_of_fewer_columns() -> None:
    for n_classes, expected in ((70, 768), (9, 256)):
        model, data = many_classes(n_classes, n=800)
        la = DebiasedLaplace(model, sampling="uniform")
        la.fit(DataLoader(data, batch_size=100))
        assert la.fitted.n_samples == expected
