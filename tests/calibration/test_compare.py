"""`compare`: every row is what its own way to predict gives, on the same samples."""

from __future__ import annotations

import gc
import warnings
import weakref

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from laplace_debiased import DebiasedLaplace, NotFittedError, compare, evaluate, fit_temperature
from laplace_debiased.calibration import Comparison, comparing, metrics
from laplace_debiased.calibration.asking import classified
from tests.likelihoods.problems import case
from tests.untouched import untouched
from tests.zoo import Problem, problem


def close(one: dict, other: dict, rel: float = 1e-7) -> None:
    assert one == {k: v if v is None else pytest.approx(v, rel=rel) for k, v in other.items()}


KEYS = ["map", "temperature", "prior_only", "last_layer", "posterior"]


def splits() -> tuple[Problem, DataLoader, DataLoader, DataLoader]:
    p = problem("mlp", n=140)
    with torch.no_grad():
        p.model[2].weight.mul_(6.0)
        noisy = torch.multinomial((p.model(p.x) / 4).softmax(-1), 1).squeeze(-1)
    p = Problem(p.model, p.x, noisy, "classification")
    elsewhere = DataLoader(TensorDataset(5 * p.x[:30]), batch_size=8)
    return p, p.loader(slice(60, 100)), p.loader(slice(100, 140), batch_size=7), elsewhere


@pytest.fixture(scope="module")
def compared():
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        p, val, test, ood = splits()
    la = DebiasedLaplace(p.model)
    la.fit(p.loader(slice(0, 60)), n_samples=40, n_data=200)
    la.optimize_prior_precision(val_loader=val)
    before = la.prior_precision.clone(), la.tuning_result, la.tuned_link_approx
    with untouched(p.model, val, test, ood):
        found = compare(la, val, test, ood_loader=ood, progress_bar=False)
    assert (la.prior_precision, la.tuning_result, la.tuned_link_approx) == before
    return la, p, val, test, ood, found


def test_rows_are_what_their_own_way_to_predict_gives(compared) -> None:
    la, p, val, test, ood, found = compared
    assert [row.key for row in found.rows] == KEYS
    expected = evaluate(la, test, ood_loader=ood).to_dict()
    close(found["posterior"].evaluation.to_dict(), expected)
    with torch.no_grad():
        logits, outside = p.model(p.x[100:]), p.model(5 * p.x[:30])
    scaling = fit_temperature(p.model, val)
    for key, temperature in (("map", 1.0), ("temperature", scaling.temperature)):
        probs, ood_probs = ((f / temperature).softmax(-1) for f in (logits, outside))
        own = evaluate(probs, p.y[100:], ood_probs=ood_probs).to_dict()
        close(found[key].evaluation.to_dict(), own)
    last = DebiasedLaplace(p.model, subset_of_weights="last_layer")
    last.fit(p.loader(slice(0, 60)), n_data=200)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        last.optimize_prior_precision(val_loader=val)
    own = evaluate(last, test, ood_loader=ood).to_dict()
    close(found["last_layer"].evaluation.to_dict(), own)


def test_only_one_row_at_a_time_is_held_as_probabilities_in_float64(compared, monkeypatch) -> None:
    la, _, val, test, _, _ = compared
    held, most = [], []

    def watched(*args):
        gc.collect()
        most.append(sum(probs() is not None for probs in held))
        found = classified(*args)
        held.append(weakref.ref(found.probs))
        return found

    monkeypatch.setattr(comparing, "classified", watched)
    compare(la, val, test, progress_bar=False)
    assert len(most) == len(KEYS)
    assert max(most) <= 1, most


def test_prior_only_is_the_posterior_of_so_little_data_that_curvature_vanishes(compared) -> None:
    la, p, _, test, ood, found = compared
    alone = DebiasedLaplace(p.model, prior_precision=la.tuning_result.prior_only_precision)
    alone.fit(p.loader(slice(0, 60)), n_samples=40)
    alone.temperature = 1e12  # h·N·λ with h = 1/temperature
    own = evaluate(alone, test, ood_loader=ood, link_approx=la.tuning_result.prior_only_link)
    actual = found["prior_only"].evaluation.to_dict()
    close(actual, own.to_dict(), rel=1e-5)
    assert found["prior_only"].settings["link"] == la.tuning_result.prior_only_link


def test_intervals_are_those_of_the_paired_difference(compared) -> None:
    *_, found = compared
    assert found["temperature"].interval is None
    baseline = found["temperature"].nlls
    rng = np.random.default_rng(5)
    for row in found.rows:
        assert row.evaluation.nll == pytest.approx(row.nlls.mean())
        if row.interval is None:
            continue
        difference = row.nlls - baseline
        draws = difference[rng.integers(len(difference), size=(4000, len(difference)))].mean(1)
        spread = draws.std()
        assert row.interval == pytest.approx(np.quantile(draws, [0.025, 0.975]), abs=0.2 * spread)
    same = np.full(10, 0.3)
    assert metrics.paired_interval(same, same - 0.25, 0) == pytest.approx((0.25, 0.25))


