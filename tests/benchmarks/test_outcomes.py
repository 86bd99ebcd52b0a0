"""The outcomes benchmark: two-fold choice, rows, and what survival means."""

import json
import math

import numpy as np
import pytest
import torch

from benchmarks.common.models import PublicCifarResNet
from benchmarks.outcomes import __main__ as outcomes
from benchmarks.outcomes.methods import BASELINES, METHODS, run
from benchmarks.outcomes.problems import blurred, digits, public_resnet
from benchmarks.outcomes.report import rows_of
from benchmarks.outcomes.survival import Curve
from laplace_debiased import DebiasedLaplace, evaluate


def test_every_half_is_predicted_by_what_the_other_half_chose():
    problem = digits(limit=60, epochs=2)
    one, two = problem.halves(0)
    assert sorted([*one.tolist(), *two.tolist()]) == list(range(60))
    outcome = run(METHODS[0], problem, 16, seed=0)
    probs, labels = [], []
    for validation, test in ((one, two), (two, one)):
        la = DebiasedLaplace(problem.model)
        la.fit(problem.train, n_samples=256)
        clean = problem.sets["clean"]
        chosen = torch.utils.data.TensorDataset(clean[validation], problem.labels[validation])
        la.optimize_prior_precision(val_loader=torch.utils.data.DataLoader(chosen, 16))
        probs.append(la(clean[test]))
        labels.append(problem.labels[test])
    expected = evaluate(torch.cat(probs), torch.cat(labels))
    rows = {row.name: row for row in rows_of(problem, [outcome])}
    assert list(rows) == list(BASELINES.values())
    actual = rows[BASELINES["posterior"]].scores["clean"]
    assert actual.nll == pytest.approx(expected.nll, rel=1e-5)
    assert actual.ece == pytest.approx(expected.ece, abs=1e-5)
    low, high = rows[BASELINES["map"]].interval
    gap = (
        rows[BASELINES["map"]].scores["clean"].nll
        - rows[BASELINES["temperature"]].scores["clean"].nll
    )
    assert low <= gap <= high


def test_a_run_writes_its_tables(tmp_path, capsys):
    options = ["--problems", "digits", "survival", "--limit", "30", "--draws", "1", "--epochs", "1"]
    options += ["--only", "laplace-torch", "low rank"]
    assert outcomes.main([*options, "--threads", "1", "--output", str(tmp_path)]) == 0
    text = (tmp_path / "outcomes_digits.md").read_text()
    for method in (METHODS[0], METHODS[1], METHODS[-1]):
        assert f"| {method.name} |" in text
    assert "95 % bootstrap" in text
    numbers = json.loads((tmp_path / "outcomes_digits.json").read_text())
    assert len(numbers["rows"]) == len(BASELINES) + 2
    assert all(math.isfinite(row["scores"]["clean"]["nll"]) for row in numbers["rows"])
    assert "survives down to" in (tmp_path / "outcomes_survival.md").read_text()
    for name in ("digits", "survival"):
        assert (tmp_path / f"outcomes_{name}.png").stat().st_size > 0


def test_the_public_networks_are_read_from_their_files(tmp_path):
    rng = np.random.default_rng(0)
    arrays = {
        f"X{part}": rng.integers(0, 256, (n, 3, 32, 32), dtype=np.uint8)
        for part, n in (("tr", 4), ("te", 6))
    }
    arrays |= {"Ytr": np.arange(4), "Yte": np.arange(6)}
    np.savez(tmp_path / "images.npz", **arrays)
    model = PublicCifarResNet(20)
    assert sum(p.numel() for p in model.parameters()) == 272_474
    torch.save(model.state_dict(), tmp_path / "weights.pt")
    problem = public_resnet(20, tmp_path / "weights.pt", tmp_path / "images.npz", limit=5)
    assert problem.sets["clean"].shape == problem.outside.shape == (5, 3, 32, 32)
    assert problem.n_data == 50_000
    assert problem.labels.tolist() == list(range(5))
    assert problem.model(problem.sets["blur"]).shape == (5, 10)
    with pytest.raises(SystemExit):
        outcomes.main(["--problems", "resnet20"])


def test_a_blur_keeps_constants_and_moves_no_mass():
    flat = torch.full((1, 3, 16, 16), 0.3)
    assert blurred(flat, 1.0) == pytest.approx(flat)
    point = torch.zeros(1, 3, 16, 16)
    point[:, :, 8, 8] = 1.0
    assert blurred(point, 1.0).sum((2, 3)) == pytest.approx(torch.ones(1, 3))


def test_survival_ends_at_the_first_prior_that_fails():
    priors = [0.1, 1.0, 10.0, 100.0]
    assert Curve("", [1.2, 3.0, 1.4, 1.0], [0.0] * 4).survives(priors, 1.0) == 10.0
    assert Curve("", [1.5, 1.5, 1.5, 1.0], [0.0] * 4).survives(priors, 1.0) == 0.1
    assert math.isinf(Curve("", [1.0, 1.0, 1.0, 2.0], [0.0] * 4).survives(priors, 1.0))
