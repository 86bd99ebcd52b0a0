"""Temperature scaling, the baseline that a posterior has to beat (Guo et al., 2017, sec. 4.2)."""

import math
import warnings
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, overload

import numpy as np
import torch
from scipy.optimize import brentq
from scipy.special import logsumexp, softmax
from torch import nn

from laplace_debiased.calibration.batches import (
    FloatArray,
    Targets,
    as_labels,
    collect_targets,
    concatenate,
    over_batches,
    positions_as_samples,
    to_numpy,
    without_ignored,
)
from laplace_debiased.calibration.predictions import class_labels, finite
from laplace_debiased.checks import as_integer, check_key
from laplace_debiased.network.entry import OneEntry
from laplace_debiased.network.inputs import invoke
from laplace_debiased.network.modes import public_call
from laplace_debiased.parallel.ranks import ALONE, Ranks

TEMPERATURE_BOUNDS = (1e-3, 1e3)


@dataclass(frozen=True)
class TemperatureScaling:
    """One temperature for all logits.

    Attributes:
        temperature: What logits are divided by.
        nll_before: Negative log-likelihood of the validation labels at temperature one, in nats,
            mean over samples.
        nll_after: The same at `temperature`.
    """

    temperature: float
    nll_before: float
    nll_after: float

    def __post_init__(self) -> None:
        if not (math.isfinite(self.temperature) and self.temperature > 0.0):
            raise ValueError(f"temperature must be positive and finite, got {self.temperature}.")

    @overload
    def probs(self, logits: torch.Tensor) -> torch.Tensor: ...
    @overload
    def probs(self, logits: np.ndarray) -> FloatArray: ...
    def probs(self, logits: torch.Tensor | np.ndarray) -> torch.Tensor | FloatArray:
        """Scaled probabilities [..., C] of logits [..., C], as tensor or array like these."""
        if isinstance(logits, torch.Tensor):
            return torch.softmax(logits / self.temperature, dim=-1)
        return softmax(logits / self.temperature, axis=-1)


@public_call
def fit_temperature(
    logits_or_model: torch.Tensor | np.ndarray | nn.Module,
    val_loader: Targets,
    *,
    ignore_index: int | None = None,
    dict_key_x: str = "input_ids",
    dict_key_y: str = "labels",
    progress_bar: bool = False,
) -> TemperatureScaling:
    """Temperature that minimises the negative log-likelihood on validation data.

    Args:
        logits_or_model: A classifier that gives logits [batch, C], or its logits [n, C]. Of
            sequences [n, T, C] with labels [n, T] every position counts as a sample.
        val_loader: Gives (x, y) or mappings, the inputs as a posterior takes them. Beside logits
            it must not shuffle, and the labels [n] themselves will do as well.
        ignore_index: Label that does not count, such as -100 at padded positions; None for none.
        dict_key_x: Where a mapping holds the input of a model that takes no mapping.
        dict_key_y: Where a mapping holds its labels.
        progress_bar: Whether to show progress over the loader.

    Returns:
        The temperature and what it is worth. It warns where the optimum lies outside
        [0.001, 1000], as for validation data without a single error, and returns that bound.

    Raises:
        TypeError: If the first argument is neither model nor logits, or the model returns no
            tensor.
        ModelCallError: If the model fails on the inputs.
        ValueError: If logits are not finite, labels are invalid or all ignored, or the two do not
            match.
    """
    if ignore_index is not None:
        ignore_index = as_integer("ignore_index", ignore_index)
    if isinstance(logits_or_model, nn.Module):
        logits, labels = collect_logits(
            logits_or_model,
            val_loader,
            dict_key_x=dict_key_x,
            dict_key_y=dict_key_y,
            progress_bar=progress_bar,
        )
        return scaling_of(logits, to_numpy(labels), ignore_index)
    if not isinstance(logits_or_model, torch.Tensor | np.ndarray):
        raise TypeError(
            "logits_or_model must be a torch module or logits (samples, classes), got "
            f"{type(logits_or_model).__name__}; of a posterior pass its .model."
        )
    targets = collect_targets(val_loader, dict_key_y)
    return scaling_of(to_numpy(logits_or_model), targets, ignore_index)