def test_the_table_holds_every_row_and_column_and_the_numbers_are_plain(compared) -> None:
    *_, found = compared
    lines = found.table.splitlines()
    assert len(lines) == 2 + len(KEYS)
    assert len({len(line) for line in lines}) == 1
    for head in ("NLL", "AURC", "adaptive ECE", "AUROC, MI", "FPR95"):
        assert head in lines[0]
    assert repr(found).startswith(found.table)
    assert "40 test samples" in repr(found)
    assert f"{found['posterior'].evaluation.nll:.4f}" in lines[-1]
    numbers = found.to_dict()
    assert list(numbers) == KEYS
    assert numbers["map"]["nll_difference"] == pytest.approx(
        found["map"].evaluation.nll - found["temperature"].evaluation.nll
    )
    low, high = numbers["map"]["nll_difference_interval"]
    assert low <= numbers["map"]["nll_difference"] <= high


def test_the_figure_has_both_panels_with_all_rows(compared) -> None:
    *_, found = compared
    left, right = found.plot().axes
    assert len(left.get_lines()) == len(KEYS) + 1
    assert len(right.get_lines()) == len(KEYS)
    ends = [line.get_ydata()[-1] for line in right.get_lines()]
    errors = [100 * (1 - row.evaluation.accuracy) for row in found.rows]
    assert ends == pytest.approx(errors)


def test_without_ood_inputs_their_columns_are_left_out_and_untuned_posteriors_are_compared():
    p, val, test, _ = splits()
    la = DebiasedLaplace(p.model, subset_of_weights="last_layer", prior_precision=3.0)
    la.fit(p.loader(slice(0, 60)))
    found = compare(la, val, test, progress_bar=False)
    assert isinstance(found, Comparison)
    assert [row.key for row in found.rows] == ["map", "temperature", "prior_only", "posterior"]
    assert "AUROC" not in found.table
    assert la.tuning_result is None
    assert la.prior_precision.item() == 3.0
    layered = DebiasedLaplace(p.model, prior_precision=torch.tensor([1.0, 2.0, 3.0, 4.0]))
    layered.fit(p.loader(slice(0, 60)))
    row = compare(layered, val, test, progress_bar=False)["posterior"]
    expected = evaluate(layered, test).to_dict()
    close(row.evaluation.to_dict(), expected)


def test_a_posterior_from_a_file_asks_for_its_training_data(compared, tmp_path) -> None:
    la, p, val, test, *_ = compared
    la.save(tmp_path / "la.pt")
    again = DebiasedLaplace.load(tmp_path / "la.pt", p.model)
    with pytest.warns(UserWarning, match="train_loader"):
        found = compare(again, val, test, progress_bar=False)
    assert "last_layer" not in {row.key for row in found.rows}
    train = p.loader(slice(0, 60))
    whole = compare(again, val, test, train_loader=train, progress_bar=False)
    assert [row.key for row in whole.rows] == KEYS


class Doubled(nn.Module):
    """A network whose outputs are not its last layer's own."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(4, 3).double()

    def forward(self, x):
        return 2.0 * torch.tanh(self.inner(x))


def test_a_network_without_a_linear_head_has_no_such_row() -> None:
    p, val, test, _ = splits()
    la = DebiasedLaplace(Doubled(), prior_precision=2.0)
    la.fit(p.loader(slice(0, 60)))
    with pytest.warns(UserWarning, match="no row of the last layer"):
        found = compare(la, val, test, progress_bar=False)
    assert [row.key for row in found.rows] == ["map", "temperature", "prior_only", "posterior"]


def test_positions_that_do_not_count_are_left_out() -> None:
    c = case("sequence ignoring")
    la = c.posterior()
    la.fit(c.loader())
    la.optimize_prior_precision(val_loader=c.loader())
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found = compare(la, c.loader(), c.loader(), progress_bar=False)
    expected = evaluate(la, c.loader()).to_dict()
    close(found["posterior"].evaluation.to_dict(), expected)


def test_bad_arguments_say_what_to_do() -> None:
    p, val, test, _ = splits()
    with pytest.raises(TypeError, match="evaluate"):
        compare(p.model, val, test)
    la = DebiasedLaplace(p.model)
    with pytest.raises(NotFittedError):
        compare(la, val, test)
    regression = problem("mlp", "regression")
    other = DebiasedLaplace(regression.model, "regression")
    other.fit(regression.loader())
    with pytest.raises(ValueError, match="classification"):
        compare(other, regression.loader(), regression.loader())
