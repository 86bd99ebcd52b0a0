"""A network with the loss that it feeds, and batches as it takes them."""

from __future__ import annotations

import warnings
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from laplace_debiased.curvature.lowrank.rows import RowPass
from laplace_debiased.data.loaders import split_batch
from laplace_debiased.errors import ArgumentTypeError
from laplace_debiased.likelihoods import LossModel, loss_model
from laplace_debiased.network.functional import FunctionalNetwork
from laplace_debiased.network.inputs import batch_length, tensors_of
from laplace_debiased.network.outputs import check_weights
from laplace_debiased.options import DEFAULT_BYTE_BUDGET


class LossBatch(NamedTuple):
    """One batch, on the parameters' device."""

    inputs: Any
    targets: Tensor
    outputs: Tensor  # [m, C]


@dataclass(frozen=True, eq=False)
class LossNetwork:
    """A network as a function of its trainable parameters, with the loss that it feeds."""

    row_pass: RowPass
    loss: LossModel
    label_key: str  # of the targets, where a batch is a mapping

    @classmethod
    def of(cls, model: nn.Module, likelihood: str, label_key: str) -> LossNetwork:
        """View of a model whose parameters are finite, and some of them trainable."""
        names = tuple(name for name, p in model.named_parameters() if p.requires_grad)
        if not names:
            raise ValueError(
                "the model has no trainable parameter (requires_grad=True), so there are no "
                "directions. Unfreeze the parameters whose curvature is meant."
            )
        check_weights(model)
        row_pass = RowPass(FunctionalNetwork(model, names), DEFAULT_BYTE_BUDGET)
        return cls(row_pass, loss_model(likelihood), label_key)

    @property
    def functional(self) -> FunctionalNetwork:
        """Outputs as a function of the trainable parameters."""
        return self.row_pass.network

    def rows_bytes(self, n_rows: int) -> int:
        """Memory of ``n_rows`` rows of length P, in bytes."""
        return n_rows * self.functional.n_params * torch.finfo(self.functional.dtype).bits // 8

    def batch(self, batch: object) -> LossBatch:
        """A batch that is not empty, with outputs that are finite and targets that fit them."""
        inputs, targets = split_batch(batch, self.label_key)
        if batch_length(inputs) == 0:
            raise ValueError(
                "batch, or one of batches or reference_loader, is empty; give at least one sample."
            )
        functional = self.functional
        targets = functional.prepare(targets)
        inputs = functional.prepare(inputs)
        outputs = functional.outputs(inputs)
        self.row_pass.check_gradients(inputs)
        self.loss.check_targets(outputs, targets)
        return LossBatch(inputs, targets, outputs)


def check_data(batch: object, other_batch: object, reference: object, label_key: str) -> None:
    """Check that two batches hold samples and that a reference, if there is one, gives batches."""
    samples = []
    for name, data in (("batch", batch), ("other_batch", other_batch)):
        inputs = split_batch(data, label_key)[0]
        if batch_length(inputs) == 0:
            raise ValueError(f"{name} is empty; it needs at least one sample.")
        samples.append(_samples_as_bytes(inputs))
    own, other = set(samples[0]), samples[1]
    shared = sum(sample in own for sample in other)
    if shared:
        warnings.warn(
            f"{shared} of the {len(other)} samples of other_batch have the inputs of one of batch: "
            "what is measured on them is biased as on batch itself. Draw two disjoint batches.",
            UserWarning,
            stacklevel=4,
        )
    if isinstance(reference, Tensor) or not isinstance(reference, Iterable | None):
        kind = type(reference).__name__
        raise ArgumentTypeError(f"reference_loader must give batches; got {kind}.")


def _samples_as_bytes(inputs: Any) -> list[bytes]:
    """What goes into the model of every sample."""
    m = batch_length(inputs)
    tensors = [t for t in tensors_of(inputs) if t.ndim and len(t) == m and not t.is_meta]
    rows = [t.detach().cpu().double().reshape(m, -1) for t in tensors if not t.is_complex()]
    return [row.tobytes() for row in torch.cat(rows, 1).numpy()] if rows else []
