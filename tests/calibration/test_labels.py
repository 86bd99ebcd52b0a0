"""Binary labels, several labels per sample, and sequences."""

import numpy as np
import pytest
import torch
from scipy.stats import bernoulli
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from laplace_debiased import DebiasedLaplace
from laplace_debiased.calibration import evaluate
from tests.calibration.helpers import RTOL, FakePosterior, calibrated_classes, loader_of, softmax

SCORES = ("nll", "ece", "mce", "brier", "accuracy", "entropy", "auroc", "fpr95")


def scores(evaluation):
    """The numbers of a record that apply."""
    return {name: value for name, value in evaluation.to_dict().items() if value is not None}


@pytest.fixture
def labels():
    """Probabilities and labels [n, K] drawn from them."""
    rng = np.random.default_rng(3)
    probs = rng.beta(0.6, 0.6, size=(300, 3))
    return probs, (rng.uniform(size=probs.shape) < probs).astype(np.int64)


def two_classes(p):
    return np.stack([1.0 - p, p], axis=1)


def test_one_binary_label_scores_as_two_classes_do(labels):
    probs, y = (part[:, 0] for part in labels)
    outside = np.random.default_rng(0).uniform(0.3, 0.7, 50)
    binary = evaluate(probs, y, likelihood="bernoulli", ood_probs=outside)
    classes = evaluate(two_classes(probs), y, ood_probs=two_classes(outside))
    assert set(SCORES) <= set(scores(binary))
    assert scores(binary) == pytest.approx(scores(classes), rel=RTOL)


def test_scores_of_several_labels_equal_their_definitions(labels):
    probs, y = labels
    result = evaluate(probs, y, likelihood="bernoulli")
    assert result.nll == pytest.approx(-bernoulli.logpmf(y, probs).sum(1).mean(), rel=RTOL)
    assert result.entropy == pytest.approx(bernoulli.entropy(probs).sum(1).mean(), rel=RTOL)
    assert result.brier == pytest.approx(2 * np.square(probs - y).mean(), rel=RTOL)
    assert result.accuracy == pytest.approx(((probs > 0.5) == y).mean(), rel=RTOL)
    assert result.n_samples == 300


def test_the_order_of_labels_and_samples_does_not_matter(labels):
    probs, y = labels
    order = np.random.default_rng(1).permutation(len(y))
    one = evaluate(probs, y, likelihood="bernoulli")
    other = evaluate(probs[order][:, [2, 0, 1]], y[order][:, [2, 0, 1]], likelihood="bernoulli")
    assert scores(other) == pytest.approx(scores(one), rel=RTOL)


def test_a_posterior_over_binary_labels_is_scored_by_its_probabilities(labels):
    probs, y = labels
    posterior = FakePosterior(likelihood="bernoulli")
    result = evaluate(posterior, loader_of(probs, y), ood_loader=loader_of(probs[::-1].copy()))
    assert result.auroc == pytest.approx(0.5)
    assert result.n_ood_samples == 300
    beside = evaluate(probs, y, likelihood="bernoulli", ood_probs=probs)
    assert result.to_dict() == beside.to_dict()


def test_sequences_are_scored_position_by_position():
    logits, y = calibrated_classes(n=120)
    probs, sequences = softmax(logits), softmax(logits).reshape(20, 6, 4)
    flat, result = evaluate(probs, y), evaluate(sequences, y.reshape(20, 6))
    assert result.to_dict() == flat.to_dict()


def test_sequences_of_any_length_are_scored_without_the_labels_that_do_not_count():
    class Tagger(FakePosterior):
        ignore_index = -100

    logits, y = calibrated_classes(n=120)
    probs = torch.tensor(softmax(logits))
    masked = torch.tensor(y).clone()
    masked[::5] = -100
    batches = [
        (probs[:60].reshape(10, 6, 4), masked[:60].reshape(10, 6)),
        (probs[60:].reshape(20, 3, 4), masked[60:].reshape(20, 3)),
    ]
    counted = (masked != -100).numpy()
    result = evaluate(Tagger(), batches)
    assert result.to_dict() == evaluate(probs.numpy()[counted], y[counted]).to_dict()
    assert result.n_samples == counted.sum() == 96
    nothing = [(probs[:6].reshape(1, 6, 4), torch.full((1, 6), -100))]
    with pytest.raises(ValueError, match="every label is ignore_index=-100"):
        evaluate(Tagger(), nothing)


@pytest.mark.parametrize("n_labels", [1, 3])
def test_a_fitted_bernoulli_posterior_is_scored_on_its_own_loader(n_labels):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(60, 4, generator=generator)
    y = (x[:, :n_labels] > 0).float()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = nn.Linear(4, n_labels)
    loader = DataLoader(TensorDataset(x, y[:, 0] if n_labels == 1 else y), batch_size=20)
    posterior = DebiasedLaplace(model, "bernoulli")
    posterior.fit(loader)
    expected = bernoulli.logpmf(y.numpy(), posterior(x).detach().double().numpy()).sum(1)
    assert evaluate(posterior, loader).nll == pytest.approx(-expected.mean(), rel=1e-5)


def test_wrong_labels_and_probabilities_say_what_to_pass(labels):
    probs, y = labels
    for wrong, match in (
        (y * 2, "must be 0 or 1 to be scored"),
        (y[:, :2], r"shape of the predictions \(300, 3\)"),
        (y[:5], "without drop_last"),
        (y.argmax(1), "give one label per output"),
    ):
        with pytest.raises(ValueError, match=match):
            evaluate(probs, wrong, likelihood="bernoulli")
    with pytest.raises(ValueError, match="apply a sigmoid to logits"):
        evaluate(probs * 2, y, likelihood="bernoulli")
    with pytest.raises(ValueError, match=r"must have shape \(samples, labels\)"):
        evaluate(probs[None], y, likelihood="bernoulli")
    with pytest.raises(ValueError, match="must have the classes of the predictions"):
        evaluate(probs, y, likelihood="bernoulli", ood_probs=probs[:, :2])
    with pytest.raises(ValueError, match="regression is a"):
        evaluate(probs, y, likelihood="regression")
    with pytest.raises(ValueError, match="leave it out"):
        evaluate(FakePosterior(), loader_of(probs, y), likelihood="bernoulli")
    with pytest.raises(ValueError, match="labels of sequences must have shape"):
        evaluate(np.full((2, 3, 4), 0.25), np.zeros(6, dtype=int))
