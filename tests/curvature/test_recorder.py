"""Every way in which a network may read a parameter, against the dense GGN in float64."""

from __future__ import annotations

import threading
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.overrides import TorchFunctionMode

from laplace_debiased.curvature.recorder import record
from laplace_debiased.curvature.rows.parameters import MAX_DENSE_VECTOR
from laplace_debiased.posterior import DebiasedKronLaplace
from tests import oracles
from tests.tolerances import assert_exact
from tests.zoo import Problem

T, D, VOCABULARY = 3, 4, 6


class Net(nn.Module):
    """A function of named parameters between an input and a linear head."""

    def __init__(self, forward: Callable, width: int = D, **shapes: tuple[int, ...]) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        for name, shape in shapes.items():
            value = torch.randn(shape, generator=generator, dtype=torch.float64) / 2
            setattr(self, name, nn.Parameter(value))
        self.run, self.head = forward, nn.Linear(width, 3)

    def forward(self, x: Tensor) -> Tensor:
        out = torch.tanh(self.run(self, x))
        return self.head(out.flatten(1, -2).mean(1) if out.ndim > 2 else out)


def heads(tensor: Tensor) -> Tensor:
    return tensor.unflatten(-1, (2, -1)).transpose(1, 2)


def attention(net: Net, x: Tensor) -> Tensor:
    """Relative positions, as Swin adds them: a table read by index, as a mask of the scores."""
    index = (torch.arange(T)[:, None] - torch.arange(T)[None]).flatten() + T - 1
    bias = net.table[index].view(T, T, -1).permute(2, 0, 1).contiguous().unsqueeze(0)
    q, k, v = (heads(part) for part in functional.linear(x, net.packed).chunk(3, -1))
    out = functional.scaled_dot_product_attention(q, k, v, attn_mask=16 * torch.sigmoid(bias))
    return out.transpose(1, 2).flatten(2)


def windows(net: Net, x: Tensor) -> Tensor:
    """Two windows of every sample in front of everything, as in Swin."""
    parts = torch.stack([x, x.flip(1)], 1).flatten(0, 1)
    parts = functional.linear(parts, net.weight, net.bias) + net.place
    parts = functional.layer_norm(parts, (D,), net.scale, net.shift)
    return parts.view(len(x), 2, T, D).flatten(1, 2)


def windowed_convolution(net: Net, x: Tensor) -> Tensor:
    parts = torch.stack([x, x.flip(1)], 1).flatten(0, 1)
    parts = functional.conv1d(parts, net.weight, net.bias, padding=1)
    parts = functional.group_norm(parts, 1, net.scale, net.shift)
    parts = functional.conv_transpose1d(parts, net.turned, net.shift)
    return parts.view(len(x), 2, *parts.shape[1:])[..., :D].flatten(1, 2)


def shared_mlp(net: Net, x: Tensor) -> Tensor:
    """A network over positions that reads no sample (Swin v2), with an activation in place."""
    grid = torch.linspace(-1, 1, T, dtype=x.dtype).unsqueeze(-1).unsqueeze(0)
    hidden = functional.linear(grid, net.first, net.bias)
    hidden = functional.relu(hidden, inplace=True)
    return x + functional.linear(hidden, net.second)


def class_token(net: Net, x: Tensor) -> Tensor:
    token = net.token.expand(len(x), -1, -1)
    return torch.cat([token, x], 1) + net.places


def repeated_token(net: Net, x: Tensor) -> Tensor:
    return torch.cat([net.token.repeat(len(x), 1, 1), x], 1)


def latent_queries(net: Net, x: Tensor) -> Tensor:
    queries = functional.linear(net.token.expand(len(x), -1, -1), net.weight)
    return torch.softmax(queries @ x.mT, -1) @ x


def grn(net: Net, x: Tensor) -> Tensor:
    norm = x.norm(dim=1, keepdim=True)
    norm = norm / (norm.mean(-1, keepdim=True) + 1e-6)
    return x + torch.addcmul(net.shift.view(1, 1, -1), net.scale.view(1, 1, -1), x * norm)


def rms(net: Net, x: Tensor) -> Tensor:
    return net.scale * (x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-6))


def tied(net: Net, x: Tensor) -> Tensor:
    ids = (x[..., 0].abs() * 3).long().clamp_max(VOCABULARY - 1)
    embedded = functional.embedding(ids, net.table, padding_idx=1) + net.places[:T]
    return torch.tanh(embedded) @ net.table.T


def positions_by_index(net: Net, x: Tensor) -> Tensor:
    ids = torch.arange(T).unsqueeze(0)
    kinds = torch.zeros(len(x), T, dtype=torch.long)
    return x + functional.embedding(ids, net.table) + functional.embedding(kinds, net.kinds)


