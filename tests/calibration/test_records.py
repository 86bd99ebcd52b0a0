"""What `evaluate` returns: numbers, tables, plots."""

import json
import pickle
import sys
from dataclasses import FrozenInstanceError

import pytest
from matplotlib.figure import Figure

from laplace_debiased.calibration import Evaluation, evaluate
from tests.calibration.helpers import (
    RTOL,
    calibrated_classes,
    calibrated_gaussians,
    softmax,
)


@pytest.fixture(scope="module")
def classes():
    logits, labels = calibrated_classes(n=80)
    return softmax(logits), labels


@pytest.fixture(scope="module")
def gaussians():
    mean, std, targets = calibrated_gaussians(n=60)
    return (mean, std**2), targets


def test_record_is_frozen_plain_and_picklable(classes):
    record = evaluate(*classes)
    with pytest.raises(FrozenInstanceError):
        record.nll = 0.0
    numbers = record.to_dict()
    assert json.loads(json.dumps(numbers)) == numbers
    assert all(value is None or type(value) in (int, float) for value in numbers.values())
    assert pickle.loads(pickle.dumps(record)) == record


def test_table_shows_what_applies_and_nothing_else(classes, gaussians):
    table = repr(evaluate(*classes))
    assert "ece" in table
    assert "rmse" not in table
    assert "auroc" not in table
    lines = table.splitlines()[1:]
    assert len({line.index(line.split()[2], 20) for line in lines}) == 1
    assert "interval_coverage" in repr(evaluate(*gaussians))


def test_table_has_a_row_for_every_number():
    record = Evaluation(**dict.fromkeys(Evaluation.__dataclass_fields__, 1))
    rows = {line.split()[0] for line in repr(record).splitlines()[1:]}
    assert rows == record.to_dict().keys()


def test_reliability_plot_draws_each_bins_accuracy_and_confidence(classes):
    record = evaluate(*classes, n_bins=10)
    figure = record.plot_reliability()
    ax, below = figure.axes
    filled = [i for i, count in enumerate(record.curve.counts) if count]
    accuracy, gap = ax.containers
    assert [bar.get_height() for bar in accuracy] == [record.curve.accuracy[i] for i in filled]
    assert [bar.get_y() + bar.get_height() for bar in gap] == pytest.approx(
        [record.curve.confidence[i] for i in filled], rel=RTOL
    )
    assert f"ECE {100 * record.ece:.2f} %" in ax.get_title()
    histogram = below.containers[0]
    assert sum(bar.get_height() for bar in histogram) == pytest.approx(100.0)


def test_regression_plot_draws_coverage_against_level(gaussians):
    record = evaluate(*gaussians)
    ax = record.plot_reliability().axes[0]
    x, y = ax.lines[-1].get_data()
    assert tuple(x) == record.curve.nominal
    assert tuple(y) == record.curve.observed
    assert f"{100 * record.interval_coverage:.1f} %" in ax.get_title()


@pytest.mark.parametrize("layout", ["constrained", "tight"])
def test_labels_stay_inside_the_figure(classes, gaussians, layout):
    left, right = Figure(figsize=(9, 5), layout=layout).subplots(1, 2)
    evaluate(*classes).plot_reliability(left)
    shared = evaluate(*gaussians).plot_reliability(right)
    for figure in (evaluate(*classes).plot_reliability(), shared):
        figure.draw_without_rendering()
        tight, (width, height) = figure.get_tightbbox(), figure.get_size_inches()
        assert min(tight.x0, tight.y0, width - tight.x1, height - tight.y1) > -0.05


@pytest.mark.parametrize("in_grid", [True, False])
def test_given_axes_share_their_place_with_the_histogram(classes, in_grid):
    figure = Figure()
    ax = figure.add_subplot() if in_grid else figure.add_axes((0.2, 0.2, 0.6, 0.6))
    before = ax.get_window_extent().frozen()
    evaluate(*classes).plot_reliability(ax)
    figure.draw_without_rendering()
    upper, lower = (panel.get_window_extent() for panel in figure.axes)
    assert lower.y1 < upper.y0
    assert (lower.y0, upper.y1) == pytest.approx((before.y0, before.y1))


def test_plots_go_into_given_axes_and_leave_pyplot_alone(classes, gaussians):
    figure = Figure(layout="constrained")
    left, right = figure.subplots(1, 2)
    assert evaluate(*classes).plot_reliability(left) is figure
    assert evaluate(*gaussians).plot_reliability(ax=right) is figure
    figure.draw_without_rendering()
    if pyplot := sys.modules.get("matplotlib.pyplot"):
        assert pyplot.get_fignums() == []


def test_record_without_a_curve_says_so():
    with pytest.raises(ValueError, match="no curve"):
        Evaluation(nll=1.0, n_samples=1, n_bins=15).plot_reliability()
