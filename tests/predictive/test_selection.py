"""The most probable outputs: their moments are those of all outputs, whoever computes them."""

from __future__ import annotations

import copy
from dataclasses import replace
from functools import cache

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from laplace_debiased import DebiasedLaplace
from laplace_debiased.curvature.passes import UnitColumns
from laplace_debiased.predictive import OutputCovariance, OutputSelection, resolved
from tests.likelihoods.problems import case
from tests.tolerances import assert_exact, assert_same
from tests.zoo import cnn

N_CLASSES = 9
POSTERIORS = [
    ("all", "kron", {}),
    ("all", "kron", {"max_rank": 2}),
    ("last_layer", "kron", {}),
    ("last_layer", "kron", {"max_rank": 3}),
    ("all", "lowrank", {"rank": 5}),
    ("last_layer", "lowrank", {"rank": 4}),
]
LINKS = ["probit", "mc", "bridge", "bridge_norm"]


def fitted(subset: str, structure: str, options: dict, n_outputs: object = "auto"):
    """A posterior under a prior that leaves its outputs some uncertainty, and inputs."""
    la, x = _fitted(subset, structure, tuple(options.items()))
    la = copy.copy(la)
    la._arguments = replace(la._arguments, n_outputs=n_outputs)
    return la, x


@cache
def _fitted(subset: str, structure: str, options: tuple):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        model = cnn(N_CLASSES).double()
        x = torch.randn(16, 2, 6, 6, dtype=torch.float64)
        y = torch.randint(N_CLASSES, (16,))
    la = DebiasedLaplace(
        model, "classification", subset, structure, prior_precision=5.0, **dict(options)
    )
    la.fit(DataLoader(TensorDataset(x, y), batch_size=8), n_samples=None)
    return la, x


def taken(values: Tensor, chosen: Tensor, *, diagonal: bool) -> Tensor:
    """Entries of all outputs' moments [..., C(, C)] at the chosen ones [..., K]."""
    if diagonal:
        return values.gather(-1, chosen)
    k = chosen.shape[-1]
    rows = values.gather(-2, chosen.unsqueeze(-1).expand(*chosen.shape, values.shape[-1]))
    return rows.gather(-1, chosen.unsqueeze(-2).expand(*chosen.shape[:-1], k, k))


@pytest.mark.parametrize("diagonal", [False, True])
@pytest.mark.parametrize(("subset", "structure", "options"), POSTERIORS)
def test_moments_are_those_of_all_outputs(
    subset: str, structure: str, options: dict, diagonal: bool
) -> None:
    la, x = fitted(subset, structure, options)
    kind = OutputCovariance.DIAGONAL if diagonal else OutputCovariance.PER_SAMPLE
    precision = la.predictor.precision(la._H_factor, la.prior_precision)
    whole = la.predictor.moments(x, precision, kind)
    part = la.predictor.moments(x, precision, kind, OutputSelection(4))
    assert whole.chosen is None
    assert torch.equal(part.chosen, whole.mean.topk(4).indices)
    assert_same(part.mean, whole.mean)
    assert_exact(part.covariance, taken(whole.covariance, part.chosen, diagonal=diagonal))
    priors = torch.tensor([0.3, 20.0], dtype=torch.float64)
    swept = la.predictor.sweep(x, la._H_factor, priors, diagonal=diagonal)
    some = la.predictor.sweep(x, la._H_factor, priors, OutputSelection(4), diagonal=diagonal)
    for everywhere, here in (
        (swept.covariances[0], some.covariances[0]),
        (swept.covariances[1], some.covariances[1]),
        (swept.prior_only, some.prior_only),
    ):
        assert_exact(here, taken(everywhere, some.chosen, diagonal=diagonal))


