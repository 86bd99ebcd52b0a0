"""Temperature scaling against its optimality conditions and plain optimisers."""

import math

import numpy as np
import pytest
import torch
from torch import nn

from laplace_debiased.calibration import (
    TemperatureScaling,
    collect_logits,
    evaluate,
    fit_temperature,
)
from tests.calibration.helpers import (
    RTOL,
    FakePosterior,
    calibrated_classes,
    loader_of,
    softmax,
)


@pytest.fixture(scope="module")
def classes():
    return calibrated_classes(n=600)


def _lbfgs_temperature(logits, labels):
    z, y = torch.tensor(logits), torch.tensor(labels)
    log_t = torch.zeros((), dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.LBFGS(
        [log_t],
        max_iter=500,
        tolerance_grad=1e-14,
        tolerance_change=0,
        line_search_fn="strong_wolfe",
    )

    def closure():
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(z / log_t.exp(), y)
        loss.backward()
        return loss

    optimizer.step(closure)
    return log_t.exp().item()


@pytest.mark.parametrize("scale", [0.3, 1.0, 2.5, 20.0])
def test_temperature_is_that_of_a_plain_fit_and_scales_with_the_logits(classes, scale):
    logits, labels = classes
    fit = fit_temperature(scale * logits, labels)
    assert fit.temperature == pytest.approx(_lbfgs_temperature(scale * logits, labels), rel=1e-6)
    unscaled = fit_temperature(logits, labels)
    assert fit.temperature == pytest.approx(scale * unscaled.temperature, rel=RTOL)
    assert fit.nll_after == pytest.approx(unscaled.nll_after, rel=RTOL)


def test_likelihood_equals_entropy_at_the_optimum(classes):
    logits, labels = classes
    fit = fit_temperature(3 * logits, labels)
    record = evaluate(fit.probs(3 * logits), labels)
    assert record.nll == pytest.approx(record.entropy, rel=RTOL)
    assert record.nll == pytest.approx(fit.nll_after, rel=RTOL)


def test_overconfident_logits_are_mended(classes):
    logits, labels = classes
    before, fit = evaluate(softmax(4 * logits), labels), fit_temperature(4 * logits, labels)
    after = evaluate(fit.probs(4 * logits), labels)
    assert fit.nll_before == pytest.approx(before.nll, rel=RTOL)
    assert after.nll < before.nll
    assert after.ece < 0.5 * before.ece
    assert after.accuracy == before.accuracy


def test_recovers_the_temperature_that_the_labels_were_drawn_at():
    # Seed 0, n = 20000: the standard error of the fitted log T is about 0.009; four of them.
    logits, labels = calibrated_classes(n=20000)
    assert math.log(fit_temperature(2.5 * logits, labels).temperature / 2.5) == pytest.approx(
        0.0, abs=0.036
    )


def test_fit_has_a_closed_form_for_two_classes_and_one_margin():
    # Three of four labels at margin 1: σ(1/T) = 3/4, so T = 1/log 3.
    fit = fit_temperature(np.tile([0.0, 1.0], (4, 1)), np.array([1, 1, 0, 1]))
    assert fit.temperature == pytest.approx(1 / math.log(3), rel=1e-12)


def test_shift_of_the_logits_and_order_change_nothing(classes):
    logits, labels = classes
    fit = fit_temperature(logits, labels)
    shift = np.random.default_rng(0).normal(size=(len(labels), 1))
    order = np.random.default_rng(1).permutation(len(labels))
    for other in (
        fit_temperature(logits + 50 * shift, labels),
        fit_temperature(logits[order], labels[order]),
    ):
        assert other.temperature == pytest.approx(fit.temperature, rel=RTOL)


class _HuggingFaceLike(nn.Module):
    def forward(self, batch):
        return type("Output", (), {"logits": batch["x"]})()


def test_model_and_its_logits_fit_alike(classes):
    logits, labels = classes
    expected = fit_temperature(torch.tensor(logits), loader_of(logits, labels))
    assert fit_temperature(nn.Identity(), loader_of(logits, labels)) == expected
    shuffled = fit_temperature(nn.Identity(), loader_of(logits, labels, shuffle=True))
    assert shuffled.temperature == pytest.approx(expected.temperature, rel=RTOL)
    mapping = [{"x": torch.tensor(logits), "y": torch.tensor(labels)}]
    assert fit_temperature(_HuggingFaceLike(), mapping, dict_key_y="y") == expected
    assert fit_temperature(logits, mapping, dict_key_y="y") == expected


def test_probs_follow_the_logits_kind():
    scaling = TemperatureScaling(2.0, nll_before=1.0, nll_after=0.5)
    logits = np.array([[0.0, 2.0 * math.log(3)]])
    np.testing.assert_allclose(scaling.probs(logits), [[0.25, 0.75]], rtol=RTOL)
    tensor = scaling.probs(torch.tensor(logits, dtype=torch.float32))
    assert tensor.dtype == torch.float32
    torch.testing.assert_close(tensor, torch.tensor([[0.25, 0.75]]))


@pytest.mark.parametrize(
    ("labels", "bound"), [([0, 0, 1], 1e-3), ([1, 1, 0], 1e3)], ids=["separable", "worse"]
)
def test_optimum_without_bound_warns_and_returns_the_bound(labels, bound):
    logits = np.array([[2.0, 0.0], [1.0, 0.0], [0.0, 1.0]])
    with pytest.warns(UserWarning, match="optimal temperature lies beyond"):
        assert fit_temperature(logits, np.array(labels)).temperature == pytest.approx(bound)


def test_constant_logits_keep_temperature_one():
    fit = fit_temperature(np.ones((3, 2)), np.array([0, 1, 1]))
    assert (fit.temperature, fit.nll_before) == (1.0, pytest.approx(math.log(2)))


def test_bad_input_is_named(classes):
    logits, labels = classes
    bad = logits.copy()
    bad[5, 1] = math.nan
    with pytest.raises(ValueError, match=r"logits must be finite.*row 5"):
        fit_temperature(bad, labels)
    with pytest.raises(ValueError, match="at least two classes"):
        fit_temperature(logits[:, :1], labels)
    with pytest.raises(ValueError, match="RandomSampler"):
        fit_temperature(logits, loader_of(logits, labels, shuffle=True))
    with pytest.raises(ValueError, match="got 599 for 600"):
        fit_temperature(logits, labels[1:])
    with pytest.raises(TypeError, match=r"of a posterior pass its \.model"):
        fit_temperature("logits", labels)
    for temperature in (0.0, -1.0, math.nan):
        with pytest.raises(ValueError, match="temperature must be positive"):
            TemperatureScaling(temperature, nll_before=1.0, nll_after=1.0)


def _sequences(classes):
    """20 sequences of 30 positions, a third of whose labels do not count."""
    logits, labels = classes
    ignored = np.where(np.arange(len(labels)) % 3 == 1, -100, labels)
    return logits.reshape(20, 30, -1), ignored.reshape(20, 30)


def test_positions_that_count_are_samples(classes):
    logits, labels = classes
    sequences, ignored = _sequences(classes)
    assert fit_temperature(sequences, labels.reshape(20, 30)) == fit_temperature(logits, labels)
    counted = np.arange(len(labels)) % 3 != 1
    expected = fit_temperature(logits[counted], labels[counted])
    assert fit_temperature(sequences, ignored, ignore_index=-100) == expected
    flat = ignored.reshape(-1)
    assert fit_temperature(logits, flat, ignore_index=-100) == expected


def test_a_model_of_sequences_may_have_batches_of_unlike_lengths(classes):
    sequences, ignored = map(torch.tensor, _sequences(classes))
    ragged = [(sequences[:12, :20], ignored[:12, :20]), (sequences[12:], ignored[12:])]
    rows = torch.cat([x.reshape(-1, 4) for x, _ in ragged])
    labels = torch.cat([y.reshape(-1) for _, y in ragged])
    got = fit_temperature(nn.Identity(), ragged, ignore_index=-100)
    assert got == fit_temperature(rows, labels, ignore_index=-100)
    collected = collect_logits(nn.Identity(), ragged)
    assert torch.equal(collected[0], rows)
    assert torch.equal(collected[1], labels)


def test_temperature_and_evaluation_count_the_same_positions(classes):
    sequences, ignored = _sequences(classes)
    fit = fit_temperature(sequences, ignored, ignore_index=-100)
    la = FakePosterior()
    la.ignore_index = -100
    scaled = fit.probs(torch.tensor(sequences))
    record = evaluate(la, loader_of(scaled, ignored, batch_size=7))
    assert record.nll == pytest.approx(fit.nll_after, rel=RTOL)
    assert record.n_samples == 400


def test_labels_of_sequences_are_checked(classes):
    sequences, ignored = _sequences(classes)
    with pytest.raises(ValueError, match=r"labels of sequences must have shape \(20, 30\)"):
        fit_temperature(sequences, ignored[:, :5])
    with pytest.raises(ValueError, match="every label is ignore_index=-100"):
        fit_temperature(sequences, np.full((20, 30), -100), ignore_index=-100)
    with pytest.raises(ValueError, match="dtype uint8 never equal ignore_index=-100"):
        fit_temperature(sequences, np.ones((20, 30), np.uint8), ignore_index=-100)
    with pytest.raises(ValueError, match="labels must lie in"):
        fit_temperature(sequences, ignored)
