"""Fit and predict with the default scheme: everything is covered, or named."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import nn

from laplace_debiased import DebiasedLaplace
from tests.architectures import networks
from tests.architectures.networks import CLASSES, loader, made

IMAGE, SMALL = (3, 4, 4), (3, 16, 16)
CASES = [
    pytest.param(networks.resnet18, IMAGE, {}, id="resnet18"),
    pytest.param(networks.narrow_resnet18, SMALL, {}, id="narrow_resnet18"),
    pytest.param(networks.vit_tiny, SMALL, {}, id="vit"),
    pytest.param(networks.torchvision_vit, SMALL, {}, id="torchvision_vit"),
    pytest.param(networks.bert, None, {}, id="bert"),
    pytest.param(networks.gpt2, None, {}, id="gpt2"),
]


@pytest.mark.parametrize(("build", "shape", "gaps"), CASES)
def test_fit_and_predict_with_all_layers_covered_or_named(
    build: Callable[[], nn.Module], shape: tuple[int, ...] | None, gaps: dict[str, str], untouched
) -> None:
    model, data = made(build), loader(shape)
    la = DebiasedLaplace(model, scheme="cross_fit", magnitudes="ggn", prior_precision=10.0)
    with untouched(model):
        la.fit(data, n_samples=32)
    assert set(la.coverage.gaps) == set(gaps), la.coverage.gaps
    assert all(why in la.coverage.gaps[name] for name, why in gaps.items())
    assert la.coverage.share > 0.98
    batch = next(iter(data))
    inputs = batch[0] if shape is not None else batch
    with untouched(model):
        probabilities = la(inputs)
    assert probabilities.shape == (8, CLASSES)
    torch.testing.assert_close(probabilities.sum(-1), torch.ones(8))
    assert torch.isfinite(la.log_marginal_likelihood())
    assert float(la._glm_predictive_distribution(inputs, diagonal_output=True)[1].min()) > 0
