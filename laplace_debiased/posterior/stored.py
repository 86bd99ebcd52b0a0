"""What a posterior does with files and copies of itself, and with a model that changes."""

from __future__ import annotations

from abc import abstractmethod
from typing import TYPE_CHECKING, Any, Self

import torch
from torch import nn

from laplace_debiased.errors import ModelChangedError, StoredFileError
from laplace_debiased.files import PathLike
from laplace_debiased.network.identity import fingerprint
from laplace_debiased.network.locks import model_lock
from laplace_debiased.network.watch import ModelWatch
from laplace_debiased.posterior import saving

if TYPE_CHECKING:
    from laplace.baselaplace import ParametricLaplace as _Host
else:
    _Host = object  # the concrete posterior brings laplace-torch's class


class StoredPosterior(_Host):
    """Mixin over a laplace-torch posterior: files, copies, and the identity of its model."""

    _watch: ModelWatch | None = None

    @property
    def _covered_model(self) -> nn.Module:
        """The module whose parameter names the coverage speaks of."""
        return self.model

    def _watch_over(self, *, adding: bool) -> ModelWatch:
        """A watch over the model as it is at a fit.

        Args:
            adding: whether the fit is added to an earlier one, at the same weights.

        Raises:
            ModelChangedError: if it is added at other weights.
        """
        watch = ModelWatch(fingerprint(self._covered_model))
        if adding and self._watch is not None and self._watch.reference != watch.reference:
            raise ModelChangedError(
                "override=False adds to a fit at the same weights, but the model has changed "
                "since. Fit anew with override=True."
            )
        return watch

    def _check_model(self) -> None:
        """Check that the model is as it was at the fit.

        Raises:
            ModelChangedError: naming what changed.
        """
        if self._watch is None:
            return
        with model_lock(self._covered_model):
            if self._watch.check(self._covered_model):
                # A layer may have been replaced by its equal: who refers to the old one sees none.
                self._renew()

    @abstractmethod
    def _renew(self) -> None:
        """Refer to the modules and parameters that the model has now."""

    def save(self, path: PathLike) -> None:
        """Write the posterior with all its options to a file; the model is saved by its owner.

        The file holds tensors and plain values only. It is written beside ``path`` first and then
        renamed: a crash leaves the old file or the new one.

        Args:
            path: where to.

        Raises:
            NotFittedError: before ``fit``.
            TypeError: if ``path`` is no path, or an option is neither a tensor nor a plain value.
            OSError: as the file system says.
        """
        saving.save_posterior(self, path)

    @classmethod
    def load(
        cls,
        path: PathLike,
        model: nn.Module,
        *,
        map_location: torch.device | str | None = None,
        check_weights: bool = True,
    ) -> Self:
        """Read a posterior of this class; ``DebiasedLaplace.load`` reads any.

        Args:
            path: a file that ``save`` wrote.
            model: the model with the weights that it was fitted with.
            map_location: where the file's tensors are placed first (CPU by default); they end on
                the model's device.
            check_weights: refuse a model with other weights; False checks names and shapes only.

        Raises:
            FileNotFoundError: if there is no such file.
            StoredFileError: if it is damaged, something else, of another class, or too new.
            ValueError: if the model is another one.
        """
        record = saving.read_posterior(path, map_location)
        if record["posterior"] != cls.__name__:
            raise StoredFileError(
                f"{path} holds a {record['posterior']}, not a {cls.__name__}; read it with "
                f"{record['posterior']}.load, or with DebiasedLaplace.load, which reads any."
            )
        return saving.restored(cls, record, model, check_weights=check_weights)

    def __reduce__(self) -> tuple[Any, ...]:
        arguments = saving.constructor_arguments(self)
        if getattr(self, "H", None) is not None:
            return saving.rebuilt, (type(self), self._own_model(), arguments, self.state_dict())
        start = {
            "prior_precision": self.prior_precision,
            "prior_mean": self.prior_mean,
            "sigma_noise": self.sigma_noise,
        }
        return saving.unfitted, (type(self), self._own_model(), start | arguments)

    def _own_model(self) -> nn.Module:
        """The model as a copy of this posterior takes it."""
        return self._covered_model
