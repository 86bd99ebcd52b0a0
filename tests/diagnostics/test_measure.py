"""Slopes and curvatures along directions against dense oracles."""

from __future__ import annotations

import pytest
import torch

from laplace_debiased.diagnostics import directional_quadratic, measure
from laplace_debiased.diagnostics.measure import Derivatives
from laplace_debiased.network.modes import differentiable_kernels
from laplace_debiased.options import Curvature
from tests.diagnostics import oracles
from tests.oracles import sample_ggns
from tests.tolerances import assert_exact, assert_same
from tests.zoo import Problem, problem

LIKELIHOODS = ("classification", "regression")


def measured(p: Problem, directions, batches=None, **options):
    batches = [(p.x, p.y)] if batches is None else batches
    return directional_quadratic(p.model, p.likelihood, batches, directions, **options)


@pytest.mark.parametrize("likelihood", LIKELIHOODS)
@pytest.mark.parametrize("kind", ["mlp", "cnn", "positions"])
@pytest.mark.parametrize("derivatives", [Derivatives.FORWARD, Derivatives.REVERSE])
def test_ggn_curvatures_slopes_and_their_errors_equal_the_dense_oracle(
    kind, likelihood, derivatives
):
    p = problem(kind, likelihood, n=9)
    directions = oracles.orthonormal(len(oracles.flat(p.model)), 7)
    result = measured(p, directions, derivatives=derivatives)
    curvatures = oracles.along(sample_ggns(p, p.names), directions)
    slopes = oracles.gradients(p.model, likelihood, p.x, p.y) @ directions
    for estimate, values in ((result.curvature, curvatures), (result.slope, slopes)):
        assert_exact(estimate.mean, values.mean(0))
        assert_exact(estimate.covariance, torch.cov(values.T) / len(values))
        assert_exact(estimate.stderr, values.std(0) / len(values) ** 0.5)


@pytest.mark.parametrize("likelihood", LIKELIHOODS)
@pytest.mark.parametrize("kind", ["mlp", "cnn"])
def test_hessian_curvatures_equal_reverse_over_reverse(kind, likelihood):
    p = problem(kind, likelihood, n=5)
    directions = oracles.orthonormal(len(oracles.flat(p.model)), 4)
    result = measured(p, directions, matrix=Curvature.HESSIAN)
    expected = oracles.along(oracles.hessians(p.model, likelihood, p.x, p.y), directions)
    assert_exact(result.curvature.mean, expected.mean(0))
    assert_exact(result.curvature.covariance, torch.cov(expected.T) / len(expected))


