"""Loaders, budgets and sizes that do not fit each other."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch.utils.data import (
    DataLoader,
    RandomSampler,
    Sampler,
    TensorDataset,
    WeightedRandomSampler,
)

from tests.bad_input.rows import Row
from tests.bad_input.world import Stream, Walks, World

AREA = "Loaders and budgets"


def fit(input: str, loader: Callable[[World], Any], error: str, *names: str, **kwargs: Any) -> Row:
    """A row of a loader and arguments of ``fit``."""
    return Row(AREA, input, lambda w: w.refit(loader(w), **kwargs), error, names)


def argument(shown: str, error: str, *names: str, **kwargs: Any) -> Row:
    """A row of arguments of ``fit`` with a good loader."""
    return fit(f"`{shown}`", lambda w: w.loader(), error, *names, **kwargs)


def good(w: World) -> list[Any]:
    """The batches of a good loader."""
    return list(w.loader())


def breaking(w: World) -> Iterator[Any]:
    """A walk that ends in an exception."""
    yield from good(w)[:2]
    raise OSError("the disk is gone")


class _Every3(Sampler):
    """A sampler that does not tell its indices."""

    def __init__(self, n: int) -> None:
        self.n = n

    def __iter__(self) -> Iterator[int]:
        return iter(range(0, self.n, 3))

    def __len__(self) -> int:
        return -(-self.n // 3)


class _Breaking(TensorDataset):
    def __getitem__(self, index: Any) -> Any:
        if index == 7:
            raise OSError("the disk is gone")
        return super().__getitem__(index)


def _drop_one(samples: Any) -> Any:
    return torch.utils.data.default_collate(samples[:-1])


def _then(first: Callable[[World], Any], second: Callable[[World], Any]) -> Any:
    return lambda w: Walks(lambda: first(w), lambda: second(w))


def _shuffled(w: World) -> list[Any]:
    return good(w)[::-1]


def _again(**kwargs: Any) -> Callable[[World], None]:
    return lambda w: w.refit(w.loader(), override=False, **kwargs)


def _other_folds(w: World) -> None:
    la = w.posterior(folds=3)
    la.fit(w.loader())
    la.fit(w.loader(), magnitude_loader=w.loader(), n_data=12, override=False)


def _all_drawn(w: World) -> None:
    la = w.posterior(sampling="uniform")
    la.fit(w.loader(), n_samples=10)
    la.fit(w.loader(), n_samples=4, override=False)


ROWS = [
    fit("an empty list", lambda w: [], "ValueError", "empty", n_data=5),
    fit("a dataset of no samples", lambda w: w.loader(w.x[:0], w.y[:0]), "ValueError", "empty"),
    fit(
        "`drop_last` that drops everything",
        lambda w: w.loader(batch_size=99, drop_last=True),
        "ValueError",
        "empty",
        "drop_last",
    ),
    fit("an iterator", lambda w: iter(w.loader()), "TypeError", "iterator", "only once", n_data=12),
    fit("a number for a loader", lambda w: 3, "TypeError", "loader", "int", n_data=12),
    fit(
        "a nested tensor as inputs",
        lambda w: [(torch.nested.nested_tensor(list(w.x)), w.y)],
        "ValueError",
        "nested tensor",
        "pad",
        n_data=12,
    ),
    fit(
        "sparse targets",
        lambda w: [(w.x, w.y.to_sparse())],
        "ValueError",
        "targets",
        "sparse",
        "to_dense()",
        n_data=12,
    ),
    Row(
        AREA,
        "no loader, last layer",
        lambda w: w.posterior(subset_of_weights="last_layer").fit(None),
        "TypeError",
        ("train_loader", "NoneType"),
    ),
    fit("no loader", lambda w: None, "TypeError", "loader", "NoneType", n_data=12),
    fit(
        "a loader that raises half-way",
        lambda w: Walks(lambda: breaking(w)),
        "OSError",
        "the disk is gone",
        n_data=12,
    ),
    fit(
        "a loader that raises on its second walk",
        _then(good, breaking),
        "OSError",
        "the disk is gone",
        n_data=12,
    ),
    fit(
        "a dataset that raises on one sample",
        lambda w: DataLoader(_Breaking(w.x, w.y), batch_size=5),
        "OSError",
        "the disk is gone",
    ),
    fit(
        "a stream that comes in another order",
        _then(good, _shuffled),
        "RuntimeError",
        "changed between two walks",
        "magnitude_loader",
        n_data=12,
    ),
    fit(
        "a stream that gets shorter",
        _then(good, lambda w: good(w)[:2]),
        "RuntimeError",
        "changed between two walks",
        n_data=12,
    ),
    fit(
        "a stream that gets longer",
        _then(good, lambda w: good(w) + good(w)),
        "RuntimeError",
        "changed between two walks",
        n_data=12,
    ),
    fit(
        "a stream whose batches change their structure",
        _then(good, lambda w: [x for x, _ in good(w)]),
        "TypeError",
        "pairs",
        n_data=12,
    ),
    fit(
        "batches of different structure",
        lambda w: [good(w)[0], good(w)[1][0]],
        "TypeError",
        "pairs",
        "Tensor",
        n_data=12,
    ),
    fit(
        "`collate_fn` that drops samples",
        lambda w: w.loader(collate_fn=_drop_one),
        "ValueError",
        "collate_fn",
        "4 targets for 5 samples",
    ),
    fit(
        "a stream without `n_data`",
        lambda w: DataLoader(Stream(w), batch_size=5),
        "ValueError",
        "n_data",
        "without a length",
    ),
    fit("a list of batches without `n_data`", good, "ValueError", "n_data"),
    fit(
        "a budget from a stream",
        lambda w: DataLoader(Stream(w), batch_size=5),
        "ValueError",
        "n_samples",
        "map-style",
        n_samples=4,
        n_data=12,
    ),
    fit(
        "a budget through an unknown sampler",
        lambda w: w.loader(sampler=_Every3(12)),
        "ValueError",
        "n_samples",
        "_Every3",
        n_samples=3,
    ),
    fit(
        "a budget through a sampler with replacement",
        lambda w: w.loader(sampler=RandomSampler(w.x, replacement=True)),
        "ValueError",
        "with replacement",
        n_samples=3,
    ),
    fit(
        "a budget through a weighted sampler",
        lambda w: w.loader(sampler=WeightedRandomSampler([1.0] * 12, 12)),
        "ValueError",
        "WeightedRandomSampler",
        n_samples=3,
    ),
    argument("n_samples=0", "ValueError", "n_samples", "at least 1", n_samples=0),
    argument("n_samples=-3", "ValueError", "n_samples", "-3", n_samples=-3),
    argument("n_samples=1 for two folds", "ValueError", "n_samples=1", "2 folds", n_samples=1),
    argument("n_samples=13 of 12", "ValueError", "n_samples=13 exceeds", "12", n_samples=13),
    argument("n_samples=True", "ArgumentTypeError", "n_samples", "bool", n_samples=True),
    argument("n_samples=2.5", "ArgumentTypeError", "n_samples", "float", n_samples=2.5),
    argument('n_samples="all"', "ValueError", "n_samples", "'auto'", n_samples="all"),
    argument("n_data=0", "ValueError", "n_data", "at least 1", n_data=0),
    argument("n_data=-1", "ValueError", "n_data", "-1", n_data=-1),
    argument("n_data=2.5", "ArgumentTypeError", "n_data", "float", n_data=2.5),
    argument("n_data=True", "ArgumentTypeError", "n_data", "bool", n_data=True),
    argument('seed="a"', "ArgumentTypeError", "seed", "str", seed="a"),
    Row(
        AREA,
        "`pool_size` below the budget",
        lambda w: w.posterior(pool_size=4).fit(w.loader(), n_samples=7),
        "ValueError",
        ("pool_size=4", "n_samples=7"),
    ),
    Row(
        AREA,
        "`n_samples` and `magnitude_loader`",
        lambda w: w.refit(w.loader(), magnitude_loader=w.loader(), n_samples=4, n_data=12),
        "ValueError",
        ("n_samples", "magnitude_loader"),
    ),
    Row(
        AREA,
        '`scheme="single"` and `magnitude_loader`',
        lambda w: w.posterior(scheme="single").fit(
            w.loader(), magnitude_loader=w.loader(), n_data=12
        ),
        "ValueError",
        ("scheme='single'", "magnitude_loader"),
    ),
    Row(
        AREA,
        "`magnitude_loader` of another dataset without `n_data`",
        lambda w: w.refit(w.loader(), magnitude_loader=w.loader()),
        "ValueError",
        ("n_data",),
    ),
    Row(
        AREA,
        "an empty `magnitude_loader`",
        lambda w: w.refit(w.loader(), magnitude_loader=[], n_data=12),
        "ValueError",
        ("magnitude_loader is empty",),
    ),
    Row(
        AREA,
        "a `magnitude_loader` that is an iterator",
        lambda w: w.refit(w.loader(), magnitude_loader=iter(good(w)), n_data=12),
        "TypeError",
        ("magnitude_loader", "iterator"),
    ),
    Row(
        AREA,
        "`override=False` with other folds",
        _other_folds,
        "ValueError",
        ("override=False", "folds"),
    ),
    Row(
        AREA,
        "`override=False` when everything is drawn",
        _all_drawn,
        "ValueError",
        ("n_samples=4", "2 samples"),
    ),
    Row(
        AREA,
        "a loader of no batches to find the last layer",
        lambda w: w.posterior(subset_of_weights="last_layer").fit([], n_data=5),
        "ValueError",
        ("empty",),
    ),
    fit("a pair of tensors for a loader", lambda w: (w.x, w.y), "TypeError", "[(inputs, targets)]"),
    fit("a mapping for a loader", lambda w: {"x": w.x}, "TypeError", "loader is a dict"),
    fit(
        "one sample for two folds",
        lambda w: w.loader(w.x[:1], w.y[:1]),
        "ValueError",
        "1 sample(s)",
        "scheme='single'",
    ),
    fit(
        "targets on the meta device",
        lambda w: [(w.x, w.y.to("meta"))],
        "ValueError",
        "targets",
        "meta",
        n_data=12,
    ),
    fit(
        "sparse inputs in a `magnitude_loader`",
        lambda w: w.loader(),
        "ValueError",
        "to_dense",
        n_data=12,
        magnitude_loader=[(torch.ones(12, 4).to_sparse(), torch.zeros(12, dtype=torch.int64))],
    ),
    fit("sparse inputs", lambda w: [(w.x.to_sparse(), w.y)], "ValueError", "to_dense", n_data=12),
    fit(
        "triples of several inputs",
        lambda w: [(w.x, w.x, w.y)],
        "TypeError",
        "((x1, x2), y)",
        n_data=12,
    ),
    fit(
        "mappings with `label` for `labels`",
        lambda w: [{"x": w.x, "label": w.y}],
        "MissingKeyError",
        "dict_key_y='label'",
        n_data=12,
    ),
    argument("n_data=3, fewer than the samples", "ValueError", "n_data=3", "12 samples", n_data=3),
    argument("n_data=10**17", "ValueError", "n_data", "at most", n_data=10**17),
    argument('override="no"', "ArgumentTypeError", "override", override="no"),
    argument('progress_bar="no"', "ArgumentTypeError", "progress_bar", progress_bar="no"),
    argument(
        'checkpoint_interval="a"',
        "ArgumentTypeError",
        "checkpoint_interval",
        checkpoint_interval="a",
    ),
]
