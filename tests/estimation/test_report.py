"""Where the time of a fit went."""

import dataclasses

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from laplace_debiased import DebiasedLaplace
from laplace_debiased.errors import NotFittedError


def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 3))


def loader(n=400):
    generator = torch.Generator().manual_seed(1)
    inputs = torch.randn(n, 5, generator=generator)
    return DataLoader(TensorDataset(inputs, (inputs.sum(1) > 0).long()), batch_size=50)


def test_a_fit_says_where_its_time_went():
    la = DebiasedLaplace(network())
    with pytest.raises(NotFittedError):
        _ = la.fit_report
    la.fit(loader(), n_samples=16)
    report = la.fit_report
    assert list(report.stages) == ["pool", "factors", "decompositions", "magnitudes", "rest"]
    assert sum(report.stages.values()) == pytest.approx(report.seconds, rel=0.05)
    assert set(report.decompositions) == set(la.coverage.covered)
    assert 0 < sum(report.decompositions.values()) <= report.stages["decompositions"]
    assert report.samples["pool"] == 400
    assert report.samples["factors"] == report.samples["magnitudes"] <= 16
    with pytest.raises(dataclasses.FrozenInstanceError):
        report.seconds = 0.0
    with pytest.raises(TypeError):
        report.stages["pool"] = 0.0


def test_the_report_prints_as_a_table_with_the_slowest_parameters():
    la = DebiasedLaplace(network())
    la.fit(loader(), n_samples=16)
    lines = repr(la.fit_report).splitlines()
    assert lines[0].split() == ["stage", "seconds", "share"]
    assert lines[1].startswith("pool (400 samples)")
    assert lines[-1].startswith("fit ")
    assert lines[-1].endswith("100 %")
    slowest = max(la.fit_report.decompositions, key=la.fit_report.decompositions.get)
    assert lines[4].split()[0] == slowest


@pytest.mark.parametrize(
    ("options", "stages"),
    [
        ({"scheme": "single", "magnitudes": "kfac"}, ["pool", "factors", "decompositions", "rest"]),
        ({"hessian_structure": "lowrank"}, ["pool", "outputs", "rows", "rest"]),
        (
            {"hessian_structure": "lowrank", "rank": 2, "byte_budget": 100},
            ["pool", "outputs", "products", "magnitudes", "rest"],
        ),
    ],
)
def test_stages_are_those_of_the_structure(options, stages):
    la = DebiasedLaplace(network(), **options)
    la.fit(loader(60), n_samples=8)
    assert list(la.fit_report.stages) == stages


def test_progress_is_shown_when_asked_for_and_ends_with_the_report(capsys):
    la = DebiasedLaplace(network())
    la.fit(loader(), n_samples=16)
    assert capsys.readouterr() == ("", "")
    la.fit(loader(), n_samples=16, progress_bar=True)
    shown = capsys.readouterr().err
    for stage in ("pool", "factors", "decompositions", "magnitudes"):
        assert f"[{stage}]" in shown
    assert "2.weight" in shown
    assert shown.rstrip().endswith(repr(la.fit_report))


def test_a_loaded_posterior_has_no_report(tmp_path):
    la = DebiasedLaplace(network())
    la.fit(loader(), n_samples=16)
    la.save(tmp_path / "la.pt")
    assert DebiasedLaplace.load(tmp_path / "la.pt", network()).fit_report is None


def test_a_posterior_says_what_it_is(tmp_path):
    la = DebiasedLaplace(network())
    la.fit(loader(), n_samples=16)
    seconds = f"{la.fit_report.seconds:.3g}"
    assert repr(la) == (
        "DebiasedKronLaplace(likelihood='classification', scheme='cross_fit', 16 of N=400 samples, "
        "66 parameters (100.0 % covered), prior_precision=[1.0], link='mc', fitted in "
        f"{seconds} s)"
    )
    la.tuned_link_approx = "probit"
    assert "link='probit'" in repr(la)
    la.save(tmp_path / "la.pt")
    assert repr(DebiasedLaplace.load(tmp_path / "la.pt", network())).endswith("link='probit')")