def test_layer_norm_keeps_all_its_second_derivatives():
    model, tokens, labels = oracles.attention()
    directions = oracles.orthonormal(len(oracles.flat(model)), 3)
    p = Problem(model, tokens, labels, "classification")
    result = measured(p, directions, matrix=Curvature.HESSIAN)
    with differentiable_kernels(model):
        theta, step = oracles.flat(model), 1e-4
        at = [
            torch.stack(
                [
                    oracles.sample_losses(model, "classification", tokens, labels, theta + t * u)
                    for u in directions.T
                ]
            ).mean(1)
            for t in (-step, 0.0, step)
        ]
    second_differences = (at[0] - 2 * at[1] + at[2]) / step**2
    torch.testing.assert_close(result.curvature.mean, second_differences, rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("matrix", list(Curvature))
def test_batching_order_and_chunks_change_nothing(matrix, monkeypatch):
    p = problem("cnn", n=11)
    directions = oracles.orthonormal(len(oracles.flat(p.model)), 5)
    whole = measured(p, directions, matrix=matrix)
    shuffled = torch.randperm(11, generator=torch.Generator().manual_seed(1))
    pieces = [(p.x[i], p.y[i]) for i in shuffled.split(4)]
    for size in (2048, 1, 3):
        monkeypatch.setattr(measure, "_HESSIAN_CHUNK_SAMPLES", size)
        monkeypatch.setattr(measure, "_FORWARD_CHUNK_SAMPLES", 4 * size)
        again = measured(p, directions, pieces, matrix=matrix)
        assert_same(again.curvature.mean, whole.curvature.mean)
        assert_same(again.slope.mean, whole.slope.mean)
        assert_same(again.curvature.covariance, whole.curvature.covariance)
        assert again.n_samples == 11


def test_scaling_a_direction_scales_slope_and_curvature():
    p = problem("mlp")
    directions = oracles.orthonormal(len(oracles.flat(p.model)), 3)
    one, two = measured(p, directions), measured(p, -2.0 * directions)
    assert_same(two.slope.mean, -2.0 * one.slope.mean)
    assert_same(two.curvature.mean, 4.0 * one.curvature.mean)


def test_mapping_inputs_give_what_tensors_give():
    p = problem("mlp", n=8)
    directions = oracles.orthonormal(len(oracles.flat(p.model)), 5)
    keyed = oracles.Keyed(p.model)
    batch = {"x": p.x, "scale": torch.tensor(1.0), "label": p.y}
    for derivatives in (Derivatives.FORWARD, Derivatives.REVERSE):
        result = directional_quadratic(
            keyed, p.likelihood, [batch], directions, derivatives=derivatives, dict_key_y="label"
        )
        assert_same(result.curvature.mean, measured(p, directions).curvature.mean)


def test_a_bfloat16_model_is_measured_in_float32():
    p = problem("mlp", dtype=torch.float32)
    half = p.model.to(torch.bfloat16)
    directions = oracles.orthonormal(len(oracles.flat(half)), 3).float()
    q = Problem(half, p.x.bfloat16(), p.y, p.likelihood)
    result = measured(q, directions)
    wide = Problem(half.float(), p.x.bfloat16().float(), p.y, p.likelihood)
    torch.testing.assert_close(
        result.curvature.mean, measured(wide, directions).curvature.mean, rtol=1e-6, atol=0
    )


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda p: Problem(p.model, p.x.clone().fill_(torch.nan), p.y, p.likelihood), "NaN"),
        (lambda p: Problem(p.model, p.x, p.y + 7, p.likelihood), "class indices"),
        (lambda p: Problem(p.model, p.x, p.y[:-1], p.likelihood), "targets"),
        (lambda p: Problem(p.model, p.x[:0], p.y[:0], p.likelihood), "empty"),
    ],
)
def test_bad_data_raise(change, message):
    p = change(problem("mlp"))
    with pytest.raises(ValueError, match=message):
        measured(p, oracles.orthonormal(len(oracles.flat(p.model)), 2))


BAD_ARGUMENTS = {
    "model": "x",
    "batches": 3,
    "directions": [1.0],
    "progress_bar": "no",
}


def test_bad_calls_raise():
    p = problem("mlp")
    size = len(oracles.flat(p.model))
    with pytest.raises(ValueError, match="shape"):
        measured(p, torch.zeros(size + 1, 2))
    with pytest.raises(ValueError, match="forward over reverse"):
        measured(p, torch.eye(size), matrix=Curvature.HESSIAN, derivatives=Derivatives.FORWARD)
    for name, bad in BAD_ARGUMENTS.items():
        given = {"batches": p.loader(), "directions": torch.eye(size)[:, :2], name: bad}
        given = {"model": p.model, "likelihood": p.likelihood} | given
        with pytest.raises(TypeError, match=f"^{name} must "):
            directional_quadratic(**given)
    with pytest.raises(ValueError, match="no batches"):
        measured(p, torch.eye(size), iter(()))
    with pytest.raises(TypeError, match="pair"):
        measured(p, torch.eye(size), [p.x])
    for parameter in p.model.parameters():
        parameter.requires_grad_(False)
    with pytest.raises(ValueError, match="no trainable parameter"):
        measured(p, torch.eye(size))
