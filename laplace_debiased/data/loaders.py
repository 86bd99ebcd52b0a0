"""What a loader is: its batches, the indices behind them, the size of its data."""

from __future__ import annotations

import operator
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    DistributedSampler,
    IterableDataset,
    RandomSampler,
    SequentialSampler,
    Subset,
)

from laplace_debiased.checks import check_key, checked_integer
from laplace_debiased.errors import MissingKeyError
from laplace_debiased.network.inputs import WITHOUT_OFFSETS, batch_length, check_dense
from laplace_debiased.network.rng import preserved_rng

_LARGEST = 10**15
"""Curvature times a larger N loses the prior in float64, and overflows in float32."""


def check_loader(loader: Any, name: str, *, walks: int = 2) -> None:
    """Refuse what cannot be walked, or not often enough.

    Raises:
        TypeError: ``loader`` is not iterable, is a batch itself, or is an iterator that one walk
            uses up where there are more.
    """
    if walks > 1 and isinstance(loader, Iterator):
        raise TypeError(
            f"{name} is an iterator ({type(loader).__name__}) and can be walked only once; "
            "pass a DataLoader or a list of batches."
        )
    if isinstance(loader, Tensor):
        raise TypeError(
            f"{name} is a Tensor; pass a DataLoader, or a list of batches: "
            f"{name}=[(inputs, targets)]."
        )
    if isinstance(loader, Mapping) or (
        isinstance(loader, tuple) and loader and isinstance(loader[0], Tensor)
    ):
        raise TypeError(
            f"{name} is a {type(loader).__name__} of tensors, a batch itself; pass a DataLoader, "
            f"or a list that holds it: {name}=[(inputs, targets)]."
        )
    if isinstance(loader, str | bytes) or not hasattr(loader, "__iter__"):
        raise TypeError(
            f"{name} must be a DataLoader or an iterable of batches, got {type(loader).__name__}. "
            "It must be a loader, not the data."
        )


def split_batch(batch: Any, dict_key_y: str = "labels") -> tuple[Any, Tensor]:
    """Split what a loader yields into inputs, as they came, and targets [m, ...].

    It is a pair, the inputs a tensor, several, or a mapping; or a mapping that holds the targets
    under ``dict_key_y``; then the whole mapping is the input.

    Raises:
        TypeError: ``batch`` is neither, its targets are not a tensor, or its inputs hold none.
        ValueError: The key is missing, or inputs and targets differ in length.
    """
    inputs, targets = paired(batch, dict_key_y)
    if not isinstance(targets, Tensor) or targets.ndim == 0:
        raise TypeError(
            "The targets of a batch must be a tensor with a batch dimension, got "
            f"{_SINGLE if isinstance(targets, Tensor) else type(targets).__name__}."
        )
    check_dense(inputs)
    check_dense(targets, "The targets of a batch")
    if targets.is_meta:
        raise ValueError("The targets of a batch are on the meta device and hold no data.")
    length = batch_length(inputs)
    if length != len(targets):
        shape = tuple(inputs.shape) if isinstance(inputs, Tensor) else f"of {length} samples"
        raise ValueError(
            f"A batch has inputs {shape} but targets {tuple(targets.shape)}: "
            f"their first dimensions must agree.{_without_offsets(inputs, len(targets))}"
        )
    return inputs, targets


_SINGLE = "a scalar tensor (as of single samples, which a DataLoader with batch_size=None yields)"


def paired(batch: Any, dict_key_y: str) -> tuple[Any, Any]:
    """Inputs and targets of a batch, whatever the targets are; arguments as :func:`split_batch`.

    Raises:
        MissingKeyError: A mapping does not have the key.
        TypeError: ``batch`` is neither a pair nor a mapping.
        ValueError: The labels of a mapping are those of a causal language model, unshifted.
    """
    if isinstance(batch, Mapping):
        check_key("dict_key_y", dict_key_y)
        if dict_key_y not in batch:
            raise MissingKeyError(
                f"The loader's batches have no key dict_key_y={dict_key_y!r}; they have "
                f"{sorted(map(str, batch))}. Name the labels' key{_likely_key(batch)}."
            )
        _refuse_unshifted(batch, batch[dict_key_y])
        return batch, batch[dict_key_y]
    if isinstance(batch, tuple | list) and len(batch) == 2:
        return batch[0], batch[1]
    size = f" of length {len(batch)}" if isinstance(batch, tuple | list) else ""
    raise TypeError(
        "A loader must yield (inputs, targets) pairs or mappings, "
        f"got {type(batch).__name__}{size}.{_with_several_inputs(batch)}"
    )


