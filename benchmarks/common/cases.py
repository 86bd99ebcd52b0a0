"""The cases that are measured: a network, the samples it is fitted on, and inputs to predict."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from benchmarks.common.models import (
    CifarResNet20,
    freeze_batch_norm,
    load_images,
    mlp,
    small_cnn,
    wide_head,
)

CIFAR_TRAIN_SIZE = 50_000
_LOGIT_DEVIATION = 3.0
_LABEL_TEMPERATURE = 2.0


@dataclass(frozen=True, eq=False)
class Case:
    """One case, the same in every process that builds it with the same arguments.

    Attributes:
        model: in evaluation mode, BatchNorm frozen.
        fit_data: inputs [m, ...] and labels [m] whose curvature is computed.
        validation: inputs [v, ...] and labels [v].
        n_data: N, to which posteriors are scaled.
        last_layer: name of the last layer where it alone carries the posterior, else None.
    """

    model: nn.Module
    fit_data: tuple[Tensor, Tensor]
    validation: tuple[Tensor, Tensor]
    n_data: int
    last_layer: str | None

    def fit_loader(self, batch: int) -> DataLoader:
        """The samples to fit on, in order."""
        return DataLoader(TensorDataset(*self.fit_data), batch_size=batch)

    def validation_loader(self, batch: int, images: int | None = None) -> DataLoader:
        """The first ``images`` validation samples, in order."""
        return DataLoader(TensorDataset(*(v[:images] for v in self.validation)), batch_size=batch)


def build_case(
    name: str,
    n_fit: int,
    n_validation: int,
    images: str | None = None,
    weights: str | None = None,
    seed: int = 0,
) -> Case:
    """Build a case by name.

    Args:
        name: "mlp", "cnn", "resnet20", or "last<C>" for a last layer of 512 features and C outputs.
        n_fit: samples to fit on, m.
        n_validation: validation samples.
        images: ImageFolder (or zip) for resnet20 and cnn; standard normal images without.
        weights: state dict for resnet20; random weights without.
        seed: of weights and inputs.

    Random networks get logits of mean 0 and standard deviation 3, and labels from their own softmax
    at temperature 2: overconfident, as trained networks are, so that the best prior is finite.

    Raises:
        ValueError: for an unknown name, or more samples than there are images.
    """
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model, shape = _network(name)
        if weights is not None and name == "resnet20":
            model.load_state_dict(torch.load(Path(weights), weights_only=True))
        freeze_batch_norm(model.eval())
        if images is not None and len(shape) == 3:
            data = [
                _subset(Path(images), *part) for part in (("train", n_fit), ("test", n_validation))
            ]
            n_data = len(load_images(Path(images), "train")[0])
        else:
            inputs = torch.randn(n_fit + n_validation, *shape)
            if weights is None or name != "resnet20":
                _scale_logits(model, inputs[:256])
            labels = _own_labels(model, inputs)
            sizes = [n_fit, n_validation]
            data = list(zip(inputs.split(sizes), labels.split(sizes), strict=True))
            n_data = CIFAR_TRAIN_SIZE
    return Case(model, data[0], data[1], n_data, "head" if name.startswith("last") else None)


def _network(name: str) -> tuple[nn.Module, tuple[int, ...]]:
    """The network and the shape of one input."""
    match name:
        case "mlp":
            return mlp(), (64,)
        case "cnn":
            return small_cnn(), (3, 32, 32)
        case "resnet20":
            return CifarResNet20(), (3, 32, 32)
        case _ if name.startswith("last") and name[4:].isdecimal():
            return wide_head(int(name[4:])), (32,)
    raise ValueError(f"unknown case {name!r}; use mlp, cnn, resnet20 or last<C>.")


def _subset(path: Path, split: str, size: int) -> tuple[Tensor, Tensor]:
    """Random images of a split; files are sorted by class."""
    images, labels = load_images(path, split)
    if size > len(images):
        raise ValueError(f"{size} {split} images were asked for; {path} holds {len(images)}.")
    chosen = torch.randperm(len(images))[:size]
    return images[chosen], labels[chosen]


def _scale_logits(model: nn.Module, inputs: Tensor) -> None:
    """Logits of mean zero over inputs, for every class, and the same overall deviation."""
    *_, last = (module for module in model.modules() if isinstance(module, nn.Linear))
    with torch.no_grad():
        logits = model(inputs)
        means = logits.mean(0)
        scale = _LOGIT_DEVIATION / float((logits - means).std())
        last.weight.mul_(scale)
        last.bias.sub_(means).mul_(scale)


def _own_labels(model: nn.Module, inputs: Tensor) -> Tensor:
    with torch.no_grad():
        logits = torch.cat([model(part) for part in inputs.split(256)])
    return torch.multinomial((logits / _LABEL_TEMPERATURE).softmax(-1), 1).squeeze(-1)


@dataclass(frozen=True)
class LayerShape:
    """A linear map at T positions, from D_in to D_out entries each."""

    positions: int
    outputs: int
    inputs: int

    @property
    def size(self) -> int:
        """Multiplications of one application."""
        return self.positions * self.outputs * self.inputs


def layer_shapes(model: nn.Module, inputs: Tensor) -> list[LayerShape]:
    """Shapes of all convolutions and linear layers on one input [1, ...]."""
    shapes: list[LayerShape] = []

    def note(module: nn.Module, _: object, output: Tensor) -> None:
        weight = module.get_parameter("weight")
        positions = output.numel() // weight.shape[0]
        shapes.append(LayerShape(positions, weight.shape[0], math.prod(weight.shape[1:])))

    handles = [
        module.register_forward_hook(note)
        for module in model.modules()
        if isinstance(module, nn.Conv2d | nn.Linear)
    ]
    try:
        with torch.no_grad():
            model(inputs)
    finally:
        for handle in handles:
            handle.remove()
    return shapes


def predictive_flop(case: Case) -> float:
    """Floating-point operations of one sample's predictive variances (2 per multiplication).

    All weights: a forward pass, C backward passes, and per layer the C Jacobian rows in the
    eigenbasis, each side rotated where it is cheaper, before or after the sum over positions.
    Last layer: a forward pass, φᵀU_A, Σ_j (·)²/τ_ij, and its rotation by U_B².
    """
    example = case.validation[0][:1]
    shapes = layer_shapes(case.model, example)
    classes = shapes[-1].outputs
    forward = sum(shape.size for shape in shapes)
    if case.last_layer is not None:
        last = shapes[-1]
        return 2.0 * (forward + last.inputs**2 + last.size + classes**2)
    rows = 0
    for shape in shapes:
        t, outs, ins = shape.positions, shape.outputs, shape.inputs
        if t == 1:
            rows += classes * outs**2 + ins**2 + outs * ins + classes * outs
            continue
        right = min(t * ins**2, classes * outs * ins**2)
        left = classes * min(t * outs**2, outs**2 * ins)
        rows += right + left + classes * shape.size + classes * outs * ins
    return 2.0 * (forward + classes * forward + rows)
