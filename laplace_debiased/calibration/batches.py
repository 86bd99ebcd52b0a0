"""What loaders give: inputs, targets and the order in which they come."""

from collections.abc import Callable, Iterable
from typing import Any, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn
from torch.utils.data import (
    DistributedSampler,
    RandomSampler,
    SubsetRandomSampler,
    WeightedRandomSampler,
)

from laplace_debiased.checks import checked_flag
from laplace_debiased.data.block import Block
from laplace_debiased.data.loaders import check_loader, loader_generators, paired
from laplace_debiased.network.inputs import to_device
from laplace_debiased.network.modes import undisturbed
from laplace_debiased.parallel.ranks import ALONE, Ranks

FloatArray = NDArray[np.float64]
IntArray = NDArray[np.int64]
Targets = Iterable[Any] | torch.Tensor | np.ndarray
T = TypeVar("T")

_SHUFFLING = (RandomSampler, SubsetRandomSampler, WeightedRandomSampler)


def as_labels(labels: Any) -> torch.Tensor:
    """A batch's labels as a tensor; arrays and lists of numbers will do.

    Raises:
        TypeError: for anything else.
    """
    try:
        return torch.as_tensor(labels)
    except (TypeError, ValueError, RuntimeError) as error:
        raise TypeError(
            "the targets of a batch must be a tensor, or an array or list of numbers; got "
            f"{type(labels).__name__} ({error})."
        ) from error


def to_numpy(values: torch.Tensor | np.ndarray) -> np.ndarray:
    """The values on the host; bfloat16, which numpy lacks, as float32."""
    if isinstance(values, torch.Tensor):
        if values.is_meta or values.layout is not torch.strided:
            raise ValueError(
                "targets, probabilities and logits must be dense and hold data; got "
                f"{values.layout} on the {values.device} device."
            )
        values = values.detach().cpu()
        return (values.float() if values.dtype == torch.bfloat16 else values).numpy()
    return values


def over_batches(
    of_batch: Callable[[Any, Any], T],
    loader: Iterable[Any],
    name: str,
    key: str | None,
    device: torch.device | str | None = None,
    model: nn.Module | None = None,
    ranks: Ranks = ALONE,
    progress_bar: bool = False,
) -> list[T]:
    """What ``of_batch`` makes of every batch's inputs and targets, of all ranks, in order.

    Model and random number generators are left as they were. Inputs (the mapping itself, where a
    batch is one) come on the ``device``, if one is given. Without the ``key`` of the targets in
    mappings these do not matter, and are None.

    Raises:
        MissingKeyError: If a mapping has no such key.
        TypeError: If `loader` cannot be iterated over, or is a batch itself, or if a batch is
            neither a pair nor a mapping.
        ValueError: If it yields nothing, on any rank.
    """
    checked_flag("progress_bar", progress_bar)
    check_loader(loader, name, walks=1)

    def found_in(batch: Any) -> T:
        x, y = _split(batch, key)
        return of_batch(x if device is None else to_device(x, torch.device(device)), y)

    with undisturbed(model, generators=loader_generators(loader)):
        block = Block(loader, ranks, name)
        batches: Iterable[Any] = block
        if progress_bar:
            from tqdm.auto import tqdm

            batches = tqdm(block, desc=f"Predicting {name}")
        [found] = block.joined("answers", [found_in(batch) for batch in batches])
    if not found:
        raise ValueError(f"{name} yields no batch; pass one with at least one sample.")
    return found


def _split(batch: Any, key: str | None) -> tuple[Any, Any]:
    if key is None:
        return (batch[0] if isinstance(batch, list | tuple) and batch else batch), None
    x, y = paired(batch, key)
    if not isinstance(y, torch.Tensor | np.ndarray | list | tuple):
        raise TypeError(f"the targets of a batch must be a tensor, got {type(y).__name__}.")
    return x, y


def collect_targets(source: Targets, dict_key_y: str = "labels") -> np.ndarray:
    """Targets [n, ...] in order, from an unshuffled loader or as they are."""
    if isinstance(source, torch.Tensor | np.ndarray):
        return to_numpy(source)
    for sampler in (
        getattr(source, "sampler", None),
        getattr(getattr(source, "batch_sampler", None), "sampler", None),
    ):
        shuffled = isinstance(sampler, DistributedSampler) and sampler.shuffle
        if shuffled or isinstance(sampler, _SHUFFLING):
            raise ValueError(
                f"loader shuffles ({type(sampler).__name__}), so its labels do not line up with "
                "precomputed predictions; build it with shuffle=False, or pass the labels."
            )

    def targets_of(_: Any, y: Any) -> np.ndarray:
        return to_numpy(as_labels(y))

    return concatenate(over_batches(targets_of, source, "loader", dict_key_y))


def concatenate(parts: list[np.ndarray]) -> np.ndarray:
    """The batches' targets one after another [n, ...]."""
    shapes = {part.shape[1:] if part.ndim else None for part in parts}
    if len(shapes) > 1 or None in shapes:
        raise ValueError(
            f"targets must share one shape per sample, got trailing shapes {shapes} "
            "(None: a scalar batch); let every batch have a leading sample dimension."
        )
    return np.concatenate(parts)


def positions_as_samples(values: Any, targets: np.ndarray) -> tuple[Any, np.ndarray]:
    """Positions of sequences [n, T, C] as samples [n · T, C]; anything else as it is."""
    if values.ndim != 3:
        return values, targets
    if targets.shape != values.shape[:2]:
        raise ValueError(
            f"labels of sequences must have shape {tuple(values.shape[:2])} (samples, positions), "
            f"got {targets.shape}."
        )
    return values.reshape(-1, values.shape[-1]), targets.reshape(-1)


def without_ignored(
    rows: Any, targets: np.ndarray, ignore_index: int | None
) -> tuple[Any, np.ndarray]:
    """Rows [n, C] and labels [n] of those whose label counts, all without an `ignore_index`."""
    if ignore_index is None or targets.shape != (len(rows),):
        return rows, targets
    if ignore_index < 0 and np.issubdtype(targets.dtype, np.unsignedinteger):
        raise ValueError(
            f"labels of dtype {targets.dtype} never equal ignore_index={ignore_index}; convert "
            "them to int64 before that value is written, or pass the value that marks them."
        )
    counted = targets != ignore_index
    if not counted.any():
        raise ValueError(f"every label is ignore_index={ignore_index}; nothing is left to score.")
    return rows[counted], targets[counted]