def bags(net: Net, x: Tensor) -> Tensor:
    ids = (x[..., 0].abs() * 3).long().clamp_max(VOCABULARY - 1)
    mean = functional.embedding_bag(ids, net.table, mode="mean", padding_idx=2)
    return mean + functional.embedding_bag(ids, net.table, mode="sum", per_sample_weights=x[..., 1])


def temperature(net: Net, x: Tensor) -> Tensor:
    return functional.normalize(x, dim=-1) * net.scale.clamp(max=4.0).exp()


def made_bias(net: Net, x: Tensor) -> Tensor:
    bias = torch.cat([net.first, torch.zeros(2, dtype=x.dtype)]).clone()
    bias[1:2].zero_()
    return functional.linear(x, net.weight, bias)


LINEAR = {"weight": (D, D), "bias": (D,)}
NETWORKS: dict[str, Net] = {
    "linear": Net(lambda net, x: functional.linear(x, net.weight, net.bias), **LINEAR),
    "in_place": Net(
        lambda net, x: functional.relu(functional.linear(x, net.weight), inplace=True),
        weight=(D, D),
    ),
    "transposed": Net(lambda net, x: functional.linear(x, net.weight.T), weight=(D, D)),
    "addmm": Net(
        lambda net, x: torch.addmm(net.bias, x.reshape(-1, D), net.weight).view(len(x), T, 5),
        width=5, weight=(D, 5), bias=(5,),
    ),
    "matmul": Net(lambda net, x: x @ net.weight, width=5, weight=(D, 5)),
    "left_matmul": Net(lambda net, x: net.weight @ x, weight=(2, T)),
    "einsum": Net(lambda net, x: torch.einsum("...i,oi->...o", x, net.weight), weight=(D, D)),
    "einsum_heads": Net(
        lambda net, x: torch.einsum("btd,hkd->bthk", x, net.weight).flatten(2),
        width=6, weight=(2, 3, D),
    ),
    "rows_of_a_weight": Net(
        lambda net, x: functional.linear(x, net.weight[1:], net.bias[:D]) + x @ net.weight[0:1].T,
        weight=(D + 1, D), bias=(D + 2,),
    ),
    "columns_of_a_weight": Net(
        lambda net, x: functional.linear(x, net.weight[:, 1:], None), weight=(D, D + 1)
    ),
    "cast": Net(
        lambda net, x: functional.linear(x, net.weight.float().double(), net.bias), **LINEAR
    ),
    "attention": Net(attention, packed=(3 * D, D), table=(2 * T - 1, 2)),
    "windows": Net(windows, **LINEAR, place=(1, T, D), scale=(D,), shift=(D,)),
    "windowed_convolution": Net(
        windowed_convolution, weight=(2, T, 3), bias=(2,), scale=(2,), shift=(2,), turned=(2, 2, 2)
    ),
    "shared_mlp": Net(shared_mlp, first=(5, 1), bias=(5,), second=(D, 5)),
    "class_token": Net(class_token, token=(1, 1, D), places=(1, T + 1, D)),
    "repeated_token": Net(repeated_token, token=(1, 2, D)),
    "latent_queries": Net(latent_queries, token=(1, 2, D), weight=(D, D)),
    "layer_scale": Net(lambda net, x: x * net.scale, scale=(D,)),
    "scalar": Net(temperature, scale=()),
    "in_place_shift": Net(lambda net, x: x.clone().add_(net.shift), shift=(D,)),
    "grn": Net(grn, scale=(D,), shift=(D,)),
    "rms_norm": Net(rms, scale=(D,)),
    "where": Net(lambda net, x: torch.where(x > 0, x, net.shift), shift=(D,)),
    "tied": Net(tied, width=VOCABULARY, table=(VOCABULARY, D), places=(T + 1, D)),
    "positions_by_index": Net(positions_by_index, table=(T, D), kinds=(2, D)),
    "bags": Net(bags, table=(VOCABULARY, D)),
    "row_index": Net(
        lambda net, x: net.table[(x[..., 0].abs() * 2).long().clamp_max(2)], table=(3, D)
    ),
    "made_bias": Net(made_bias, weight=(D, D), first=(2,)),
    "matrix_and_vector": Net(
        lambda net, x: functional.linear(x, net.weight) * net.weight[0], weight=(D, D)
    ),
    "no_rule": Net(lambda net, x: functional.prelu(x, net.slopes), slopes=(T,)),
    "no_rule_and_linear": Net(
        lambda net, x: functional.linear(x, net.weight) + x @ net.weight.inverse(), weight=(D, D)
    ),
}  # fmt: skip


def problem_of(name: str, n: int = 12) -> Problem:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(n, T, D, generator=generator, dtype=torch.float64)
    y = torch.randint(3, (n,), generator=generator)
    return Problem(NETWORKS[name].double().eval(), x, y, "classification")


