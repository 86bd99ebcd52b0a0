"""Top eigenpairs and eigenspace overlap."""

from __future__ import annotations

import pytest
import torch

from laplace_debiased.diagnostics import eigenspace_overlap, top_eigenpairs
from tests.diagnostics import oracles
from tests.oracles import ggn
from tests.tolerances import assert_exact
from tests.zoo import problem


def dense_top(matrix, k):
    values, vectors = torch.linalg.eigh(matrix)
    return values.flip(0)[:k], vectors.flip(1)[:, :k]


@pytest.mark.parametrize("likelihood", ["classification", "regression"])
@pytest.mark.parametrize("kind", ["mlp", "cnn"])
@pytest.mark.parametrize("solver", ["gram", "lanczos", "dense"])
def test_every_solver_finds_the_dense_ggn_eigenpairs(kind, likelihood, solver):
    p = problem(kind, likelihood, n=6)
    pairs = top_eigenpairs(p.model, likelihood, (p.x, p.y), 8, solver=solver)
    values, vectors = dense_top(ggn(p, p.names), 8)
    assert_exact(pairs.values, values)
    assert eigenspace_overlap(pairs.vectors, vectors) == pytest.approx(1.0, abs=1e-8)
    assert_exact(pairs.vectors.T @ pairs.vectors, torch.eye(8, dtype=torch.float64))


@pytest.mark.parametrize("solver", ["lanczos", "dense"])
def test_hessian_eigenpairs_of_a_transformer_equal_reverse_over_reverse(solver):
    model, tokens, labels = oracles.attention()
    pairs = top_eigenpairs(
        model, "classification", (tokens, labels), 5, matrix="hessian", solver=solver
    )
    expected = oracles.mean_hessian(model, "classification", tokens, labels)
    assert_exact(pairs.values, dense_top(expected, 5)[0])


@pytest.mark.parametrize("solver", ["gram", "lanczos"])
def test_float32_eigenvalues_agree_with_float64(solver):
    p = problem("cnn", dtype=torch.float32)
    narrow = top_eigenpairs(p.model, "classification", (p.x, p.y), 6, solver=solver)
    p.model.double()
    wide = top_eigenpairs(p.model, "classification", (p.x.double(), p.y), 6, solver=solver)
    torch.testing.assert_close(narrow.values, wide.values, rtol=2e-5, atol=0.0)


def test_no_more_eigenpairs_than_the_rank_of_the_batch():
    p = problem("cnn", n=2)
    for solver in ("gram", "lanczos", "dense"):
        k = 40 if solver == "lanczos" else 100
        pairs = top_eigenpairs(p.model, "classification", (p.x, p.y), k, solver=solver)
        assert pairs.values.shape == (4,)  # 2 samples, C − 1 = 2 curved directions each
        assert pairs.vectors.shape[1] == 4


def test_more_samples_than_a_chunk_change_nothing_but_rounding(monkeypatch):
    from laplace_debiased.diagnostics import eigen, network

    p = problem("mlp", n=13)
    for matrix in ("ggn", "hessian"):
        whole = top_eigenpairs(p.model, "classification", (p.x, p.y), 4, matrix=matrix)
        with monkeypatch.context() as patch:
            patch.setattr(eigen, "_LANCZOS_CHUNK_SAMPLES", 5)
            patch.setattr(network, "DEFAULT_BYTE_BUDGET", 1)
            for solver in ("gram", "lanczos"):
                if (matrix, solver) == ("hessian", "gram"):
                    continue
                pieces = top_eigenpairs(
                    p.model, "classification", (p.x, p.y), 4, matrix=matrix, solver=solver
                )
                assert_exact(pieces.values, whole.values)


def test_overlap_is_the_mean_squared_cosine_of_principal_angles():
    u, v = oracles.orthonormal(12, 4, seed=1), oracles.orthonormal(12, 4, seed=2)
    cosines = torch.linalg.svdvals(u.T @ v)
    assert eigenspace_overlap(u, v) == pytest.approx(float(cosines.square().mean()), rel=1e-10)
    rotation = oracles.orthonormal(4, 4, seed=3)
    assert eigenspace_overlap(u @ rotation, u) == pytest.approx(1.0, rel=1e-12)
    complement = torch.linalg.svd(u.T, full_matrices=True).Vh[4:8].T
    assert eigenspace_overlap(u, complement) == pytest.approx(0.0, abs=1e-12)


def test_random_subspaces_overlap_by_chance():
    # 400 pairs, error rate 0.3 % (3 standard errors), seeds 0..799.
    values = torch.tensor(
        [
            eigenspace_overlap(
                oracles.orthonormal(10, 3, 2 * i), oracles.orthonormal(10, 3, 2 * i + 1)
            )
            for i in range(400)
        ]
    )
    assert abs(float(values.mean()) - 0.3) < 3 * float(values.std()) / 20


@pytest.mark.parametrize(
    ("u", "v", "message"),
    [
        (torch.eye(4)[:, :2], torch.eye(4)[:, :3], "same number"),
        (2 * torch.eye(4), torch.eye(4), "columns of u"),
        (torch.eye(4), torch.full((4, 4), torch.nan), "columns of v"),
    ],
)
def test_overlap_of_no_bases_raises(u, v, message):
    with pytest.raises(ValueError, match=message):
        eigenspace_overlap(u, v)


def test_bad_calls_raise():
    p = problem("mlp")
    call = lambda **o: top_eigenpairs(p.model, "classification", (p.x, p.y), **o)  # noqa: E731
    for k in (0, -1, True, 2.5):
        with pytest.raises(ValueError, match="k must be"):
            call(k=k)
    with pytest.raises(ValueError, match="solver must be one of"):
        call(solver="power")
    with pytest.raises(ValueError, match="no Gram matrix"):
        call(solver="gram", matrix="hessian")
    with pytest.raises(ValueError, match="fewer than P"):
        call(k=10**6, solver="lanczos")


def test_a_saturated_model_raises():
    p = problem("mlp")
    with torch.no_grad():
        p.model[2].weight.zero_()
        p.model[2].bias.copy_(torch.tensor([0.0, 1e6, 0.0]))
    with pytest.raises(ValueError, match="curvature of the batch vanishes"):
        top_eigenpairs(p.model, "classification", (p.x, p.y), 3)
