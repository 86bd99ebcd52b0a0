"""Tuples, lists, mappings and keyword models give the posterior of the plain tensor model."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, TensorDataset

from laplace_debiased.factory import DebiasedLaplace
from laplace_debiased.network.inputs import (
    batch_length,
    call_arguments,
    select_rows,
    tensor_shapes,
    to_device,
)
from tests.network import models
from tests.tolerances import assert_same
from tests.untouched import untouched

G = torch.Generator().manual_seed(0)
A, B = torch.randn(13, 4, generator=G).double(), torch.randn(13, 2, generator=G).double()
Y = torch.randint(3, (13,), generator=G)


def build(kind: type[nn.Module]) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        return kind().double()


class Items(Dataset):
    """Samples of the structure that ``make`` gives."""

    def __init__(self, make: Any) -> None:
        self.make = make

    def __len__(self) -> int:
        return len(Y)

    def __getitem__(self, i: int) -> Any:
        return self.make(i)


def pairs(i: int) -> Any:
    return (A[i], B[i]), Y[i]


def lists(i: int) -> Any:
    return [A[i], B[i]], Y[i]


def dicts(i: int) -> Any:
    return {"a": A[i], "b": B[i], "labels": Y[i]}


def dict_pairs(i: int) -> Any:
    return {"a": A[i], "b": B[i]}, Y[i]


def collate(samples: Any) -> models.Batch:
    stacked = torch.utils.data.default_collate(samples)
    return models.Batch({**stacked, "name": "not a tensor", "scale": torch.tensor(2.0)})


CASES = {
    "tuple, called whole": (models.OneTuple, pairs, None, lambda: (A, B)),
    "tuple, one by one": (models.TwoArguments, pairs, None, lambda: (A, B)),
    "list, one by one": (models.TwoArguments, lists, None, lambda: [A, B]),
    "tuple, second optional": (models.OptionalSecond, pairs, None, lambda: (A, B)),
    "tuple, any number": (models.AnyNumber, pairs, None, lambda: (A, B)),
    "dict, called whole": (models.OneMapping, dicts, None, lambda: {"a": A, "b": B}),
    "dict, keywords": (models.Keywords, dicts, None, lambda: {"a": A, "b": B}),
    "dict beside its labels": (models.Keywords, dict_pairs, None, lambda: {"a": A, "b": B}),
    "dict, only keywords": (models.OnlyKeywords, dicts, None, lambda: {"a": A, "b": B}),
    "hugging face": (models.HuggingFaceStyle, dicts, None, lambda: {"a": A, "b": B}),
    "user dict": (models.OneMapping, dicts, collate, lambda: models.Batch({"a": A, "b": B})),
    "user dict, attributes": (models.OneBatch, dicts, collate, lambda: models.Batch(a=A, b=B)),
    "user dict, keywords": (models.Keywords, dicts, collate, lambda: models.Batch(a=A, b=B)),
}
POSTERIORS = [(s, h) for s in ("all", "last_layer") for h in ("kron", "lowrank")]


def reference(subset: str, structure: str) -> tuple[Any, Tensor]:
    la = DebiasedLaplace(build(models.Twin), "classification", subset, structure)
    x = torch.cat([A, B], 1)
    la.fit(DataLoader(TensorDataset(x, Y), batch_size=5))
    return la, la(x, link_approx="probit")


REFERENCES = {pair: reference(*pair) for pair in POSTERIORS}


@pytest.mark.parametrize(("subset", "structure"), POSTERIORS)
@pytest.mark.parametrize("name", CASES)
def test_every_structure_gives_the_tensor_models_posterior(
    name: str, subset: str, structure: str
) -> None:
    """With the smallest budget of memory, where every batch is cut into samples."""
    kind, make, collate_fn, x = CASES[name]
    model, budget = build(kind), 1 if structure == "kron" else 2**20
    loader = DataLoader(Items(make), batch_size=5, collate_fn=collate_fn)
    expected, probs = REFERENCES[subset, structure]
    with untouched(model):
        la = DebiasedLaplace(model, "classification", subset, structure, byte_budget=budget)
        la.fit(loader)
        assert_same(la(x(), link_approx="probit"), probs)
    assert float(la.log_marginal_likelihood()) == pytest.approx(
        float(expected.log_marginal_likelihood()), rel=1e-9
    )


@pytest.mark.parametrize("structure", ["kron", "lowrank"])
@pytest.mark.parametrize("name", ["tuple, one by one", "dict, called whole", "hugging face"])
def test_tuning_and_sampled_networks_take_every_structure(name: str, structure: str) -> None:
    kind, make, collate_fn, x = CASES[name]
    loader = DataLoader(Items(make), batch_size=5, collate_fn=collate_fn)
    la = DebiasedLaplace(build(kind), "classification", "all", structure)
    la.fit(loader)
    grid = {"grid_size": 3, "log_prior_prec_min": -1, "log_prior_prec_max": 2}
    la.optimize_prior_precision(val_loader=loader, **grid)
    la.optimize_prior_precision("nn", val_loader=loader, n_samples=2, **grid)
    g = torch.Generator().manual_seed(0)
    probs = la(x(), pred_type="nn", link_approx="mc", n_samples=3, generator=g)
    assert_same(probs.sum(-1), torch.ones(13).double())


@pytest.mark.parametrize("name", ["tuple, one by one", "dict, keywords", "user dict"])
def test_budgets_draw_from_structured_data(name: str) -> None:
    kind, make, collate_fn, x = CASES[name]
    loader = DataLoader(Items(make), batch_size=5, collate_fn=collate_fn)
    la = DebiasedLaplace(build(kind))
    la.fit(loader, n_samples=8)
    plain = DebiasedLaplace(build(models.Twin))
    plain.fit(DataLoader(TensorDataset(torch.cat([A, B], 1), Y), batch_size=5), n_samples=8)
    assert_same(la(x()), plain(torch.cat([A, B], 1)))


def test_labels_under_another_key() -> None:
    loader = DataLoader(Items(lambda i: {"a": A[i], "b": B[i], "target": Y[i]}), batch_size=5)
    la = DebiasedLaplace(build(models.OneMapping), dict_key_y="target")
    la.fit(loader)
    assert_same(la({"a": A, "b": B}, link_approx="probit"), REFERENCES["all", "kron"][1])
    with pytest.raises(ValueError, match="no key dict_key_y='labels'"):
        DebiasedLaplace(build(models.OneMapping)).fit(loader)


def test_a_tokenizers_batch_encoding() -> None:
    tokenization = pytest.importorskip("transformers.tokenization_utils_base")
    encode = tokenization.BatchEncoding
    loader = [
        encode({"a": A[i : i + 5], "b": B[i : i + 5], "labels": Y[i : i + 5]})
        for i in range(0, 13, 5)
    ]
    la = DebiasedLaplace(build(models.OneBatch))
    la.fit(loader, n_data=13)
    other = DebiasedLaplace(build(models.Twin))
    other.fit([(torch.cat([b["a"], b["b"]], 1), b["labels"]) for b in loader], n_data=13)
    assert_same(la(encode({"a": A, "b": B})), other(torch.cat([A, B], 1)))


def test_lora_covers_what_requires_gradients_and_nothing_else() -> None:
    model = build(models.Twin)
    model.left = models.LoRALinear(model.left, 2).double()
    model.right.requires_grad_(False)
    model.head.requires_grad_(False)
    la = DebiasedLaplace(model, strict=True)
    la.fit(DataLoader(TensorDataset(torch.cat([A, B], 1), Y), batch_size=5))
    assert la.coverage.covered == ("left.down.weight", "left.up.weight")
    assert la.n_params == 2 * 4 + 5 * 2
    assert la(torch.cat([A, B], 1)).shape == (13, 3)


def test_calls_follow_the_signature() -> None:
    args, kwargs = call_arguments(models.HuggingFaceStyle(), {"a": A, "b": B, "labels": Y, "id": 1})
    assert (args, list(kwargs)) == ((), ["a", "b"])
    assert call_arguments(models.OneTuple(), (A,)) == (((A,),), {})
    assert call_arguments(nn.Linear(1, 1), {"x": A})[0][0]["x"] is A
    assert call_arguments(models.TwoArguments(), A) == ((A,), {})


def test_cutting_and_moving_keep_the_structure() -> None:
    x = {"a": A, "rest": (B, torch.tensor(3.0), "text"), "flag": True, "size": torch.zeros(2)}
    part = select_rows(x, slice(2, 4))
    assert part["a"].shape == (2, 4)
    assert part["rest"][0].shape == (2, 2)
    assert part["rest"][1:] == (torch.tensor(3.0), "text")
    assert part["size"].shape == (2,)
    assert part["flag"] is True
    batch = models.Batch(a=A, b=B)
    assert isinstance(select_rows(batch, torch.tensor([1, 3])), models.Batch)
    assert isinstance(to_device(batch, torch.device("cpu")), models.Batch)
    assert batch_length(batch) == 13
    assert hash(tensor_shapes(x)) == hash(tensor_shapes(select_rows(x, slice(0, 5))))
    with pytest.raises(TypeError, match="got list"):
        batch_length(["a", "b"])


@pytest.mark.parametrize("kind", [nn.Embedding, nn.EmbeddingBag])
@pytest.mark.parametrize(("subset", "structure"), POSTERIORS)
def test_a_layer_that_overwrites_its_weight_is_refused_before_it_does(
    subset: str, structure: str, kind: type[nn.Module]
) -> None:
    flat = nn.Flatten() if kind is nn.Embedding else nn.Identity()
    model = nn.Sequential(kind(9, 4, max_norm=0.5), flat, nn.LazyLinear(3))
    loader = DataLoader(TensorDataset(torch.arange(18).reshape(9, 2) % 9, torch.arange(9) % 3))
    table = model[0]
    table.max_norm = None
    model(torch.zeros(1, 2, dtype=torch.int64))
    table.max_norm = 0.5
    la = DebiasedLaplace(model, "classification", subset, structure)
    with (
        untouched(model),
        pytest.raises(ValueError, match=r"layer '(model\.)?0' .*max_norm=0\.5: its"),
    ):
        la.fit(loader)
    table.weight.data.renorm_(2.0, 0, 0.5)  # as the message says
    expected, table.max_norm = model(loader.dataset[:][0]), None
    assert torch.equal(model(loader.dataset[:][0]), expected)
    la = DebiasedLaplace(model, "classification", subset, structure)
    with untouched(model):
        la.fit(loader)
        la(loader.dataset[:][0])