def _refuse_unshifted(batch: Mapping[str, Any], targets: Any) -> None:
    """Refuse labels that a causal language model would shift in its own loss.

    Raises:
        ValueError: if all labels that count equal the tokens at their own positions.
    """
    tokens = batch.get("input_ids")
    if not (isinstance(tokens, Tensor) and isinstance(targets, Tensor)):
        return
    if tokens.shape != targets.shape or tokens.ndim != 2 or tokens.shape[1] < 2 or tokens.is_meta:
        return
    counted = targets >= 0
    if bool(counted.any()) and bool((targets == tokens.to(targets.device))[counted].all()):
        raise ValueError(
            "the labels equal input_ids: a causal language model predicts the next token, and "
            "shifts such labels in its own loss only. Build the loader with "
            "collate_fn=NextTokenLabels(...) around the one that it has (from laplace_debiased), "
            "and pass ignore_index=-100. If each position is to predict its own token, yield pairs "
            "(batch, labels)."
        )


def _likely_key(batch: Mapping[str, Any]) -> str:
    """How to name the key of the labels, if one looks like it."""
    for key in ("label", "targets", "target", "y"):
        if key in batch:
            return f": dict_key_y={key!r}"
    return " with dict_key_y"


def _without_offsets(inputs: Any, length: int) -> str:
    """What to give in place of the flat tokens and offsets of an ``EmbeddingBag``."""
    if not isinstance(inputs, tuple | list) or len(inputs) != 2:
        return ""
    tensors = all(isinstance(one, Tensor) and one.ndim == 1 for one in inputs)
    if not tensors or len(inputs[1]) not in (length, length + 1):
        return ""
    return WITHOUT_OFFSETS


def _with_several_inputs(batch: Any) -> str:
    """How to write a batch of several inputs."""
    if not isinstance(batch, tuple | list) or len(batch) < 3:
        return ""
    names = ", ".join(f"x{k + 1}" for k in range(len(batch) - 1))
    return f" For a model of several inputs let collate_fn give (({names}), y)."


def loader_length(loader: Any, n_data: int | None = None) -> int:
    """Size N of the training set: ``n_data`` if given, else ``len(loader.dataset)``.

    What a sampler or ``drop_last`` leaves out still counts; a ``Subset`` counts its own length.

    Raises:
        TypeError: ``n_data`` is not an int.
        ValueError: ``n_data`` is not positive, or neither it nor a length is there.
    """
    if n_data is not None:
        n = checked_integer("n_data", n_data)
        if n > _LARGEST:
            raise ValueError(f"n_data must be at most {_LARGEST:.0e}; got {n}.")
        return n
    dataset = getattr(loader, "dataset", None)
    try:
        length = len(dataset)  # type: ignore[arg-type]
    except (TypeError, NotImplementedError):
        what = "no .dataset" if dataset is None else f"a {type(dataset).__name__} without a length"
        raise ValueError(
            f"The size of the training set is unknown (the loader has {what}): pass n_data."
        ) from None
    if length < 1:
        raise ValueError("The loader's dataset is empty.")
    return length


def _is_own_walk(loader: Any) -> bool:
    # A subclass with a walk of its own may filter, transform or move batches: leave it to it.
    return isinstance(loader, DataLoader) and (
        type(loader).__iter__ is DataLoader.__iter__
        and type(loader)._get_iterator is DataLoader._get_iterator
    )


def is_indexable(loader: Any) -> bool:
    """Whether a loader walks a map-style dataset by indices of its own."""
    return (
        _is_own_walk(loader)
        and not isinstance(loader.dataset, IterableDataset)
        and loader.batch_sampler is not None
    )


def loader_generators(loader: Any) -> tuple[torch.Generator, ...]:
    """Generators that a walk of the loader may draw from beside the global ones."""
    batch_sampler = getattr(loader, "batch_sampler", None)
    holders = (
        loader,
        getattr(loader, "sampler", None),
        batch_sampler,
        getattr(batch_sampler, "sampler", None),
    )
    found = [getattr(holder, "generator", None) for holder in holders]
    return tuple({id(g): g for g in found if isinstance(g, torch.Generator)}.values())


def index_batches(loader: Any, seed: int) -> list[list[int]] | None:
    """Dataset indices of each batch of one walk, with a shuffle decided by ``seed``; loads no data.

    None where the loader has no integer indices (an ``IterableDataset``, a plain iterable, a loader
    class with its own walk).
    """
    if not is_indexable(loader):
        return None
    with preserved_rng(seed, generators=loader_generators(loader)):
        listed = [list(batch) for batch in loader.batch_sampler]
    try:
        return [_as_indices(batch, loader.dataset) for batch in listed]
    except TypeError:
        return None


def _as_indices(keys: Iterable[Any], dataset: Any) -> list[int]:
    indices = [operator.index(key) for key in keys]
    # dataset[-1] is a second name of its last sample; folds must know it by one.
    return [i + len(dataset) if i < 0 else i for i in indices]


def can_draw(loader: Any) -> bool:
    """Whether the loader tells which samples of its dataset it stands for."""
    return _undrawable(loader) is None


