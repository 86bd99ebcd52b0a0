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
    """A network with one more parameter."""

    def __init__(self, net: nn.Module, parameter: nn.Parameter) -> None:
        super().__init__()
        self.net, self.extra = net, parameter

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)


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
