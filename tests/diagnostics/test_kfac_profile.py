"""Profiles of K-FAC eigenbases against dense oracles."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from laplace_debiased.diagnostics import kfac_profile
from laplace_debiased.errors import CoverageError
from laplace_debiased.posterior import DebiasedKronLaplace
from tests.diagnostics import oracles
from tests.oracles import dense_bases, ggn, loss_hessians
from tests.tolerances import assert_exact, assert_same
from tests.zoo import Breaking, Problem, problem

OWN, OTHER, REST = slice(0, 14), slice(14, 20), slice(20, None)
# Fourteen samples give every factor full rank: its eigenbasis is unique.
ALL = 10_000


def profile_of(p: Problem, n_bands: int = ALL, **options):
    return kfac_profile(
        p.model,
        p.likelihood,
        (p.x[OWN], p.y[OWN]),
        (p.x[OTHER], p.y[OTHER]),
        p.loader(REST, 3),
        n_bands,
        **options,
    )


def ranked_bases(p: Problem) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Dense K-FAC eigenvectors [P_block, P_block] by own eigenvalue, and these eigenvalues."""

    def fitted(magnitudes: str):
        la = DebiasedKronLaplace(p.model, p.likelihood, scheme="single", magnitudes=magnitudes)
        la.fit(p.loader(OWN), n_data=1)
        return la.H

    products, exact = fitted("kfac"), fitted("ggn")
    bases, eigenvalues = {}, {}
    for i, (name, basis) in enumerate(zip(p.names, dense_bases(exact), strict=True)):
        # A bias has one factor, its own GGN block: the eigenvalues are the exact curvatures.
        chosen = products if name.endswith("weight") else exact
        values = chosen.blocks[i].eigenvalues.flatten()
        order = values.argsort(descending=True)
        bases[name], eigenvalues[name] = basis[:, order], values[order]
    return bases, eigenvalues


def blocks_of(p: Problem, matrix: Tensor) -> dict[str, Tensor]:
    """Entries of each parameter along the last dimension; diagonal blocks of square matrices."""
    named, start, parts = dict(p.model.named_parameters()), 0, {}
    for name in p.names:
        part = slice(start, start + named[name].numel())
        start = part.stop
        parts[name] = matrix[part, part] if matrix.shape[0] == matrix.shape[1] else matrix[:, part]
    return parts


def is_tied(values: Tensor) -> bool:
    return bool((values.diff().abs() <= 1e-10 * values[:-1]).any())


@pytest.mark.parametrize("likelihood", ["classification", "regression"])
@pytest.mark.parametrize("kind", ["mlp", "cnn", "positions"])
def test_every_direction_equals_the_dense_oracle_on_all_three_sets(kind, likelihood):
    p = problem(kind, likelihood)
    bases, eigenvalues = ranked_bases(p)
    profile = profile_of(p)
    assert list(profile.blocks) == p.names
    gradients = blocks_of(p, oracles.gradients(p.model, likelihood, p.x, p.y))
    signs = {n: torch.where(gradients[n][OWN].mean(0) @ u < 0, -1.0, 1.0) for n, u in bases.items()}
    for role, index in (("own", OWN), ("other", OTHER), ("reference", REST)):
        curvatures = blocks_of(p, ggn(p, p.names, index))
        for name, u in bases.items():
            quadratic = getattr(profile.blocks[name].profile, role)
            slopes = gradients[name][index] @ u * signs[name]
            for actual, expected in (
                (quadratic.curvature.mean, oracles.along(curvatures[name], u)),
                (quadratic.slope.mean, slopes.mean(0)),
                (quadratic.slope.stderr, slopes.std(0) / len(slopes) ** 0.5),
            ):
                # Equal eigenvalues (of the Gaussian's Hessian, the identity) have no order.
                tied = is_tied(eigenvalues[name])
                assert_exact(*(v.sort().values if tied else v for v in (actual, expected)))
    for name, values in eigenvalues.items():
        assert_exact(profile.blocks[name].kfac_curvature, values)
        assert (profile.blocks[name].profile.own.slope.mean >= 0).all()