def _undrawable(loader: Any) -> str | None:
    """Why samples cannot be drawn from what is behind a loader; None if they can."""
    if not is_indexable(loader):
        return (
            f"n_samples cannot be drawn from {_kind_of(loader)}, which is not a plain "
            "DataLoader over a map-style dataset: pass such a loader, or n_samples=None and only "
            "as many batches as you want to spend."
        )
    sampler = _sampler(loader)
    iterates = type(sampler).__iter__
    replaces = getattr(sampler, "replacement", False)
    whole = iterates is RandomSampler.__iter__ and not replaces
    if hasattr(sampler, "indices") or iterates is SequentialSampler.__iter__ or whole:
        return None
    return (
        f"n_samples cannot be drawn through a {type(sampler).__name__}"
        f"{' with replacement' if replaces else ''}: which samples it stands for is unknown. "
        "Pass a loader over the same dataset without that sampler, or over Subset(dataset, "
        "indices), or n_samples=None to walk this one whole."
    )


def _kind_of(loader: Any) -> str:
    if _is_own_walk(loader):
        if isinstance(loader.dataset, IterableDataset):
            return f"a DataLoader over a stream ({type(loader.dataset).__name__})"
        return "a DataLoader with batch_size=None"
    return f"a {type(loader).__name__}"


def _sampler(loader: Any) -> Any:
    # A loader built with batch_sampler= has a .sampler that it never uses.
    batch_sampler = loader.batch_sampler
    return batch_sampler.sampler if type(batch_sampler) is BatchSampler else batch_sampler


def sampler_indices(loader: Any) -> Tensor:
    """Distinct dataset indices [M] that the loader's sampler draws from, in ascending order.

    Raises:
        ValueError: The loader is not indexable or its sampler does not tell its indices.
    """
    reason = _undrawable(loader)
    if reason is not None:
        raise ValueError(reason)
    sampler = _sampler(loader)
    if hasattr(sampler, "indices"):
        listed = torch.tensor(_as_indices(sampler.indices, loader.dataset), dtype=torch.int64)
        return torch.unique(listed)
    return torch.arange(len(sampler.data_source))


def inner_loader(loader: DataLoader, batches: Iterable[list[int]] | None = None) -> DataLoader:
    """Loader over the same data with the same ``collate_fn`` and workers, not the user's object.

    ``batches`` are dataset indices; None for the loader's own batches (of an ``IterableDataset``).
    """
    composition: dict[str, Any] = (
        {"batch_sampler": batches}
        if batches is not None
        else {"batch_size": loader.batch_size, "drop_last": loader.drop_last}
    )
    return DataLoader(
        loader.dataset,
        **composition,
        num_workers=loader.num_workers,
        collate_fn=loader.collate_fn,
        timeout=loader.timeout,
        worker_init_fn=loader.worker_init_fn,
        multiprocessing_context=loader.multiprocessing_context,
        prefetch_factor=loader.prefetch_factor,
    )


def restartable(loader: Any) -> Any:
    """Loader whose walks all start alike: persistent workers would carry their random state on."""
    if _is_own_walk(loader) and isinstance(loader.dataset, IterableDataset):
        return inner_loader(loader)
    return loader


def whole_loader(loader: Any, name: str) -> Any:
    """The loader that a ``DistributedSampler`` or Accelerate made a share of; others as they are.

    Shares of a training loop are of equal length, so that samples are repeated or left out, and
    which rank has which is the loop's to decide. What is walked here is shared out here.

    Raises:
        ValueError: Accelerate prepared a stream, whose shares cannot be joined again.
    """
    prepared = type(loader).__module__.startswith("accelerate.")
    if not prepared and not (is_indexable(loader) and _is_shared(loader.batch_sampler)):
        return loader
    if isinstance(loader.dataset, IterableDataset):
        raise ValueError(
            f"{name} is a stream that Accelerate prepared, which repeats samples to give every "
            "process as many: pass the loader as it was before prepare(), a stream of its own on "
            "every rank, with n_data."
        )
    batches = loader.batch_sampler
    while hasattr(batches, "batch_sampler"):
        batches = batches.batch_sampler
    sampler = batches.sampler
    if _is_shared(batches) or isinstance(sampler, RandomSampler):
        sampler = SequentialSampler(loader.dataset)
    return inner_loader(loader, BatchSampler(sampler, batches.batch_size, batches.drop_last))


def _is_shared(batch_sampler: Any) -> bool:
    return isinstance(getattr(batch_sampler, "sampler", None), DistributedSampler)


def base_indices(dataset: Any, indices: Tensor) -> tuple[Any, Tensor]:
    """Look through nested ``Subset``s: the data set at the bottom and the indices [n] in it."""
    while isinstance(dataset, Subset):
        own = torch.tensor(_as_indices(dataset.indices, dataset.dataset), dtype=torch.int64)
        dataset, indices = dataset.dataset, own[indices]
    return dataset, indices
