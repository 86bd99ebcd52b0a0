"""The temperature baseline, the diagnostics and NewtonCG take what a posterior takes."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from laplace_debiased import directional_profile, fit_temperature
from laplace_debiased.calibration import collect_logits
from laplace_debiased.diagnostics import kfac_profile
from laplace_debiased.errors import ModelCallError
from laplace_debiased.optim import MiniBatches, NewtonCG, model_quadratic
from tests.network import models
from tests.network.test_structures import CASES, A, B, Items, Y, build
from tests.tolerances import assert_same
from tests.untouched import untouched

X = torch.cat([A, B], 1)
PLAIN = DataLoader(TensorDataset(X, Y), batch_size=5)
GRAM = {"solver": "gram", "derivatives": "reverse"}
LANCZOS = {"solver": "lanczos", "derivatives": "forward"}
HESSIAN = {"solver": "dense", "matrix": "hessian"}
SOME = ["tuple, one by one", "dict, keywords", "user dict, attributes", "hugging face"]
PROFILES = [(n, GRAM) for n in CASES] + [(n, o) for n in SOME for o in (LANCZOS, HESSIAN)]


def structured(name: str, batch_size: int = 5) -> tuple[nn.Module, DataLoader]:
    kind, make, collate_fn, _ = CASES[name]
    return build(kind), DataLoader(Items(make), batch_size=batch_size, collate_fn=collate_fn)


@pytest.mark.parametrize("name", CASES)
@pytest.mark.filterwarnings("ignore:the optimal temperature lies beyond")
def test_temperature_of_every_structure_is_that_of_tensors(name: str) -> None:
    model, loader = structured(name)
    with untouched(model):
        logits, labels = collect_logits(model, loader)
        fit = fit_temperature(model, loader)
    assert_same(logits, build(models.Twin)(X))
    assert torch.equal(labels, Y)
    expected = fit_temperature(build(models.Twin), PLAIN)
    assert fit.temperature == pytest.approx(expected.temperature, rel=1e-10)


@pytest.mark.parametrize(("name", "options"), PROFILES)
def test_profile_of_every_structure_is_that_of_tensors(name: str, options: dict[str, str]) -> None:
    model, loader = structured(name)
    first, second, _ = loader
    with untouched(model):
        profile = directional_profile(
            model, "classification", first, second, loader, k=3, **options
        )
    one, two, _ = PLAIN
    expected = directional_profile(
        build(models.Twin), "classification", one, two, PLAIN, k=3, **options
    )
    assert_same(profile.own.curvature.mean, expected.own.curvature.mean)
    assert_same(profile.reference.curvature.mean, expected.reference.curvature.mean)
    assert_same(profile.other.slope.mean, expected.other.slope.mean)


def pair_of(batch: Any) -> tuple[Any, Tensor]:
    return (batch[0], batch[1]) if isinstance(batch, list | tuple) else (batch, batch["labels"])


@pytest.mark.parametrize("curvature", ["ggn", "hessian"])
@pytest.mark.parametrize("name", CASES)
def test_quadratic_of_every_structure_is_that_of_tensors(name: str, curvature: str) -> None:
    model, loader = structured(name)
    loss, batches = nn.CrossEntropyLoss(), [pair_of(batch) for batch in loader]
    with untouched(model):
        quadratic = model_quadratic(model, loss, batches, curvature=curvature)
    expected = model_quadratic(build(models.Twin), loss, PLAIN, curvature=curvature)
    vector = torch.linspace(-1, 1, len(expected.gradient)).double()
    assert_same(quadratic.gradient, expected.gradient)
    assert_same(quadratic.product(vector), expected.product(vector))


@pytest.mark.parametrize("name", CASES)
def test_newton_step_of_every_structure_is_that_of_tensors(name: str) -> None:
    def stepped(model: nn.Module, loader: DataLoader) -> tuple[float, Tensor]:
        first, second, _ = (pair_of(batch) for batch in loader)
        optimizer = NewtonCG(model.parameters(), model, nn.CrossEntropyLoss())
        value = optimizer.step(lambda: MiniBatches(first, second))
        return value, torch.cat([p.detach().flatten() for p in model.parameters()])

    value, moved = stepped(*structured(name))
    expected, target = stepped(build(models.Twin), PLAIN)
    assert value == pytest.approx(expected, rel=1e-10)
    assert_same(moved, target)


def bert() -> tuple[nn.Module, list[dict[str, Tensor]]]:
    transformers = pytest.importorskip("transformers")
    config = transformers.BertConfig(
        vocab_size=50,
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=24,
        max_position_embeddings=12,
        num_labels=3,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = transformers.BertForSequenceClassification(config).double().eval()
    g = torch.Generator().manual_seed(0)
    batches = [
        {
            "input_ids": torch.randint(50, (4, 7), generator=g),
            "attention_mask": torch.arange(7).lt(torch.tensor([[7], [4], [5], [7]])).long(),
            "labels": torch.randint(3, (4,), generator=g),
        }
        for _ in range(3)
    ]
    return model, batches


def test_a_hugging_face_model_goes_through_all_of_them() -> None:
    model, batches = bert()
    with torch.no_grad():
        expected = torch.cat([model(b["input_ids"], b["attention_mask"]).logits for b in batches])
    with untouched(model):
        logits, labels = collect_logits(model, batches)
        assert_same(logits, expected)
        assert torch.equal(labels, torch.cat([b["labels"] for b in batches]))
        fitted = fit_temperature(model, batches)
        assert fitted == fit_temperature(logits, labels)
        options = {"solver": "gram"}, {"solver": "lanczos", "derivatives": "forward"}
        one, two = (
            directional_profile(
                model, "classification", batches[0], batches[1], batches, k=3, **option
            )
            for option in options
        )
        assert_same(one.reference.curvature.mean, two.reference.curvature.mean)
        assert kfac_profile(model, "classification", *batches[:2], batches).blocks
    optimizer = NewtonCG(model.parameters(), model, nn.CrossEntropyLoss(), damping=0.1)
    first, second, _ = (pair_of(batch) for batch in batches)
    before = optimizer.step(lambda: MiniBatches(first, second))
    assert optimizer.last_step.loss_after < before


def test_what_cannot_be_taken_is_named() -> None:
    model, loader = structured("dict, keywords")
    batch = next(iter(loader))
    with pytest.raises(TypeError, match=r"pair a mapping with its labels: \(batch, "):
        model_quadratic(model, nn.CrossEntropyLoss(), [batch])
    wrong = {"a": A[:, :2], "b": B, "labels": Y}
    for call in (
        lambda: fit_temperature(model, [wrong]),
        lambda: directional_profile(model, "classification", wrong, wrong),
    ):
        with pytest.raises(ModelCallError, match=r"the model failed on inputs .*'a': \(13, 2\)"):
            call()
