"""The benchmark of links at its smallest size, and its reference."""

from pathlib import Path

import numpy as np
import pytest
import torch

from benchmarks.common.models import PublicCifarResNet
from benchmarks.link import divergences, main, reference


def test_reference_of_two_outputs_is_the_integral_over_their_difference() -> None:
    mean = torch.tensor([[0.5, -0.5], [2.0, 0.0]])
    covariance = torch.tensor([[[2.0, 0.5], [0.5, 1.0]], [[9.0, 0.0], [0.0, 16.0]]])
    z = torch.linspace(-10.0, 10.0, 20_001, dtype=torch.float64)
    weights = torch.softmax(-0.5 * z.square(), 0)
    for mu, sigma, found in zip(mean, covariance, reference(mean, covariance), strict=True):
        variance = sigma[0, 0] + sigma[1, 1] - 2.0 * sigma[0, 1]
        exact = (torch.sigmoid(mu[0] - mu[1] + variance.sqrt() * z) * weights).sum()
        assert float(found[0]) == pytest.approx(float(exact), abs=1e-5)
    given = torch.tensor([[0.25, 0.75]], dtype=torch.float64)
    half = torch.full_like(given, 0.5)
    assert float(divergences(half, given)) == pytest.approx(0.5 * np.log(0.25 / (0.25 * 0.75)))


def test_runs_at_its_smallest_size(tmp_path: Path) -> None:
    g = np.random.default_rng(0)
    pixels = {name: g.integers(0, 256, (8, 3, 32, 32), np.uint8) for name in ("Xtr", "Xte")}
    labels = {name: g.integers(0, 10, 8) for name in ("Ytr", "Yte")}
    np.savez(tmp_path / "images.npz", **pixels, **labels)
    torch.save(PublicCifarResNet(20).state_dict(), tmp_path / "weights.pt")
    sizes = [
        "--samples",
        "2",
        "--n-images",
        "1",
        "--batch",
        "1",
        "--repetitions",
        "1",
        "--decades",
        "3",
        "3",
        "--threads",
        "1",
    ]
    paths = ["--images", tmp_path / "images.npz", "--weights", tmp_path / "weights.pt"]
    assert main([*map(str, paths), *sizes, "--output", str(tmp_path)]) == 0
    assert "| 1000 |" in (tmp_path / "link.md").read_text()