@pytest.mark.parametrize("link", LINKS)
@pytest.mark.parametrize(("subset", "structure", "options"), POSTERIORS)
def test_as_many_outputs_as_classes_are_all(
    subset: str, structure: str, options: dict, link: str
) -> None:
    la, x = fitted(subset, structure, options, n_outputs=None)
    expected = la(x, link_approx=link)
    for n_outputs in (N_CLASSES, N_CLASSES + 5, "auto"):
        other, _ = fitted(subset, structure, options, n_outputs=n_outputs)
        assert float((other(x, link_approx=link) - expected).abs().max()) <= 1e-10


@pytest.mark.parametrize("link", LINKS)
@pytest.mark.parametrize(("subset", "structure", "options"), POSTERIORS)
def test_most_outputs_predict_nearly_as_all(
    subset: str, structure: str, options: dict, link: str
) -> None:
    """6 of 9; the bridges read more of the covariance than the other links."""
    la, x = fitted(subset, structure, options, n_outputs=None)
    other, _ = fitted(subset, structure, options, n_outputs=6)
    p, q = la(x, link_approx=link), other(x, link_approx=link)
    assert_same(q.sum(-1), torch.ones(16, dtype=torch.float64))
    assert 0 < float((p * (p / q).log()).sum(-1).mean()) < (2e-2 if "bridge" in link else 2e-3)


def test_auto_is_all_up_to_64_and_else_32() -> None:
    assert resolved("auto", 64) is None
    assert resolved("auto", 65) == 32
    assert resolved(7, 3) == 7
    assert resolved(None, 1000) is None


@pytest.mark.parametrize("value", ["most", 0, -1, 2.5, True])
def test_other_choices_are_refused(value: object) -> None:
    with pytest.raises((ValueError, TypeError), match="n_outputs must be"):
        DebiasedLaplace(cnn(), n_outputs=value)
    with pytest.raises(ValueError, match="n_outputs chooses the most probable"):
        DebiasedLaplace(cnn(), "regression", n_outputs=2)


def test_the_choice_is_saved(tmp_path) -> None:
    for n_outputs in (None, 4, "auto"):
        la, x = fitted("all", "kron", {}, n_outputs=n_outputs)
        la.save(tmp_path / "la.pt")
        restored = DebiasedLaplace.load(tmp_path / "la.pt", la.model)
        assert restored.arguments.n_outputs == n_outputs
        assert torch.equal(restored(x), la(x))


def test_report_says_what_is_left_out() -> None:
    la, x = fitted("all", "kron", {}, n_outputs=None)
    assert la.outputs_report(x).mass_outside == 0.0
    assert la.outputs_report(x).change == 0.0
    few, _ = fitted("all", "kron", {}, n_outputs=3)
    more, _ = fitted("all", "kron", {}, n_outputs=6)
    report = few.outputs_report(x)
    p, q = few(x), more(x)
    divergence = (p * (p / q).log()).sum(-1)
    assert report.change == pytest.approx(float(divergence.mean()), rel=1e-6)
    assert report.max_change == pytest.approx(float(divergence.max()), rel=1e-6)
    assert report.mass_outside == pytest.approx(1 - float(p.topk(3).values.sum(-1).mean()))
    assert (report.n_outputs, report.n_classes, report.n_samples) == (3, N_CLASSES, 16)
    assert "3 of 9 outputs" in str(report)
    with pytest.raises(ValueError, match="outputs_report"):
        case("outputs").posterior().outputs_report(x)


@pytest.mark.parametrize(("subset", "structure", "options"), POSTERIORS[::2])
def test_tuning_scores_what_predictions_say(subset: str, structure: str, options: dict) -> None:
    """Every link at its own optimum, on 6 of 9 classes.

    The grid is of priors at which interpolation between nodes is accurate.
    """
    la, x = fitted(subset, structure, options, n_outputs=6)
    y = (torch.arange(16) * 5) % N_CLASSES
    loader = DataLoader(TensorDataset(x, y), batch_size=6)
    for link in LINKS:
        la.optimize_prior_precision(
            val_loader=loader, link_approx=link, log_prior_prec_min=0, log_prior_prec_max=4
        )
        found = -la(x, link_approx=link).gather(1, y[:, None]).log().mean()
        assert la.tuning_result.loss == pytest.approx(float(found), rel=1e-4)