def collect_logits(
    model: nn.Module,
    loader: Iterable[Any],
    *,
    dict_key_x: str = "input_ids",
    dict_key_y: str = "labels",
    progress_bar: bool = False,
    ranks: Ranks = ALONE,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits [n, C] and labels [n] of a loader, on the CPU; the model is left as it was.

    The positions of sequences are rows of their own, so that batches may differ in length. Each
    rank makes a part, and all have all.

    Raises:
        TypeError: If a batch is neither a pair nor a mapping, or the model returns no tensor.
        ModelCallError: If the model fails on the inputs.
        ValueError: If the loader is empty, or the labels of sequences are not [batch, T].
    """
    device = next((parameter.device for parameter in model.parameters()), None)
    check_key("dict_key_x", dict_key_x)
    entered = OneEntry(model, dict_key_x)

    def of_batch(x: Any, y: Any) -> tuple[torch.Tensor, np.ndarray]:
        with torch.no_grad():
            output = invoke(model, entered(x))
        if not isinstance(output, torch.Tensor):
            raise TypeError(
                "logits_or_model must return a tensor of logits, or a record that holds one as "
                f".logits; got {type(output).__name__}."
            )
        return positions_as_samples(output.cpu(), to_numpy(as_labels(y)))

    found = over_batches(of_batch, loader, "loader", dict_key_y, device, model, ranks, progress_bar)
    logits, labels = zip(*found, strict=True)
    return torch.cat(logits), torch.from_numpy(concatenate(labels))


def scaling_of(
    logits: torch.Tensor | np.ndarray, labels: np.ndarray, ignore_index: int | None
) -> TemperatureScaling:
    """:func:`fit_temperature` of logits and labels."""
    rows, labels = positions_as_samples(logits, labels)
    rows, labels = without_ignored(rows, labels, ignore_index)
    checked = finite(rows, "logits")
    if checked.ndim != 2 or checked.shape[1] < 2:
        raise ValueError(
            "logits must have shape (samples, classes) with at least two classes, got "
            f"{checked.shape}; for one logit z per sample stack (0, z)."
        )
    one_hot = np.isin(checked, (0.0, 1.0)).all()
    sums_to_one = checked.min() >= 0 and np.abs(checked.sum(1) - 1).max() < 1e-5
    if len(checked) > 1 and sums_to_one and not one_hot:
        raise ValueError(
            "logits are probabilities: those of every sample sum to one; pass their logarithms, or "
            "the model without the softmax at its end."
        )
    labels = class_labels(labels, *checked.shape)
    # The label's own logit subtracted: exact for the NLL, and it keeps tiny losses accurate.
    margins = checked - np.take_along_axis(checked, labels[:, None], axis=1)

    def nll(log_temperature: float) -> float:
        return float(logsumexp(margins * math.exp(-log_temperature), axis=1).mean())

    optimum = _optimal_log_temperature(margins)
    return TemperatureScaling(math.exp(optimum), nll_before=nll(0.0), nll_after=nll(optimum))


def _optimal_log_temperature(margins: FloatArray) -> float:
    """Logarithm of the temperature that minimises the NLL of logit margins [n, C].

    The NLL is convex in 1/T, so its slope has one zero and a bracketing root finder gets it to
    machine precision. netcal's fit is not used: it starts from clipped probabilities, which moves
    the optimum of overconfident logits, and what it calls the temperature is the inverse of it.
    """

    def slope(log_temperature: float) -> float:
        inverse = math.exp(-log_temperature)
        return float((softmax(margins * inverse, axis=1) * margins).sum(axis=1).mean())

    low, high = (math.log(bound) for bound in TEMPERATURE_BOUNDS)
    if not margins.any():
        return 0.0  # Constant logits: every temperature gives the same probabilities.
    for bound, beyond, reason in (
        (low, slope(low) <= 0.0, "every label has the largest logit"),
        (high, slope(high) >= 0.0, "the logits do no better than chance"),
    ):
        if beyond:
            warnings.warn(
                f"the optimal temperature lies beyond {math.exp(bound):g}, as it does when "
                f"{reason}; fit it on more, or on other, validation data.",
                stacklevel=5,
            )
            return bound
    return float(brentq(slope, low, high, xtol=1e-13, rtol=1e-13))
