"""The features that a network's last layer reads, from the user's own network."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from laplace.utils.feature_extractor import FeatureExtractor, FeatureReduction
from torch import Tensor, nn

from laplace_debiased.network.inputs import invoke, select_rows, to_device
from laplace_debiased.network.modes import evaluation_mode


@dataclass
class SeenCall:
    """What a layer read and wrote in one forward pass.

    Attributes:
        features: its input, in the network's dtype and with its graph; None before the pass.
        dtypes: dtypes of its outputs: casts inside the model show nowhere else.
    """

    features: Tensor | None = None
    dtypes: list[torch.dtype] = field(default_factory=list)


@contextmanager
def watching(layer: nn.Module) -> Iterator[SeenCall]:
    """Note what a layer reads and writes, for as long as the context lasts."""
    seen = SeenCall()

    def note(_module: nn.Module, args: tuple, kwargs: dict, output: Tensor) -> None:
        seen.features = args[0] if args else kwargs["input"]
        seen.dtypes.append(output.dtype)

    handle = layer.register_forward_hook(note, with_kwargs=True)
    try:
        yield seen
    finally:
        handle.remove()


def reduced(features: Tensor, reduction: FeatureReduction | None) -> Tensor:
    """Features [m, ..., D] as [m, D]; without a reduction as they are."""
    if features.ndim <= 2 or reduction is None:
        return features
    positions = features.flatten(1, -2)
    if reduction is FeatureReduction.AVERAGE:
        return positions.mean(1)
    return positions[:, 0 if reduction is FeatureReduction.PICK_FIRST else -1]


class LastLayerNetwork(FeatureExtractor):
    """laplace-torch's feature extractor around the user's own network, without a trace in it.

    Its hook lives for one forward pass; the network is neither copied nor changed.

    Args:
        model: the user's network.
        name: qualified name of its last layer; None while it is not known.
        reduction: how features of more than two dimensions are reduced.

    Raises:
        ValueError: if the named layer is no linear layer.
    """

    def __init__(
        self, model: nn.Module, name: str | None, reduction: FeatureReduction | None = None
    ) -> None:
        super().__init__(
            model, last_layer_name=name, enable_backprop=True, feature_reduction=reduction
        )
        self.training = model.training

    def set_last_layer(self, last_layer_name: str) -> None:
        """Note which layer it is."""
        check_last_layer_name(self.model, last_layer_name)
        self._last_layer_name = last_layer_name
        # Registered under the model already; a second name would make two of its parameters.
        self._modules.pop("last_layer", None)
        found = dict(self.model.named_modules())[last_layer_name]
        object.__setattr__(self, "last_layer", found)

    def forward_with_features(self, x: Any) -> tuple[Tensor, Tensor]:
        """Outputs [m, C] and reduced features [m, D]."""
        if self.last_layer is None:
            raise ValueError("the last layer is not known yet: call fit(train_loader) first.")
        with watching(self.last_layer) as seen:
            outputs = self.model(x)
        assert seen.features is not None
        return outputs, reduced(seen.features, self.feature_reduction)

    def find_last_layer(self, x: Any) -> Tensor:
        """Find the last layer by one forward pass, whose outputs are returned."""
        self.set_last_layer(found_last_layer(self.model, x))
        return self.model(x)


def found_last_layer(model: nn.Module, inputs: Any) -> str:
    """Name of the layer without children that a forward pass calls last.

    Args:
        model: the network.
        inputs: some of its inputs; one sample is used.

    Raises:
        ValueError: if it is not linear, naming what was found; or if the model is one layer.
    """
    device = next(model.parameters()).device
    sample = select_rows(to_device(inputs, device), slice(0, 1))
    called: dict[str, nn.Module] = {}

    def noting(name: str) -> Any:
        def note(module: nn.Module, _inputs: Any, _outputs: Any) -> None:
            if name and next(module.children(), None) is None:
                called.pop(name, None)
                called[name] = module

        return note

    with ExitStack() as stack:
        stack.enter_context(torch.no_grad())
        stack.enter_context(evaluation_mode(model))
        for name, module in model.named_modules():
            stack.callback(module.register_forward_hook(noting(name)).remove)
        invoke(model, sample)
    if not called:
        raise ValueError(
            f"the model is a single {type(model).__name__}, which leaves no features before its "
            "last layer: use subset_of_weights='all'."
        )
    name, last = next(reversed(called.items()))
    if not isinstance(last, nn.Linear):
        raise ValueError(
            f"the layer that the model calls last is {name!r}, a {type(last).__name__}; a "
            "last-layer posterior needs a linear one. Use model with a linear last layer, name "
            "yours with last_layer_name, or take subset_of_weights='all'."
        )
    return name


def check_last_layer_name(model: nn.Module, name: str | None) -> None:
    """Check that a name is that of a linear layer.

    Raises:
        ValueError: naming those that there are.
    """
    if name is None:
        return
    linear = [key for key, module in model.named_modules() if isinstance(module, nn.Linear)]
    if name not in linear:
        shown = ", ".join(map(repr, linear[-5:])) or "none"
        raise ValueError(
            f"last_layer_name={name!r} is no linear layer of the model; its last ones are {shown}."
        )