def test_the_last_layer_of_a_perceptron_has_the_eigenbasis_of_its_textbook_factors():
    p = problem("mlp")
    with torch.no_grad():
        features = p.model[:2](p.x)
        hessians = loss_hessians(p.likelihood, p.model(p.x), p.y)
    left = torch.linalg.eigh(hessians[OWN].mean(0)).eigenvectors
    right = torch.linalg.eigh(features[OWN].T @ features[OWN] / 14).eigenvectors
    squares = torch.einsum("ci,ncd,di->ni", left, hessians, left)[:, :, None]
    squares = squares * (features @ right).square()[:, None, :]
    block = profile_of(p).blocks["2.weight"]
    kfac = torch.outer(
        torch.einsum("ci,cd,di->i", left, hessians[OWN].mean(0), left),
        (features[OWN] @ right).square().mean(0),
    )
    order = kfac.flatten().argsort(descending=True)
    for quadratic, index in ((block.profile.own, OWN), (block.profile.other, OTHER)):
        expected = squares[index].mean(0).flatten()[order]
        # Along a direction in which the logits' Hessian vanishes both are zero up to rounding.
        assert_exact(quadratic.curvature.mean, expected)


@pytest.mark.parametrize("n_bands", [1, 4, 7])
def test_bands_are_means_over_neighbouring_ranks(n_bands):
    p = problem("cnn")
    whole, banded = profile_of(p), profile_of(p, n_bands)
    for name, block in banded.blocks.items():
        single = whole.blocks[name].profile
        assert block.first_rank[0] == 1
        assert block.last_rank[-1] == single.n_directions
        assert block.first_rank[1:] == tuple(rank + 1 for rank in block.last_rank[:-1])
        assert 1 <= len(block.first_rank) <= max(n_bands, 1)
        weights = torch.zeros(single.n_directions, len(block.first_rank), dtype=torch.float64)
        for band, (first, last) in enumerate(zip(block.first_rank, block.last_rank, strict=True)):
            weights[first - 1 : last, band] = 1.0 / (last - first + 1)
        for role in ("own", "other", "reference"):
            for what in ("slope", "curvature"):
                fine = getattr(getattr(single, role), what).combine(weights)
                coarse = getattr(getattr(block.profile, role), what)
                assert_same(coarse.mean, fine.mean)
                assert_exact(coarse.covariance, fine.covariance)


def test_with_one_batch_in_both_roles_the_bias_is_invisible():
    p = problem("cnn")
    batch, other = (p.x[:8], p.y[:8]), (p.x[8:16], p.y[8:16])
    same = kfac_profile(p.model, p.likelihood, batch, batch, n_bands=5)
    fresh = kfac_profile(p.model, p.likelihood, batch, other, n_bands=5)
    for name, block in same.blocks.items():
        assert_same(block.profile.other.curvature.mean, block.profile.own.curvature.mean)
        assert block.profile.reference is None
        ratio = fresh.blocks[name].summary(1).rows[0].own_to_other.value
        assert abs(ratio - 1.0) > 1e-3


def test_the_bias_on_random_labels_has_the_sign_that_the_paper_gives():
    # 40 pairs of batches of 6; a t-test at 3 standard errors has an error rate of 0.1 %.
    p = problem("mlp", n=480, seed=4)
    tops, bottoms = [], []
    for i in range(0, 480, 12):
        pair = [(p.x[s], p.y[s]) for s in (slice(i, i + 6), slice(i + 6, i + 12))]
        profile = kfac_profile(p.model, p.likelihood, *pair, n_bands=ALL).blocks["0.weight"].profile
        gap = profile.own.curvature.mean - profile.other.curvature.mean
        tops.append(gap[0])
        bottoms.append(gap[10:].mean())
    top, bottom = torch.stack(tops), torch.stack(bottoms)
    assert top.mean() > 3 * top.std() / len(top) ** 0.5
    assert bottom.mean() < -3 * bottom.std() / len(bottom) ** 0.5


def test_rebatching_order_and_chunks_change_nothing():
    p = problem("cnn")
    once = profile_of(p, 6)
    flipped = (p.x[OWN].flip(0), p.y[OWN].flip(0))
    shuffled = DataLoader(p.loader(REST).dataset, batch_size=4, shuffle=True)
    for again in (
        kfac_profile(p.model, p.likelihood, flipped, (p.x[OTHER], p.y[OTHER]), shuffled, 6),
        profile_of(p, 6, byte_budget=1),
    ):
        for name, block in again.blocks.items():
            for role in ("own", "other", "reference"):
                one, two = (getattr(b.profile, role) for b in (once.blocks[name], block))
                assert_exact(two.curvature.mean, one.curvature.mean)
                assert_exact(two.slope.covariance, one.slope.covariance)


