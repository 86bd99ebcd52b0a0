"""laplace-torch on the same network, in a process of its own."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from laplace import Laplace

from benchmarks.thousand_classes.measure import loader
from benchmarks.thousand_classes.networks import efficientnet, images


class Reference:
    """EfficientNet-Lite0 under laplace-torch.

    Args:
        path: archive of images, or None.
        subset: "all" or "last_layer".
        n: images.
        size: their side.
    """

    def __init__(self, path: str | None, subset: str, n: int, size: int) -> None:
        self._data = images(Path(path) if path else None, n, size)
        self._la = Laplace(efficientnet(), "classification", subset, "kron")

    def fit(self) -> dict[str, Any]:
        """On all images at hand."""
        self._la.fit(loader(self._data))
        return {}

    def predict(self, n: int) -> dict[str, Any]:
        """Probabilities of a few, by the probit link."""
        x = torch.stack([self._data[index][0] for index in range(n)])
        return {"shape": list(self._la(x, link_approx="probit").shape)}


def reference(**arguments: Any) -> Reference:
    """Factory of the worker."""
    return Reference(**arguments)
