"""`evaluate` on posteriors and probabilities of classifiers."""

import math
from collections import UserDict

import numpy as np
import pytest
import torch
from torch.utils.data import BatchSampler, RandomSampler

from laplace_debiased.calibration import evaluate
from tests.calibration.helpers import (
    RTOL,
    FakePosterior,
    calibrated_classes,
    loader_of,
    softmax,
)


@pytest.fixture(scope="module")
def classes():
    logits, labels = calibrated_classes(n=100)
    return softmax(logits), labels


@pytest.fixture(scope="module")
def outside():
    return softmax(0.5 * calibrated_classes(n=60, seed=1)[0])


def _close(one, other):
    one, other = one.to_dict(), other.to_dict()
    assert one.keys() == other.keys()
    for key, value in one.items():
        assert other[key] == (value if value is None else pytest.approx(value, rel=RTOL)), key


def test_record_of_known_predictions():
    probs = np.array([[0.9, 0.1], [0.8, 0.2], [0.3, 0.7], [0.6, 0.4]])
    record = evaluate(probs, np.array([0, 0, 1, 1]))
    assert record.accuracy == 0.75
    assert record.n_samples == 4
    assert record.nll == pytest.approx(-np.mean(np.log([0.9, 0.8, 0.7, 0.4])), rel=RTOL)
    assert record.brier == pytest.approx(np.mean([0.02, 0.08, 0.18, 0.72]), rel=RTOL)
    assert record.ece == pytest.approx((0.1 + 0.2 + 0.3 + 0.6) / 4, rel=RTOL)
    assert record.mce == pytest.approx(0.6, rel=RTOL)
    for name in ("auroc", "fpr95", "rmse", "ence", "interval_coverage", "total_std"):
        assert getattr(record, name) is None


def test_posterior_and_its_probabilities_score_alike(classes, outside):
    probs, labels = classes
    la = FakePosterior()
    from_posterior = evaluate(
        la, loader_of(probs, labels), ood_loader=loader_of(outside, labels[:60])
    )
    from_probs = evaluate(probs, loader_of(probs, labels), ood_probs=outside)
    _close(from_posterior, from_probs)
    assert from_posterior.n_ood_samples == 60
    assert 0.0 < from_posterior.fpr95 < 1.0


def test_batches_order_and_class_names_change_nothing(classes):
    probs, labels = classes
    reference = evaluate(probs, labels)
    order = np.random.default_rng(2).permutation(len(labels))
    _close(reference, evaluate(FakePosterior(), loader_of(probs, labels, batch_size=7)))
    _close(reference, evaluate(FakePosterior(), loader_of(probs, labels, shuffle=True)))
    _close(reference, evaluate(probs[order], labels[order]))
    _close(reference, evaluate(probs[:, ::-1].copy(), 3 - labels))


def test_repeating_the_data_changes_only_the_count(classes):
    probs, labels = classes
    once = evaluate(probs, labels).to_dict()
    twice = evaluate(np.tile(probs, (2, 1)), np.tile(labels, 2)).to_dict()
    assert twice.pop("n_samples") == 2 * once.pop("n_samples")
    # Ranks count samples: twice as many cut the same curve, and the same bins, elsewhere.
    assert twice.pop("aurc") == pytest.approx(once.pop("aurc"), rel=0.05)
    assert twice.pop("adaptive_ece") == pytest.approx(once.pop("adaptive_ece"), rel=0.3)
    assert twice == {k: v if v is None else pytest.approx(v, rel=RTOL) for k, v in once.items()}


def test_tensors_and_arrays_score_alike(classes):
    probs, labels = classes
    tensor = torch.tensor(probs, requires_grad=True)
    _close(evaluate(probs, labels), evaluate(tensor, torch.tensor(labels)))


@pytest.mark.parametrize("labels_left", [1, 2])
def test_few_distinct_labels_in_a_multiclass_problem(classes, labels_left):
    probs, labels = classes
    keep = labels < labels_left
    record = evaluate(probs[keep], labels[keep])
    assert record.accuracy == np.mean(probs[keep].argmax(1) == labels[keep])
    assert math.isfinite(record.ece)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_narrow_dtypes_are_scored_in_float64(classes, dtype):
    probs, labels = classes
    record = evaluate(torch.tensor(probs).to(dtype), labels)
    assert record.nll == pytest.approx(evaluate(probs, labels).nll, rel=torch.finfo(dtype).eps)


