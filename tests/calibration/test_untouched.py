"""A loader's own generator comes out as it went in, whoever walks the loader."""

import pytest
import torch
from torch import nn

from laplace_debiased import directional_profile
from laplace_debiased.calibration import (
    collect_logits,
    evaluate,
    fit_temperature,
)
from laplace_debiased.diagnostics import directional_quadratic, kfac_profile
from laplace_debiased.optim import model_quadratic
from tests.calibration.helpers import (
    FakePosterior,
    calibrated_classes,
    drawing_loader,
    loader_of,
    softmax,
)
from tests.untouched import untouched

LOGITS, LABELS = calibrated_classes(n=40)
PROBS = softmax(LOGITS)
X = torch.tensor(LOGITS)
BATCHES = [(X[:20], torch.tensor(LABELS[:20])), (X[20:], torch.tensor(LABELS[20:]))]


def network():
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return nn.Linear(4, 4).double()


WALKS = {
    "evaluate": lambda model, loader: evaluate(FakePosterior(model=model), loader),
    "ood_loader": lambda model, loader: evaluate(
        FakePosterior(model=model), loader_of(PROBS, LABELS), ood_loader=loader
    ),
    "temperature": fit_temperature,
    "logits": collect_logits,
    "profile": lambda model, loader: directional_profile(
        model, "classification", *BATCHES, loader, k=3
    ),
    "quadratic along": lambda model, loader: directional_quadratic(
        model, "classification", loader, torch.eye(20, 3).double()
    ),
    "kfac profile": lambda model, loader: kfac_profile(model, "classification", *BATCHES, loader),
    "model quadratic": lambda model, loader: model_quadratic(model, nn.CrossEntropyLoss(), loader),
}


@pytest.mark.parametrize("name", WALKS)
def test_the_loaders_own_generator_is_as_before(name):
    model, loader = network(), drawing_loader(PROBS, LABELS)
    with untouched(model, loader):
        WALKS[name](model, loader)
    # The check itself can fail: a bare walk draws.
    with pytest.raises(AssertionError, match="generators"), untouched(model, loader):
        list(loader)


def test_a_failing_walk_gives_the_generator_back():
    model, loader = network(), drawing_loader(PROBS, LABELS + 9)
    with untouched(model, loader), pytest.raises(ValueError, match=r"0\.\.3"):
        evaluate(FakePosterior(model=model), loader)