def test_weight_decay_moves_slopes_by_the_parameters_along_the_directions():
    p = problem("mlp")
    bases, eigenvalues = ranked_bases(p)
    for name, block in profile_of(p).blocks.items():
        theta = dict(p.model.named_parameters())[name].detach().flatten()
        actual, expected = block.profile.parameters_along.abs(), (bases[name].T @ theta).abs()
        # Directions in which the logits' Hessian vanishes have no order.
        curved = eigenvalues[name] > 1e-12 * eigenvalues[name][0]
        assert_exact(actual[curved], expected[curved])
        assert_exact(actual[~curved].sort().values, expected[~curved].sort().values)
        decayed = block.profile.with_weight_decay(0.5)
        moved = decayed.own.slope.mean - block.profile.own.slope.mean
        assert_exact(moved, 0.5 * block.profile.parameters_along)


def test_summary_names_true_ranks():
    p = problem("cnn")
    for block in profile_of(p, 5).blocks.values():
        rows = block.summary(2).rows
        assert rows[0].first == 1
        assert rows[-1].last == block.last_rank[-1]
        assert rows[0].last + 1 == rows[1].first


def test_plots_show_ranks_and_refuse_unknown_blocks():
    p = problem("cnn")
    profile = profile_of(p, 12)
    figure = profile.plot()
    assert [axis.get_title() for axis in figure.axes[:3]] == ["0.weight", "2.weight", "5.weight"]
    labels = [tick.get_text() for tick in figure.axes[3].get_xticklabels()]
    assert labels == ["1", "10"]
    assert len(profile.plot(["0.bias"]).axes) == 2
    for names in (["nothing"], []):
        with pytest.raises(ValueError, match="names must be"):
            profile.plot(names)


def test_what_is_not_covered_is_left_out_and_named():
    p = problem("mlp")
    normed = nn.utils.parametrizations.weight_norm(nn.Linear(4, 4, bias=False))
    gated = nn.Sequential(normed, *p.model).double()
    q = Problem(gated, p.x, p.y, p.likelihood)
    profile = profile_of(q, 4)
    assert list(profile.blocks) == ["1.weight", "1.bias", "3.weight", "3.bias"]
    originals = {f"0.parametrizations.weight.original{i}" for i in (0, 1)}
    assert set(profile.coverage.excluded) == originals
    with pytest.raises(CoverageError):
        profile_of(Problem(normed.double(), p.x, p.y % 4, p.likelihood), 4)


def test_the_users_world_is_untouched_also_when_the_loader_raises(untouched):
    p = problem("cnn")
    p.model.train()
    p.model[0].eval()
    p.model(p.x).sum().backward()
    loader = DataLoader(p.dataset, batch_size=6, shuffle=True)
    pair = (p.x[OWN], p.y[OWN]), (p.x[OTHER], p.y[OTHER])
    with untouched(p.model, loader):
        kfac_profile(p.model, p.likelihood, *pair, loader, 4)
    breaking = Breaking(p.loader(), after=2)
    with untouched(p.model), pytest.raises(OSError, match="the disk is gone"):
        kfac_profile(p.model, p.likelihood, *pair, breaking, 4)


def test_bad_calls_raise():
    p = problem("mlp")
    pair = (p.x[OWN], p.y[OWN]), (p.x[OTHER], p.y[OTHER])
    for bad in (0, True, 2.5):
        with pytest.raises(ValueError, match="n_bands"):
            kfac_profile(p.model, p.likelihood, *pair, n_bands=bad)
    with pytest.raises(ValueError, match="reference_loader gave no batches"):
        kfac_profile(p.model, p.likelihood, *pair, iter(()))
    with pytest.raises(ValueError, match="class indices"):
        kfac_profile(p.model, p.likelihood, pair[0], (p.x[OTHER], p.y[OTHER] + 7))
    with pytest.raises(TypeError, match="pairs"):
        kfac_profile(p.model, p.likelihood, pair[0], p.x)
