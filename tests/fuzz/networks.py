"""A seeded generator of small random networks, with what it expects to be left out of them."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.nn import functional

VOCABULARY, LENGTH, WIDTH = 7, 4, 4


class TransposedLinear(nn.Module):
    """A linear layer that stores [D_in, D_out], under the name that the registry looks for."""

    def __init__(self, outputs: int, inputs: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(inputs, outputs))
        self.bias = nn.Parameter(torch.empty(outputs))

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.weight + self.bias


TransposedLinear.__module__ = "transformers.pytorch_utils"
TransposedLinear.__qualname__ = "Conv1D"


class Attention(nn.Module):
    """``nn.MultiheadAttention`` on [m, L, E], to itself or or to another sequence."""

    def __init__(self, heads: int, bias: bool, batch_first: bool, keys: int | None) -> None:
        super().__init__()
        self.keys = keys
        self.inner = nn.MultiheadAttention(WIDTH, heads, bias=bias, batch_first=batch_first)
        mask = torch.ones(LENGTH, LENGTH).triu(1).bool() if keys is None else None
        self.register_buffer("mask", mask if heads == 2 else None)

    def forward(self, x: Tensor) -> Tensor:
        other = x if self.keys is None else torch.cat([x, x.cos()], 1)[:, : self.keys]
        values = other if self.keys is None else other.sin()
        if not self.inner.batch_first:
            x, other, values = (t.transpose(0, 1) for t in (x, other, values))
        mask = self.mask if self.mask is not None and len(self.mask) == LENGTH else None
        out = self.inner(x, other, values, attn_mask=mask, need_weights=False)[0]
        return out if self.inner.batch_first else out.transpose(0, 1)


class Tokens(nn.Module):
    """Token and, if asked for, position embeddings, the latter read once for the whole batch."""

    def __init__(self, padding: int | None, positions: str) -> None:
        super().__init__()
        self.words = nn.Embedding(VOCABULARY, WIDTH, padding_idx=padding)
        self.places = nn.Embedding(LENGTH + 1, WIDTH) if positions else None
        self.positions = positions

    def forward(self, x: Tensor) -> Tensor:
        out = self.words(x.long())
        if self.places is None:
            return out
        index = torch.arange(LENGTH).unsqueeze(0)
        places = self.places(index)
        if self.positions == "repeated":
            places = places.repeat(len(x), 1, 1)
        return out + places


class Offset(nn.Module):
    """A parameter that belongs to no layer."""

    def __init__(self, shape: tuple[int, ...]) -> None:
        super().__init__()
        self.offset = nn.Parameter(torch.empty(shape))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.offset


class Elementwise(nn.Module):
    """Scales and shifts per channel, as layer scales do, in one of the ways to write them."""

    def __init__(self, width: int, spatial: int, way: str) -> None:
        super().__init__()
        self.scale, self.shift = (nn.Parameter(torch.empty(width)) for _ in range(2))
        self.view, self.way = (-1, *(1,) * spatial), way

    def forward(self, x: Tensor) -> Tensor:
        scale, shift = self.scale.view(self.view), self.shift.view(self.view)
        if self.way == "in place":
            return x.clone().mul_(scale).add_(shift)
        if self.way == "where":
            return torch.where(x > 0, x * scale, shift)
        return torch.addcmul(shift.sigmoid(), x, scale)


class Functional(nn.Module):
    """A linear map of a parameter that belongs to no layer, in one of the ways to write it."""

    def __init__(self, width: int, way: str) -> None:
        super().__init__()
        self.matrix, self.way = nn.Parameter(torch.empty(width, width)), way

    def forward(self, x: Tensor) -> Tensor:
        if self.way == "einsum":
            return torch.einsum("...i,oi->...o", x, self.matrix)
        if self.way == "parts":
            top, bottom = self.matrix.split([1, len(self.matrix) - 1])
            return torch.cat([x @ top.T, functional.linear(x, bottom)], -1)
        if self.way == "twice":
            return x @ self.matrix + functional.linear(x, self.matrix)
        return x @ self.matrix


class Token(nn.Module):
    """A token in front of a sequence, and what reads it."""

    def __init__(self, repeats: bool) -> None:
        super().__init__()
        self.token, self.repeats = nn.Parameter(torch.empty(1, 1, WIDTH)), repeats

    def forward(self, x: Tensor) -> Tensor:
        token = self.token.repeat(len(x), 1, 1) if self.repeats else self.token
        return torch.cat([token.expand(len(x), -1, -1), x[:, 1:]], 1)


WAYS = ["in place", "where", "addcmul"]
MAPS = ["einsum", "parts", "twice", "matmul"]


@dataclass(frozen=True)
class Stage:
    """One step: a module, called once or twice, with or without a residual."""

    module: nn.Module
    calls: int = 1
    residual: bool = False


class Network(nn.Module):
    """Stages one after the other, then the mean over positions and a linear head."""

    def __init__(self, stages: list[Stage], head: nn.Linear, n_spatial: int, last: bool) -> None:
        super().__init__()
        self.stages = nn.ModuleList(stage.module for stage in stages)
        self.plan = [(stage.calls, stage.residual) for stage in stages]
        self.head, self.n_spatial, self.last = head, n_spatial, last

    def forward(self, x: Tensor) -> Tensor:
        for module, (calls, residual) in zip(self.stages, self.plan, strict=True):
            for _ in range(calls):
                out = module(x)
                x = x + out if residual and out.shape == x.shape else out
        if self.n_spatial:
            axes = tuple(range(1, x.ndim - 1)) if self.last else tuple(range(2, x.ndim))
            x = x.mean(axes)
        return self.head(x)


@dataclass
class Case:
    """A random network with its data.

    Attributes:
        seed: what it was made from.
        model: the network, in float64.
        x: inputs.
        y: targets.
        likelihood: "classification" or "regression".
        gaps: names of parameters that no posterior can cover.
    """

    seed: int
    model: nn.Module
    x: Tensor
    y: Tensor
    likelihood: str
    gaps: set[str] = field(default_factory=set)


Draw = random.Random


def _norm(draw: Draw, width: int, spatial: int, last: bool) -> nn.Module:
    if last:
        return draw.choice(
            [nn.LayerNorm(width), nn.LayerNorm(width, bias=False), nn.RMSNorm(width)]
        )
    if spatial == 0:
        return draw.choice([nn.BatchNorm1d(width), nn.LayerNorm(width), nn.RMSNorm(width)])
    batch = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)[spatial - 1](width)
    instance = (nn.InstanceNorm1d, nn.InstanceNorm2d, nn.InstanceNorm3d)[spatial - 1]
    tracked = instance(width, affine=True, track_running_stats=True)
    groups = nn.GroupNorm(draw.choice([d for d in (1, 2) if width % d == 0]), width)
    return draw.choice([batch, instance(width, affine=True), tracked, groups])


def _convolution(draw: Draw, width: int, spatial: int, size: int) -> nn.Module:
    groups = draw.choice([g for g in (1, 1, 2, width) if width % g == 0])
    outs = groups * draw.choice([1, 2]) if groups > 1 else draw.choice([2, 3])
    bias = draw.random() < 0.7
    if draw.random() < 0.3 and size <= 4:
        kind = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)[spatial - 1]
        stride, dilation = draw.choice([(1, 1), (2, 1), (2, 2), (1, 2)])
        extra = draw.randrange(max(stride, dilation))
        return kind(
            width, outs, draw.choice([1, 2, 3]), stride, padding=draw.choice([0, 1]),
            output_padding=extra, groups=groups, bias=bias, dilation=dilation,
        )  # fmt: skip
    kind = (nn.Conv1d, nn.Conv2d, nn.Conv3d)[spatial - 1]
    kernel = draw.choice([1, 2, 3])
    stride = draw.choice([1, 1, 2])
    dilation = draw.choice([1, 1, 2])
    padding: int | str = draw.choice([0, 1])
    if stride == 1 and draw.random() < 0.3:
        padding = "same"
    mode = draw.choice(["zeros", "zeros", "reflect", "replicate", "circular"])
    return kind(width, outs, kernel, stride, padding, dilation, groups, bias, padding_mode=mode)


def _token_stage(draw: Draw) -> Stage:
    linear = draw.choice([lambda: nn.Linear(WIDTH, WIDTH), lambda: TransposedLinear(WIDTH, WIDTH)])
    attention = Attention(
        draw.choice([1, 2]), draw.random() < 0.7, draw.random() < 0.5, draw.choice([None, 3, 6])
    )
    module = draw.choice(
        [
            linear(),
            nn.LayerNorm(WIDTH),
            attention,
            Offset((1, LENGTH, WIDTH)),
            Elementwise(WIDTH, 0, draw.choice(WAYS)),
            Functional(WIDTH, draw.choice(MAPS)),
            Token(draw.random() < 0.5),
        ]
    )
    return Stage(module, draw.choice([1, 1, 2]), draw.random() < 0.6)


def _stages(draw: Draw, kind: str, shape: tuple[int, ...]) -> list[Stage]:
    """Stages until the budget of layers is used up; shapes are followed by running them."""
    stages: list[Stage] = []
    spatial, last = len(shape) - 1, kind in ("tokens", "positions")
    if kind == "tokens":
        stages.append(Stage(Tokens(draw.choice([None, 0]), draw.choice(["", "read", "repeated"]))))
    x = torch.rand(2, *shape).mul(5).floor() if kind == "tokens" else torch.randn(2, *shape)
    for _ in range(draw.choice([1, 2, 3])):
        with torch.no_grad():
            probe = Network(stages, nn.Linear(1, 1), 0, last).eval()
            probe.head = nn.Identity()
            now = probe(x).shape[1:]
        if last:
            stages.append(_token_stage(draw))
        elif draw.random() < 0.15:
            stages.append(Stage(Elementwise(now[0], spatial, draw.choice(WAYS))))
        elif draw.random() < 0.4:
            stages.append(Stage(_norm(draw, now[0], spatial, last), residual=draw.random() < 0.3))
        elif spatial == 0:
            outs = draw.choice([now[0], 3, 5])
            calls = 2 if outs == now[0] and draw.random() < 0.4 else 1
            module = nn.Linear(now[0], outs, bias=draw.random() < 0.7)
            if outs == now[0] and draw.random() < 0.3:
                module = Functional(outs, draw.choice(MAPS))
            stages.append(Stage(module, calls, draw.random() < 0.3))
        else:
            stages.append(Stage(_convolution(draw, now[0], spatial, now[-1]), residual=True))
        stages.append(Stage(draw.choice([nn.Tanh(), nn.Sigmoid(), nn.GELU(), nn.SiLU()])))
    return stages


SHAPES: dict[str, tuple[int, ...]] = {
    "vector": (4,),
    "line": (2, 5),
    "image": (2, 4, 4),
    "volume": (2, 3, 3, 3),
    "positions": (LENGTH, WIDTH),
    "tokens": (LENGTH,),
}


def _randomise(model: nn.Module, generator: torch.Generator) -> None:
    """Random weights and running statistics; norms stay near one."""
    for parameter in model.parameters():
        values = 0.5 * torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
        parameter.data = values + (1.0 if parameter.ndim == 1 else 0.0)
    for name, buffer in model.named_buffers():
        if "running" in name:
            buffer.copy_(torch.rand(buffer.shape, generator=generator) + 0.5)


def _tie(draw: Draw, model: Network) -> None:
    """Share one weight between two linear layers, or one and its transpose, sometimes."""
    linear = [m for m in model.stages if isinstance(m, nn.Linear | TransposedLinear)]
    alike = [m for m in linear if m.weight.shape == linear[0].weight.shape]
    if len(alike) > 1 and draw.random() < 0.5:
        alike[1].weight = alike[0].weight


def _freeze(draw: Draw, model: nn.Module) -> None:
    for parameter in model.parameters():
        if draw.random() < 0.15:
            parameter.requires_grad_(False)


def make_case(seed: int, n: int = 8) -> Case:
    """A network that depends on its seed only."""
    draw = random.Random(seed)
    kind = draw.choice(list(SHAPES))
    shape = SHAPES[kind]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        for _ in range(50):  # a drawn convolution may not fit its input
            try:
                stages = _stages(draw, kind, shape)
                model = _finished(draw, kind, stages, shape)
                break
            except (RuntimeError, ValueError):
                continue
        generator = torch.Generator().manual_seed(seed)
        x = torch.randn(n, *shape, generator=generator, dtype=torch.float64)
        if kind == "tokens":
            x = torch.randint(VOCABULARY, (n, *shape), generator=generator)
        n_outputs = model.head.out_features
        likelihood = draw.choice(["classification", "regression"])
        y = torch.randn(n, n_outputs, generator=generator, dtype=torch.float64)
        if likelihood == "classification":
            y = torch.randint(n_outputs, (n,), generator=generator)
        model = model.double()
        _tie(draw, model)
        _randomise(model, generator)
    _freeze(draw, model)
    if not any(p.requires_grad for p in model.parameters()):
        model.head.weight.requires_grad_(True)
    return Case(seed, model, x, y, likelihood)


def _finished(draw: Draw, kind: str, stages: list[Stage], shape: tuple[int, ...]) -> Network:
    last = kind in ("tokens", "positions")
    x = torch.zeros(2, *shape)
    body: Callable[[Tensor], Tensor] = Network(stages, nn.Linear(1, 1), 0, last).eval()
    body.head = nn.Identity()  # type: ignore[attr-defined]
    with torch.no_grad():
        found = body(x)
    width = found.shape[-1] if last else found.shape[1]
    if found.numel() > 400:
        raise ValueError("too large")
    head = nn.Linear(width, draw.choice([2, 3]), bias=draw.random() < 0.7)
    model = Network(stages, head, found.ndim - 2, last).eval()
    model(x[:1])  # torch's group norm refuses one sample of one position
    if not torch.isfinite(functional.softmax(model(x), -1)).all():
        raise ValueError("not finite")
    return model
