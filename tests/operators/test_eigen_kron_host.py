"""`EigenKron` with outer-product tables is laplace-torch's `KronDecomposed`."""

import pytest
import torch
from laplace.utils.matrix import Kron, KronDecomposed

from laplace_debiased.operators import EigenBlock, EigenKron
from tests.operators.oracles import EXPONENTS, assert_close, normal

SHAPES = ((4, 3), (4,), (2, 4), (2,))
N_PARAMS = 12 + 4 + 8 + 2
DELTAS = {
    "scalar": torch.tensor(0.3, dtype=torch.float64),
    "one": torch.tensor([0.3], dtype=torch.float64),
    "per_layer": torch.tensor([0.1, 2.0, 0.5, 7.0], dtype=torch.float64),
}


def factor(size: int, seed: int) -> torch.Tensor:
    root = normal(size, size + 1, seed=seed)
    return root @ root.T


def host_and_ours() -> tuple[KronDecomposed, EigenKron]:
    host = Kron(
        [[factor(d, 10 * i + j) for j, d in enumerate(shape)] for i, shape in enumerate(SHAPES)]
    ).decompose()
    members = []
    for vectors, values in zip(host.eigenvectors, host.eigenvalues, strict=True):
        if len(values) == 1:
            members.append(EigenBlock(vectors[0], None, values[0]))
        else:
            members.append(EigenBlock(*vectors, torch.outer(*values)))
    return host, EigenKron(tuple(members))


@pytest.mark.parametrize("deltas", DELTAS.values(), ids=DELTAS)
@pytest.mark.parametrize("h", [None, 2.5, torch.tensor(0.4), torch.tensor([0.4])])
def test_every_result_is_that_of_the_host(deltas, h):
    host, ours = host_and_ours()
    if h is not None:
        # Both orders: a product after the sum must leave the deltas alone, as the host's does.
        host, ours = (host + deltas) * h, (ours + deltas) * h
    host, ours = host + deltas, ours + deltas
    assert len(host) == len(ours)
    assert_close(ours.deltas, host.deltas)
    assert_close(ours.logdet(), host.logdet())
    for exponent in EXPONENTS:
        assert_close(ours.diag(exponent), host.diag(exponent))
        assert_close(ours.to_matrix(exponent), host.to_matrix(exponent))
        for shape in ((), (5,), (3, 2)):
            W = normal(*shape, N_PARAMS, seed=99)
            assert_close(ours.bmm(W, exponent), host.bmm(W, exponent))
    J = normal(3, 2, N_PARAMS, seed=98)
    assert_close(ours.inv_square_form(J), host.inv_square_form(J))


def test_bmm_solves_by_default_as_the_host_does():
    host, ours = (operator + DELTAS["scalar"] for operator in host_and_ours())
    W = normal(2, 3, N_PARAMS, seed=97)
    assert_close(ours.bmm(W), host.bmm(W))


def test_lists_have_the_host_s_shape():
    host, ours = host_and_ours()
    for host_vectors, vectors in zip(host.eigenvectors, ours.eigenvectors, strict=True):
        assert len(host_vectors) == len(vectors)
        assert all(torch.equal(a, b) for a, b in zip(host_vectors, vectors, strict=True))
    assert torch.equal(ours.eigenvalues[1][0], host.eigenvalues[1][0])


@pytest.mark.parametrize("bad", [1.0, torch.ones(3), torch.ones(4, 1)])
def test_deltas_that_the_host_refuses_are_refused(bad):
    for operator in host_and_ours():
        with pytest.raises(ValueError, match=r"add|delta"):
            operator + bad


@pytest.mark.parametrize("bad", [torch.ones(2), torch.ones(1, 1), 1j])
def test_scalars_that_the_host_refuses_are_refused(bad):
    for operator in host_and_ours():
        with pytest.raises(ValueError, match=r"scalar"):
            operator * bad
