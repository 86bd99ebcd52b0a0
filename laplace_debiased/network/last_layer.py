"""The features that a network's last layer reads, from the user's own network."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from laplace.utils.feature_extractor import FeatureExtractor, FeatureReduction
from torch import Tensor, nn
from torch.nn import functional

from laplace_debiased.network.function_modes import BlockMode
from laplace_debiased.network.inputs import invoke, select_rows, tensors_of, to_device
from laplace_debiased.network.interrupts import unbroken
from laplace_debiased.network.modes import evaluation_mode

_PRODUCTS = frozenset(
    {
        functional.linear,
        torch.matmul,
        torch.mm,
        torch.addmm,
        torch.einsum,
        Tensor.matmul,
        Tensor.__matmul__,
        Tensor.mm,
        Tensor.addmm,
    }
)
"""The functions by which a model may apply its last layer."""


class SeenCall(BlockMode):
    """Notes what a layer reads and writes, from the torch functions that are given its weight.

    Attributes:
        features: its input, in the network's dtype and with its graph; None before the pass.
        dtypes: dtypes of its outputs: casts inside the model show nowhere else.
    """

    def __init__(self, weight: Tensor, width: int) -> None:
        super().__init__()
        self._weight, self._width = weight, width
        self.features: Tensor | None = None
        self.dtypes: list[torch.dtype] = []

    def run(self, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Run it, and note what it reads."""
        output = func(*args, **kwargs)
        if func in _PRODUCTS and isinstance(output, Tensor):
            given = list(tensors_of((*args, *kwargs.values())))
            read = [t for t in given if t.ndim and t.shape[-1] == self._width]
            features = [t for t in read if not is_of(t, self._weight)]
            if features and any(is_of(t, self._weight) for t in given):
                self.features = features[0]
                self.dtypes.append(output.dtype)
        return output


def is_of(tensor: Tensor, parameter: Tensor) -> bool:
    """Whether a tensor is the parameter, or a view or stand-in of the same memory."""
    if tensor is parameter:
        return True
    if torch._C._functorch.is_functorch_wrapped_tensor(tensor) or tensor.is_meta:
        return False
    return tensor.untyped_storage().data_ptr() == parameter.untyped_storage().data_ptr()


@unbroken
def watching(layer: nn.Linear) -> Iterator[SeenCall]:
    """Note what a layer reads and writes in the block, without a hook in it."""
    with SeenCall(layer.weight, layer.in_features) as seen:
        yield seen


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

    It listens to the torch functions of a forward pass; the network is neither copied nor changed.
    The last layer's ``name`` is None while it is not known; ValueError if it is no linear layer.
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


class _LastRead(BlockMode):
    """Notes which of some parameters a torch function has computed with last."""

    def __init__(self, parameters: Iterable[Tensor]) -> None:
        super().__init__()
        self._parameters = {id(parameter): parameter for parameter in parameters}
        self.last: Tensor | None = None

    def run(self, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Run it, and note what it reads."""
        given = list(tensors_of((*args, *kwargs.values())))
        own = [t._base if t._is_view() else t for t in given]
        read = [t for t in own if id(t) in self._parameters]
        if len(read) < len(own):  # one alone is looked at, transposed or cast
            self.last = next(iter(read), self.last)
        return func(*args, **kwargs)


@unbroken
def _noting(model: nn.Module) -> Iterator[_LastRead]:
    with torch.no_grad(), evaluation_mode(model), _LastRead(model.parameters()) as noted:
        yield noted


def found_last_layer(model: nn.Module, inputs: Any) -> str:
    """Name of the layer whose parameter a forward pass of one of the samples reads last.

    Raises:
        ValueError: if it is not linear, naming what was found; or if the model is one layer.
    """
    device = next(model.parameters()).device
    sample = select_rows(to_device(inputs, device), slice(0, 1))
    with _noting(model) as noted:
        invoke(model, sample)
    owners = {
        name: module
        for name, module in model.named_modules()
        if any(entry is noted.last for entry in module._parameters.values())
    }
    if noted.last is None or not list(model.children()):
        raise ValueError(
            f"the model is a single {type(model).__name__}, which leaves no features before its "
            "last layer: use subset_of_weights='all'."
        )
    for name, module in owners.items():
        if isinstance(module, nn.Linear):
            return name
    name, last = next(iter(owners.items()))
    found = f"layer {name!r}, a {type(last).__name__}" if name else "a parameter of its own"
    raise ValueError(
        f"the last that the model computes with is {found}; a "
        "last-layer posterior needs a linear one. Use model with a linear last layer, name "
        "yours with last_layer_name, or take subset_of_weights='all'."
    )


def check_last_layer_name(model: nn.Module, name: str | None) -> None:
    """Check that a name is that of a linear layer; a ValueError names those that there are."""
    if name is None:
        return
    linear = [key for key, module in model.named_modules() if isinstance(module, nn.Linear)]
    if name not in linear:
        shown = ", ".join(map(repr, linear[-5:])) or "none"
        raise ValueError(
            f"last_layer_name={name!r} is no linear layer of the model; its last ones are {shown}."
        )