@pytest.mark.parametrize("name", NETWORKS)
def test_curvature_and_predictions_are_the_dense_ones(name: str, untouched) -> None:
    p = problem_of(name)
    la = DebiasedKronLaplace(p.model, scheme="single", strict=True, prior_precision=0.7)
    with untouched(p.model):
        la.fit(p.loader(), n_data=1)
    assert la.coverage.excluded == {}
    assert_exact(oracles.table(la.H), oracles.directional(la.H, oracles.ggn(p, p.names)))
    precision = oracles.dense_precision(la.H, la.prior_precision, float(la._H_factor))
    jacobian = oracles.jacobian(p.model, p.x[:3], p.names)
    expected = jacobian @ torch.linalg.solve(precision, jacobian.mT)
    assert_exact(la._glm_predictive_distribution(p.x[:3])[1], expected)


@pytest.mark.parametrize("name", NETWORKS)
def test_chunks_change_nothing(name: str) -> None:
    p = problem_of(name)
    found = []
    for byte_budget in (1, 2**28):
        la = DebiasedKronLaplace(p.model, byte_budget=byte_budget)
        la.fit(p.loader(), n_samples=8, seed=1)
        found.append((la.H.to_matrix(), la(p.x)))
    for one, other in zip(*found, strict=True):
        assert_exact(one, other)


def test_as_many_positions_as_samples_are_told_apart() -> None:
    for name in ("positions_by_index", "class_token", "attention", "shared_mlp"):
        p = problem_of(name, n=T)
        la = DebiasedKronLaplace(p.model, scheme="single", strict=True)
        la.fit(p.loader(), n_data=1)
        assert_exact(oracles.table(la.H), oracles.directional(la.H, oracles.ggn(p, p.names)))


def test_large_tables_that_are_added_get_a_diagonal_block() -> None:
    width = MAX_DENSE_VECTOR // T + 1
    net = Net(lambda net, x: x.mean(-1, keepdim=True) + net.places, width, places=(1, T, width))
    net.head.requires_grad_(False)
    p = problem_of("linear")
    p = Problem(net.double(), p.x, p.y, p.likelihood)
    la = DebiasedKronLaplace(net, scheme="single")
    la.fit(p.loader(), n_data=1)
    jac = oracles.jacobian(net, p.x, ["places"])
    middle = oracles.loss_hessians(p.likelihood, net(p.x).detach(), p.y)
    assert_exact(oracles.table(la.H), torch.einsum("mcp,mcd,mdp->p", jac, middle, jac) / len(p.x))


def test_a_large_parameter_without_a_rule_says_which_operation() -> None:
    side = 65
    net = Net(lambda net, x: x @ net.weight.matrix_exp()[:D, :D], weight=(side, side)).double()
    p = problem_of("linear")
    la = DebiasedKronLaplace(net)
    la.fit(p.loader())
    assert "goes through matrix_exp first" in la.coverage.excluded["weight"]


def test_other_modes_inside_and_outside_keep_working() -> None:
    class Counting(TorchFunctionMode):
        n = 0

        def __torch_function__(self, func, types, args=(), kwargs=None):
            Counting.n += 1
            return func(*args, **(kwargs or {}))

    def run(net: Net, x: Tensor) -> Tensor:
        with Counting():
            return functional.linear(x, net.weight, net.bias)

    p = problem_of("linear")
    inside = Net(run, **LINEAR).double()
    inside.load_state_dict(p.model.state_dict())
    with Counting():
        la = DebiasedKronLaplace(inside, scheme="single", strict=True)
        la.fit(p.loader(), n_data=1)
    assert Counting.n > 0
    assert_exact(oracles.table(la.H), oracles.directional(la.H, oracles.ggn(p, p.names)))


def test_a_failing_forward_pass_leaves_no_mode_behind() -> None:
    def fail(net: Net, x: Tensor) -> Tensor:
        functional.linear(x, net.weight)
        raise KeyError("mine")

    depth = torch._C._len_torch_function_stack()
    with pytest.raises(Exception, match="mine"):
        record(Net(fail, **LINEAR).double(), ["weight"], torch.zeros(2, T, D).double())
    assert torch._C._len_torch_function_stack() == depth


def test_other_threads_are_not_recorded() -> None:
    p = problem_of("linear")
    seen = []

    def run(net: Net, x: Tensor) -> Tensor:
        thread = threading.Thread(target=lambda: seen.append(functional.linear(x, net.weight)))
        thread.start()
        thread.join()
        return functional.linear(x, net.weight, net.bias)

    net = Net(run, **LINEAR).double()
    tape = record(net, [name for name, _ in net.named_parameters()], p.x)
    assert len(tape.direct) == 2  # the network's own, and the head's
    assert len(seen) == 1