# -- sequences -----------------------------------------------------------------------------


@pytest.mark.parametrize("byte_budget", [1, 2**30])
@pytest.mark.parametrize("n_outputs", [None, 2])
def test_sequences_have_their_own_choice_at_every_position(
    n_outputs: int | None, byte_budget: int
) -> None:
    """With a tiny budget position by position, else all at once."""
    c = case("sequence")
    la = c.posterior(n_outputs=n_outputs, byte_budget=byte_budget)
    la.fit(c.loader())
    full = c.covariance(la, c.x).reshape(13, 3, 3, 3, 3).diagonal(dim1=1, dim2=3).movedim(-1, 1)
    precision = la.predictor.precision(la._H_factor, la.prior_precision)
    selection = OutputSelection(n_outputs)
    found = la.predictor.moments(c.x, precision, OutputCovariance.PER_SAMPLE, selection)
    assert_same(found.mean, c.outputs())
    if n_outputs is not None:
        assert torch.equal(found.chosen, c.outputs().topk(2).indices)
        full = taken(full, found.chosen, diagonal=False)
    assert_exact(found.covariance, full)
    swept = la.predictor.sweep(c.x, la._H_factor, la.prior_precision, selection, diagonal=False)
    assert_exact(swept.covariances[0], full)


@pytest.mark.parametrize("n_outputs", [None, 2])
def test_the_last_position_is_the_last_of_all(n_outputs: int | None) -> None:
    c = case("sequence")
    la = c.posterior(n_outputs=n_outputs)
    la.fit(c.loader())
    for link in LINKS:
        every, last = la(c.x, link_approx=link), la(c.x, link_approx=link, positions="last")
        assert_exact(last, every[:, -1])


def test_the_last_position_needs_one_pull_back_per_output(monkeypatch) -> None:
    columns: list[Tensor] = []
    original = UnitColumns.column

    def counted(self: UnitColumns, r: int) -> Tensor:
        columns.append(original(self, r))
        return columns[-1]

    c = case("sequence")
    la = c.posterior(n_outputs=2)
    la.fit(c.loader())
    monkeypatch.setattr(UnitColumns, "column", counted)
    la(c.x, positions="last")
    assert len(columns) == 2
    assert all(float(column[:, :-1].abs().max()) == 0.0 for column in columns)


class Masked(nn.Module):
    """Takes a dict as language models do; positions are independent."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.head = nn.Embedding(7, 4), nn.Linear(4, 5)

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        return self.head(torch.tanh(self.embed(input_ids)))


def test_the_last_position_of_a_padded_sequence_is_where_its_mask_ends() -> None:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = Masked().double()
        ids = torch.randint(7, (6, 4))
    mask = torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0], [0, 0, 1, 1], [1, 0, 0, 0]] + [[1] * 4] * 2)
    batch = {"input_ids": ids, "attention_mask": mask, "labels": (ids + 1) % 5}
    la = DebiasedLaplace(model, "classification")
    la.fit([batch], n_samples=None, n_data=6)
    inputs = {"input_ids": ids, "attention_mask": mask}
    every, last = la(inputs), la(inputs, positions="last")
    assert_exact(last, every[torch.arange(6), torch.tensor([3, 1, 3, 0, 3, 3])])


@pytest.mark.parametrize(("subset", "structure", "options"), POSTERIORS[::2])
def test_no_position_of_what_has_none(subset: str, structure: str, options: dict) -> None:
    la, x = fitted(subset, structure, options)
    with pytest.raises(ValueError, match="positions='last' needs"):
        la(x, positions="last")
    with pytest.raises(ValueError, match="positions='last' is for"):
        la(x, pred_type="nn", positions="last")
    with pytest.raises(ValueError, match="positions must be one of"):
        la(x, positions="first")
