"""Batch-size sweeps and figures."""

from __future__ import annotations

import json

import pytest
import torch
from matplotlib import colors

from laplace_debiased.diagnostics import (
    batch_size_sweep,
    directional_profile,
    disjoint_batches,
    plot_eigenspaces,
    plot_profiles,
    top_eigenpairs,
)
from tests.zoo import problem


def test_disjoint_batches_share_no_sample_and_depend_on_the_generator_only():
    dataset = list(range(20))
    one, other = disjoint_batches(dataset, 10, torch.Generator().manual_seed(0))
    assert sorted([*one.tolist(), *other.tolist()]) == dataset
    again, _ = disjoint_batches(dataset, 10, torch.Generator().manual_seed(0))
    assert torch.equal(one, again)
    for size in (0, 11):
        with pytest.raises(ValueError, match="two disjoint batches"):
            disjoint_batches(dataset, size, torch.Generator())


def test_bias_and_misalignment_shrink_with_batch_size_and_spectra_agree(untouched):
    p = problem("cnn", n=400)
    reference = [(p.x, p.y)]
    with untouched(p.model):
        sweep = batch_size_sweep(
            p.model, p.likelihood, p.dataset, reference, (4, 150), k=4, pairs=4, seed=1
        )
    own, overlap = sweep.own_to_reference.mean(1), sweep.overlap.mean(1)
    assert own[0] > own[1] > 0.8
    assert overlap[0] < overlap[1]
    assert sweep.spectrum_ratio[1].mean() == pytest.approx(1.0, abs=0.3)
    assert json.loads(json.dumps(sweep.to_dict()))["batch_sizes"] == [4, 150]
    assert len(sweep.plot().axes) == 2
    with pytest.raises(ValueError, match="batch sizes"):
        batch_size_sweep(p.model, p.likelihood, p.dataset, reference, ())
    with pytest.raises(TypeError, match="reference_loader"):
        batch_size_sweep(p.model, p.likelihood, p.dataset, None, (4,))
    for name, bad in {"batch_sizes": (4, "x"), "pairs": "x", "seed": "x"}.items():
        with pytest.raises(TypeError, match=f"^{name} must be"):
            batch_size_sweep(p.model, p.likelihood, p.dataset, reference, **{name: bad})


def test_the_profiles_figure_shows_the_three_measurements(tmp_path):
    p = problem("mlp")
    profile = directional_profile(
        p.model, p.likelihood, (p.x[:5], p.y[:5]), (p.x[5:10], p.y[5:10]), p.loader(), 6
    )
    figure = profile.plot()
    slopes, curvatures = figure.axes
    drawn = {colors.to_hex(line.get_color()): line.get_ydata() for line in curvatures.lines}
    assert drawn["#d55e00"].tolist() == profile.own.curvature.mean.tolist()
    assert drawn["#0072b2"].tolist() == profile.other.curvature.mean.tolist()
    assert drawn["#000000"].tolist() == profile.reference.curvature.mean.tolist()
    assert curvatures.get_yscale() == "log"
    assert len(slopes.get_legend().get_texts()) == 3
    figure.savefig(tmp_path / "profile.png")
    two = plot_profiles({"without": profile, "with": profile.with_weight_decay(0.1)})
    assert len(two.axes) == 4
    assert two.axes[0].get_title() == "without"
    with pytest.raises(ValueError, match="empty"):
        plot_profiles({})


def test_indefinite_curvatures_are_drawn_on_a_linear_axis():
    p = problem("mlp")
    batches = (p.x[:5], p.y[:5]), (p.x[5:10], p.y[5:10])
    profile = directional_profile(p.model, p.likelihood, *batches, k=100, matrix="hessian")
    assert (profile.own.curvature.mean < 0).any()
    assert profile.plot().axes[1].get_yscale() == "linear"


def test_the_eigenspaces_figure_ends_at_one_for_equal_batches():
    p = problem("mlp")
    pairs = top_eigenpairs(p.model, p.likelihood, (p.x[:5], p.y[:5]), 4)
    figure = plot_eigenspaces(pairs, pairs)
    (image,) = figure.axes[1].images
    assert image.get_array()[:, -1].min() == pytest.approx(1.0, abs=1e-10)