def test_mapping_batches_take_the_posteriors_own_label_key(classes):
    probs, labels = classes
    x, y = torch.tensor(probs), torch.tensor(labels)
    batches = [{"x": x[:50], "target": y[:50]}, {"x": x[50:], "target": y[50:]}]
    la = FakePosterior(dict_key_y="target")
    _close(evaluate(probs, labels), evaluate(la, batches))
    nested = [({"x": x}, y)]
    _close(evaluate(probs, labels), evaluate(FakePosterior(), nested))
    hugging_face = [UserDict({"x": x, "labels": y})]
    _close(evaluate(probs, labels), evaluate(probs, hugging_face))


@pytest.mark.parametrize("wrap", [lambda x: x, lambda x: (x,), lambda x: {"x": x}])
def test_out_of_distribution_batches_need_no_labels(classes, outside, wrap):
    probs, labels = classes
    expected = evaluate(probs, labels, ood_probs=outside)
    ood_loader = [wrap(torch.tensor(outside[:30])), wrap(torch.tensor(outside[30:]))]
    _close(expected, evaluate(FakePosterior(), loader_of(probs, labels), ood_loader=ood_loader))


@pytest.mark.parametrize(
    ("tuned", "asked", "expected"),
    [
        (None, {}, {}),
        ("bridge", {}, {"link_approx": "bridge"}),
        ("bridge", {"link_approx": "mc"}, {"link_approx": "mc"}),
        (None, {"pred_type": "glm"}, {"pred_type": "glm"}),
        ("probit", {"pred_type": "nn"}, {"pred_type": "nn", "link_approx": "mc"}),
    ],
)
def test_link_is_the_one_asked_for_else_the_tuned_one_else_the_default(
    classes, tuned, asked, expected
):
    la = FakePosterior()
    la.tuned_link_approx = tuned
    loader = loader_of(*classes)
    evaluate(la, loader, ood_loader=loader, **asked)
    assert la.calls
    assert all(call == expected for call in la.calls)


def test_probability_zero_is_finite_and_warned_about():
    probs = torch.tensor([[1.0, 0.0], [0.5, 0.5]])
    with pytest.warns(UserWarning, match=r"1 of 2 labels have probability zero.*87\.3 nats"):
        record = evaluate(probs, torch.tensor([1, 0]))
    expected = (-math.log(torch.finfo(torch.float32).tiny) + math.log(2)) / 2
    assert record.nll == pytest.approx(expected, rel=RTOL)


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ([0.5, math.nan], "finite.*row 2"),
        ([0.5, math.inf], "finite.*row 2"),
        ([1.1, -0.1], "non-negative.*row 2"),
        ([0.5, 0.4], "sum 0.9 in row 2"),
    ],
)
@pytest.mark.parametrize("as_posterior", [True, False])
def test_invalid_probabilities_name_their_row(row, message, as_posterior):
    probs = np.array([[0.5, 0.5], [0.1, 0.9], row, row])
    labels = np.zeros(4, dtype=int)
    source = FakePosterior() if as_posterior else probs
    with pytest.raises(ValueError, match=message):
        evaluate(source, loader_of(probs, labels, batch_size=3))


def test_negative_probability_is_an_error_though_the_rest_makes_up_for_it():
    probs = np.array([[0.5, 0.3, 0.2], [0.6, 0.6, -0.2]])
    with pytest.raises(ValueError, match=r"non-negative.*row 1"):
        evaluate(probs, np.array([0, 1]))


@pytest.mark.parametrize("shape", [(4,), (4, 1), (4, 2, 2, 2)])
def test_probabilities_have_one_row_per_sample_and_two_classes(shape):
    with pytest.raises(ValueError, match="at least two classes"):
        evaluate(np.full(shape, 0.5), np.zeros(4, dtype=int))


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        (np.array([0, 1, 2]), r"0\.\.1, got 2 in row 2"),
        (np.array([0, -100, 1]), r"got -100 in row 1"),
        (np.array([0.0, 1.0, 0.0]), "one class index per sample"),
        (np.eye(2, dtype=int)[[0, 1, 0]], "argmax"),
        (np.array([0, 1]), "got 2 for 3 predictions"),
    ],
)
def test_invalid_labels_are_named(labels, message):
    with pytest.raises(ValueError, match=message):
        evaluate(np.full((3, 2), 0.5), labels)


