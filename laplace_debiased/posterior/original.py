"""The user's network behind a posterior that works on a copy of it."""

from __future__ import annotations

import copy
import weakref

import torch
from torch import Tensor, nn

from laplace_debiased.errors import ModelChangedError
from laplace_debiased.network.identity import ModelFingerprint, fingerprint, named_tensors
from laplace_debiased.network.locks import model_lock
from laplace_debiased.network.watch import ModelWatch


class Original:
    """A weak reference to a network, and whether it has changed since it was copied.

    A network that nobody else holds any more, or whose weights cannot be read (on the meta
    device), cannot change: the copy is then the model.

    Args:
        model: the network that was copied.
    """

    def __init__(self, model: nn.Module) -> None:
        # A watch holds the tensors of what it watches: it goes when the network goes.
        watches: dict[str, tuple[ModelFingerprint, ModelWatch]] = {}
        self._watches = watches
        self._model = weakref.ref(model, lambda _: watches.clear())

    def copied(self) -> nn.Module:
        """A copy of the network as it is now; to be asked for only if it differs."""
        model = self._model()
        assert model is not None
        # What is copied in inference mode stays without gradients.
        with torch.inference_mode(False), model_lock(model):
            return copy.deepcopy(model)

    def differs_from(self, own: nn.Module) -> bool:
        """Whether its weights, buffers, their names or dtypes are other than the copy's."""
        model = self._model()
        return model is not None and not _are_equal(own, model, cast=False)

    def check(self, own: nn.Module, reference: ModelFingerprint) -> None:
        """Check that it is as it was at a fit; a cast of the same weights is no change.

        Args:
            own: the copy, which is as it was at the fit.
            reference: its fingerprint.

        Raises:
            ModelChangedError: naming what changed.
        """
        model = self._model()
        if model is None:
            return
        of_fit, watch = self._watches.get("watch", (None, None))
        try:
            if watch is None or of_fit is not reference:
                watch = ModelWatch(reference)
            watch.check(model)
        except (ModelChangedError, ValueError):
            if not _are_equal(own, model, cast=True):
                ModelWatch(reference).check(model)  # in the words of the fit
                return
            if not _is_readable(model):
                return
            watch = ModelWatch(fingerprint(model))
            watch.check(model)
        self._watches["watch"] = reference, watch


def _are_equal(own: nn.Module, model: nn.Module, *, cast: bool) -> bool:
    """Whether two networks have equal tensors under equal names; so if one cannot be read.

    Args:
        own: the one.
        model: the other.
        cast: whether the first may be cast to the dtypes of the second.
    """
    with model_lock(own):
        ours = dict(named_tensors(own))
    with model_lock(model):
        if not _is_readable(model):
            return True
        theirs = dict(named_tensors(model))
        return ours.keys() == theirs.keys() and all(
            _equal(ours[name], theirs[name], cast=cast) for name in ours
        )


def _equal(one: Tensor, two: Tensor, *, cast: bool) -> bool:
    if one.shape != two.shape or not (cast or one.dtype == two.dtype):
        return False
    with torch.inference_mode(False), torch.no_grad():
        return torch.equal(one.detach().to(two.device, two.dtype), two.detach())


def _is_readable(model: nn.Module) -> bool:
    return all(
        tensor.layout is torch.strided and not tensor.is_meta for _, tensor in named_tensors(model)
    )
