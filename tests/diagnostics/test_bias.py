"""The report of the bias that a fit's folds reveal."""

import math

import pytest
import torch

from laplace_debiased.debiasing.bias import Comparison, bias_report, compared


def tables(*values):
    return (torch.tensor(values, dtype=torch.float64),)


def test_ratios_are_by_tenth_of_the_directions_in_the_order_of_own_curvature():
    own = torch.arange(20.0, 0.0, -1.0)
    factor = torch.arange(1.0, 11.0).repeat_interleave(2)
    shuffled = torch.randperm(20, generator=torch.Generator().manual_seed(0))
    report = bias_report([compared((own[shuffled],), ((own / factor)[shuffled],))])
    assert report.decile_ratios == pytest.approx([float(i) for i in range(1, 11)])
    assert report.scale_ratio == pytest.approx(float(own.sum() / (own / factor).sum()))


def test_the_error_is_that_of_the_mean_over_measurements():
    once = bias_report([compared(tables(2.0), tables(1.0))])
    assert math.isnan(once.scale_error)
    twice = bias_report([compared(tables(v), tables(1.0)) for v in (2.0, 4.0)])
    assert (twice.scale_ratio, twice.scale_error) == pytest.approx((3.0, 1.0))
    assert "nan" not in str(twice)


def test_directions_without_curvature_are_named_as_such():
    own, other = tables(*[1.0] * 5, *[0.0] * 5), tables(*[1.0] * 4, *[0.0] * 6)
    report = bias_report([compared(own, other)])
    assert report.decile_ratios[4] == math.inf
    assert all(math.isnan(ratio) for ratio in report.decile_ratios[5:])
    lines = str(report).splitlines()
    assert [line for line in lines if "no curvature on either" in line] == lines[6:11]
    assert "nan" not in str(report)


def test_nothing_to_compare_says_which_scheme_to_take():
    with pytest.raises(ValueError, match="scheme='two_batch'"):
        bias_report([])


def test_an_entry_for_several_directions_counts_for_each_of_them():
    g = torch.Generator().manual_seed(0)
    own, other = torch.rand(2, 7, dtype=torch.float64, generator=g)
    counts = torch.tensor([1, 4, 1, 0, 9, 2, 6])
    few = compared((own,), (other,), [counts])
    spread = compared((own.repeat_interleave(counts),), (other.repeat_interleave(counts),))
    assert few.own == pytest.approx(spread.own)
    assert few.other == pytest.approx(spread.other)


def test_states_of_tables_are_read_as_their_comparison():
    own, other = tables(3.0, 1.0), tables(2.0, 0.5)
    for state in ([list(own), list(other)], [own[0], other[0]], compared(own, other).to_state()):
        comparison = Comparison.from_state(state, "comparisons[0]")
        assert bias_report([comparison]).scale_ratio == 4.0 / 2.5
