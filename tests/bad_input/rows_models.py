"""Networks whose curvature means nothing, or that no forward pass leaves as they were."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from tests.bad_input.rows import Row
from tests.bad_input.world import World, Wrapped

AREA = "Models that cannot be measured"


class Writing(nn.Module):
    """Does something to itself or its input before the network runs."""

    def __init__(self, net: nn.Module, write: Callable[[Any, Tensor], Any]) -> None:
        super().__init__()
        self.net, self.write = net, write
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            self.write(self, x)
        return self.net(x)


class Owner(nn.Module):
    """A network with one more parameter, which may change its outputs."""

    def __init__(
        self,
        net: nn.Module,
        parameter: nn.Parameter,
        use: Callable[[Tensor, Tensor], Tensor] = lambda z, p: z,
    ) -> None:
        super().__init__()
        self.net, self.extra, self.use = net, parameter, use

    def forward(self, x: Tensor) -> Tensor:
        return self.use(self.net(x), self.extra)


class Times(torch.autograd.Function):
    """A product in a function of its own, which torch functions do not see inside."""

    @staticmethod
    def forward(ctx: Any, z: Tensor, scale: Tensor) -> Tensor:
        ctx.save_for_backward(z, scale)
        return z * scale

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor]:
        (gradient,), (z, scale) = gradients, ctx.saved_tensors
        return gradient * scale, (gradient * z).sum(0)


class Mapped(nn.Module):
    """Calls a network sample by sample."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def forward(self, x: Tensor) -> Tensor:
        return torch.vmap(self.net)(x)


def model(
    input: str,
    make: Callable[[World], nn.Module],
    error: str,
    *names: str,
    likelihood: str = "classification",
    data: Callable[[World], Any] = lambda w: w.loader(),
    **options: Any,
) -> Row:
    """A row of a network that is fitted."""
    return Row(
        AREA,
        input,
        lambda w: w.posterior(make(w), **options).fit(data(w)),
        error,
        names,
        likelihood,
    )


def writing(what: str, write: Callable[[Any, Tensor], Any], error: str, *names: str) -> Row:
    """A row of a network that writes in its forward pass."""
    return model(
        f"a model that writes to {what} in its forward pass",
        lambda w: Writing(w.linear(), write),
        error,
        *names,
    )


def _sharp(z: Tensor) -> Tensor:
    return torch.sigmoid(9 * z)


ROWS = [
    writing(
        "its weights",
        lambda m, x: m.net[0].weight.mul_(1.01),
        "ValueError",
        "writes to its own 'net.0.weight'",
        "self.training",
    ),
    writing(
        "its weights through `.data`",
        lambda m, x: m.net[0].weight.data.mul_(1.01),
        "ValueError",
        "writes to its own 'net.0.weight'",
        "self.training",
    ),
    writing(
        "its buffers", lambda m, x: m.calls.add_(1), "ValueError", "'calls'", "persistent=False"
    ),
    writing(
        "a buffer by another tensor",
        lambda m, x: setattr(m, "calls", m.calls + 1),
        "ValueError",
        "'calls'",
        "persistent=False",
    ),
    writing("its inputs", lambda m, x: x.mul_(0.5), "ModelCallError", "writes to its inputs"),
    model(
        "a `BatchNorm` without running statistics",
        lambda w: w.linear(nn.BatchNorm1d(4, track_running_stats=False)),
        "ValueError",
        "layer '0'",
        "BatchNorm1d",
        "running statistics",
    ),
    model(
        "a lazy layer that has seen no data",
        lambda w: nn.Sequential(nn.LazyLinear(3)),
        "ValueError",
        "'0.weight'",
        "no shape yet",
        "Pass a batch",
    ),
    model(
        "parameters in single and in double precision",
        lambda w: Owner(w.linear(), nn.Parameter(torch.ones(3, dtype=torch.float64))),
        "ValueError",
        "'extra' is torch.float64",
        "several dtypes",
        ".double()",
    ),
    model(
        "outputs without a graph",
        lambda w: Wrapped(w.linear(), lambda z: z.detach()),
        "CoverageError",
        "no operation on it affects the outputs",
    ),
    model(
        "a last layer within `torch.vmap`",
        lambda w: Mapped(w.linear(nn.Tanh())),
        "ValueError",
        "last layer",
        "torch.vmap",
        "subset_of_weights='all'",
        subset_of_weights="last_layer",
    ),
    model(
        "a parameter that a `torch.autograd.Function` reads, low rank",
        lambda w: Owner(w.linear(), nn.Parameter(torch.ones(3)), lambda z, p: Times.apply(z, p)),
        "ModelCallError",
        "'extra'",
        "torch.autograd.Function",
        "requires_grad_(False)",
        hessian_structure="lowrank",
    ),
    model(
        "a layer of no outputs",
        lambda w: Owner(w.linear(), nn.Parameter(torch.zeros(0, 4))),
        "ValueError",
        "'extra'",
        "no entries",
    ),
    model(
        "a complex parameter",
        lambda w: Owner(w.linear(), nn.Parameter(torch.zeros(3, dtype=torch.complex64))),
        "ValueError",
        "'extra'",
        "complex",
        "view_as_real",
    ),
    model(
        "a quantised model",
        lambda w: torch.ao.quantization.quantize_dynamic(w.linear(), {nn.Linear}),
        "CoverageError",
        "parameter",
    ),
    model(
        "a quantised model, last layer",
        lambda w: torch.ao.quantization.quantize_dynamic(w.linear(), {nn.Linear}),
        "CoverageError",
        "parameter",
        "quantised",
        subset_of_weights="last_layer",
    ),
    *(
        model(
            f"a model that returns a mapping without `logits`, {shown}",
            lambda w: Wrapped(w.model, lambda z: {"out": z}),
            "TypeError",
            "must return a tensor",
            "['out']",
            **options,
        )
        for shown, options in (
            ("all weights", {}),
            ("last layer", {"subset_of_weights": "last_layer"}),
            ("low rank", {"hessian_structure": "lowrank"}),
        )
    ),
    model(
        "a model that adds the first sample of a batch to all, low rank",
        lambda w: Wrapped(w.linear(), lambda z: z + z[:1]),
        "ValueError",
        "mixes the samples",
        hessian_structure="lowrank",
    ),
    model(
        'a model that ends in a sigmoid, `likelihood="bernoulli"`, batches of 2',
        lambda w: Wrapped(w.model, _sharp),
        "ValueError",
        "probabilities",
        "logits",
        likelihood="bernoulli",
        data=lambda w: w.loader(y=(w.model(w.x) > 0).float(), batch_size=2),
    ),
    model(
        'a model that ends in a sigmoid, `likelihood="bernoulli"`',
        lambda w: Wrapped(w.model, _sharp),
        "ValueError",
        "probabilities",
        "logits",
        "allow_probabilities",
        likelihood="bernoulli",
        data=lambda w: w.loader(y=(w.model(w.x) > 0).float(), batch_size=12),
    ),
    model(
        "a model that returns one logit per sample without its dimension",
        lambda w: Wrapped(w.linear(), lambda z: z[:, 0]),
        "ValueError",
        "unsqueeze(-1)",
        likelihood="bernoulli",
    ),
]