def _random_batch_sampler(dataset):
    return BatchSampler(RandomSampler(dataset), 4, drop_last=False)


def test_precomputed_predictions_reject_a_shuffled_loader(classes):
    probs, labels = classes
    shuffled = loader_of(probs, labels, shuffle=True)
    batch_sampler = _random_batch_sampler(shuffled.dataset)
    hidden = torch.utils.data.DataLoader(shuffled.dataset, batch_sampler=batch_sampler)
    for loader in (shuffled, hidden):
        with pytest.raises(ValueError, match="RandomSampler"):
            evaluate(probs, loader)


def test_empty_loaders_are_errors(classes):
    probs, labels = classes
    loader = loader_of(probs, labels)
    with pytest.raises(ValueError, match="loader yields no batch"):
        evaluate(FakePosterior(), [])
    with pytest.raises(ValueError, match="loader yields no batch"):
        evaluate(probs, [])
    with pytest.raises(ValueError, match="ood_loader yields no batch"):
        evaluate(FakePosterior(), loader, ood_loader=[])
    with pytest.raises(ValueError, match="at least one sample"):
        evaluate(np.empty((0, 2)), np.empty(0, dtype=int))


def test_wrong_kinds_of_arguments_say_what_to_pass(classes, outside):
    probs, labels = classes
    loader = loader_of(probs, labels)
    with pytest.raises(TypeError, match=r"got Linear; for a plain model pass torch\.softmax"):
        evaluate(torch.nn.Linear(2, 2), loader)
    with pytest.raises(TypeError, match="got int"):
        evaluate(3, loader)
    with pytest.raises(TypeError, match="must be a loader"):
        evaluate(FakePosterior(), 3)
    with pytest.raises(TypeError, match="pairs or mappings"):
        evaluate(FakePosterior(), [torch.tensor(probs)])
    with pytest.raises(TypeError, match="array or list of numbers"):
        evaluate(probs, [(torch.tensor(probs), ["cat"] * len(probs))])
    with pytest.raises(ValueError, match="dict_key_y='labels'"):
        evaluate(FakePosterior(), [{"x": torch.tensor(probs)}])
    with pytest.raises(ValueError, match="'reward_modeling'"):
        evaluate(FakePosterior(likelihood="reward_modeling"), loader)
    with pytest.raises(ValueError, match="ood_loader needs a posterior"):
        evaluate(probs, loader, ood_loader=loader)
    with pytest.raises(ValueError, match="both ood_loader and ood_probs"):
        evaluate(FakePosterior(), loader, ood_loader=loader, ood_probs=outside)
    with pytest.raises(ValueError, match="must have the classes"):
        evaluate(probs, loader, ood_probs=np.full((3, 2), 0.5))


@pytest.mark.parametrize("n_bins", [0, -1])
def test_bins_are_at_least_one(classes, n_bins):
    with pytest.raises(ValueError, match="n_bins"):
        evaluate(*classes, n_bins=n_bins)


@pytest.mark.parametrize("n_bins", [1.5, True, None])
def test_bins_are_an_integer(classes, n_bins):
    with pytest.raises(TypeError, match="n_bins"):
        evaluate(*classes, n_bins=n_bins)


def test_calibrated_predictions_have_a_calibration_error_within_sampling_noise():
    # Seed 0, n = 20000, 15 bins: a bin's gap has standard error ≤ 0.5/√n_b, so E|gap| summed with
    # weights n_b/n is at most Σ √(2/π)·0.5·√n_b/n ≤ 0.4·√(15/n) = 0.011; 0.02 is far outside.
    logits, labels = calibrated_classes(n=20000)
    assert evaluate(softmax(logits), labels).ece < 0.02
    assert evaluate(softmax(2 * logits), labels).ece > 0.08
