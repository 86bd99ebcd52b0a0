"""``dict_key_x``: the entry of a mapping that a model takes, or a mapping that it takes whole."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, TensorDataset

from laplace_debiased import DebiasedLaplace, compare, evaluate
from laplace_debiased.calibration import fit_temperature
from laplace_debiased.errors import ArgumentTypeError, ModelCallError
from laplace_debiased.network.entry import OneEntry
from tests.tolerances import assert_same
from tests.untouched import untouched

G = torch.Generator().manual_seed(0)
X = torch.randn(24, 4, generator=G).double()
Y = torch.arange(24) % 3
POSTERIORS = [(s, h) for s in ("all", "last_layer") for h in ("kron", "lowrank")]


class Takes(nn.Module):
    """Logits of one tensor [m, 4]."""

    def __init__(self) -> None:
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(1)
            self.net = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)).double()
        self.given: list[Any] = []

    def forward(self, x: Any) -> Tensor:
        """Keep what it was given, and compute."""
        self.given.append(x)
        return self.net(x)


class TakesWhole(Takes):
    """Reads its entry itself, as laplace-torch's models do."""

    def forward(self, x: Any) -> Tensor:
        self.given.append(x)
        return self.net(x["image"])


class NamesIt(Takes):
    """Names the key in its signature."""

    def forward(self, image: Any) -> Tensor:
        self.given.append(image)
        return self.net(image)


class Items(Dataset):
    """Samples as mappings."""

    def __len__(self) -> int:
        return len(Y)

    def __getitem__(self, i: int) -> Any:
        return {"labels": Y[i], "image": X[i], "id": i}


KEYED = DataLoader(Items(), batch_size=5)
PLAIN = DataLoader(TensorDataset(X, Y), batch_size=5)
SEARCH = {"grid_size": 3, "log_prior_prec_min": -1, "log_prior_prec_max": 2}


def fitted(model: nn.Module, loader: DataLoader, subset: str, structure: str) -> Any:
    la = DebiasedLaplace(model, "classification", subset, structure, dict_key_x="image")
    la.fit(loader, n_samples=12)
    return la


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize(("subset", "structure"), POSTERIORS)
@pytest.mark.parametrize("kind", [Takes, TakesWhole, NamesIt])
def test_every_call_reads_the_entry(
    kind: type[Takes], subset: str, structure: str, tmp_path: Any
) -> None:
    """As the plain tensors' posterior in fits, predictions, tuning, scores and files."""
    expected = fitted(Takes(), PLAIN, subset, structure)
    model = kind()
    with untouched(model):
        la = fitted(model, KEYED, subset, structure)
        x, labelled = {"image": X}, {"labels": Y, "image": X}
        for one in (la, expected):
            one.optimize_prior_precision(val_loader=KEYED if one is la else PLAIN, **SEARCH)
        assert_same(la.prior_precision, expected.prior_precision)
        assert_same(la(x), expected(X))
        assert_same(la(labelled), expected(X))
        for draw in ("functional_samples", "predictive_samples"):
            g, h = (torch.Generator().manual_seed(3) for _ in range(2))
            assert_same(
                getattr(la, draw)(x, n_samples=2, generator=g),
                getattr(expected, draw)(X, n_samples=2, generator=h),
            )
        g, h = (torch.Generator().manual_seed(3) for _ in range(2))
        assert_same(la(x, "nn", generator=g), expected(X, "nn", generator=h))
        assert la.outputs_report(x) == expected.outputs_report(X)
        far = {"image": 9 * X}
        scores = (
            evaluate(la, KEYED, ood_loader=[far]),
            evaluate(expected, PLAIN, ood_loader=[9 * X]),
        )
        assert scores[0].nll == pytest.approx(scores[1].nll)
        assert scores[0].auroc == pytest.approx(scores[1].auroc)
        rows = compare(la, KEYED, KEYED, ood_loader=[far]).rows
        for row, other in zip(rows, compare(expected, PLAIN, PLAIN).rows, strict=True):
            assert row.evaluation.nll == pytest.approx(other.evaluation.nll)
        path = tmp_path / "posterior.pt"
        la.save(path)
        assert_same(DebiasedLaplace.load(path, model)(x), expected(X))
    if kind is not TakesWhole:
        assert_same(la(X), expected(X))


@pytest.mark.parametrize("kind", [Takes, TakesWhole, NamesIt])
def test_the_mapping_is_tried_once(kind: type[Takes]) -> None:
    """On two samples: what the model is given after that is what it takes."""
    model = kind()
    la = fitted(model, KEYED, "all", "kron")
    la({"image": X})
    la.functional_samples({"image": X}, n_samples=2)
    mappings = [x for x in model.given if isinstance(x, dict)]
    others = len(model.given) - len(mappings)
    assert len(mappings) == {Takes: 1, NamesIt: 0}.get(kind, len(model.given))
    assert kind is TakesWhole or others > 3
    assert kind is not Takes or len(mappings[0]["image"]) == 2


def test_a_mapping_that_fails_both_ways_decides_nothing() -> None:
    model = Takes()
    entered = OneEntry(model, "image")
    wrong = {"image": X[:, :3]}
    assert entered(wrong) is wrong
    with untouched(model):
        assert entered({"image": X}) is X
        assert entered({"other": X}) == {"other": X}
        assert entered(X) is X


def test_temperature_of_mappings() -> None:
    assert fit_temperature(Takes(), KEYED, dict_key_x="image") == fit_temperature(Takes(), PLAIN)
    with pytest.raises(ModelCallError, match="dict_key_x='image'"):
        fit_temperature(Takes(), KEYED)


def test_a_key_that_cannot_be_one() -> None:
    with pytest.raises(ArgumentTypeError, match="dict_key_x"):
        DebiasedLaplace(Takes(), dict_key_x=[])  # type: ignore[arg-type]
