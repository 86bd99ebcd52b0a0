"""Training data that no curvature can come from."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from tests.bad_input.rows import Row
from tests.bad_input.world import World

AREA = "Training data"


def data(
    input: str,
    make: Callable[[Tensor, Tensor], tuple[Any, Any]],
    error: str,
    *names: str,
    likelihood: str = "classification",
    **options: Any,
) -> Row:
    """A row of inputs and targets made from good ones."""

    def act(w: World) -> None:
        la = w.posterior(**options) if options else w.la
        la.fit(w.loader(*make(w.x.clone(), w.y.clone())))

    return Row(AREA, input, act, error, names, likelihood)


def batches(input: str, batch: Callable[[World], Any], error: str, *names: str) -> Row:
    """A row of a single batch."""
    return Row(AREA, input, lambda w: w.refit([batch(w)], n_data=5), error, names)


def with_value(value: float, at: int) -> Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """Inputs with one entry replaced."""

    def make(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        x[at, 0] = value
        return x, y

    return make


def changed(at: int, value: float) -> Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """Targets with one entry replaced."""

    def make(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        y[at] = value
        return x, y

    return make


ROWS = [
    data("NaN in an input", with_value(torch.nan, 0), "NumericalError", "sample 0", "NaN"),
    data(
        "NaN in an input of a late batch",
        with_value(torch.nan, 11),
        "NumericalError",
        "sample 1 of the batch",
        "NaN",
    ),
    data("an infinite input", with_value(torch.inf, 0), "NumericalError", "NaN or infinite"),
    data(
        "inputs with another number of features",
        lambda x, y: (x[:, :3], y),
        "ModelCallError",
        "inputs",
        "torch.float32",
        "shapes",
    ),
    data(
        "integer inputs for a real model",
        lambda x, y: (x.long(), y),
        "ModelCallError",
        "torch.int64",
    ),
    data(
        "inputs of another floating type",
        lambda x, y: (x.double(), y),
        "ModelCallError",
        "torch.float64",
    ),
    data("complex inputs", lambda x, y: (x.to(torch.complex64), y), "ModelCallError", "complex64"),
    batches(
        "inputs on the meta device",
        lambda w: (w.x[:5].to("meta"), w.y[:5]),
        "ValueError",
        "inputs",
        "meta",
    ),
    batches(
        "texts for inputs", lambda w: (["a"] * 5, w.y[:5]), "TypeError", "model inputs", "list"
    ),
    batches(
        "a numpy array for inputs",
        lambda w: (w.x[:5].numpy(), w.y[:5]),
        "TypeError",
        "model inputs",
        "ndarray",
    ),
    batches("no inputs", lambda w: (None, w.y[:5]), "TypeError", "model inputs", "NoneType"),
    batches(
        "a list for targets", lambda w: (w.x[:5], [0, 1, 2, 0, 1]), "TypeError", "targets", "list"
    ),
    batches(
        "a single number for targets",
        lambda w: (w.x[:5], torch.tensor(1)),
        "TypeError",
        "targets",
        "batch dimension",
    ),
    batches(
        "more inputs than targets", lambda w: (w.x[:5], w.y[:4]), "ValueError", "(5, 4)", "(4,)"
    ),
    batches("inputs without targets", lambda w: w.x[:5], "TypeError", "pairs", "Tensor"),
    batches("triples", lambda w: (w.x[:5], w.y[:5], w.y[:5]), "TypeError", "pairs", "length 3"),
    batches(
        "a mapping without labels",
        lambda w: {"x": w.x[:5]},
        "MissingKeyError",
        "dict_key_y='labels'",
        "'x'",
    ),
    batches("a batch of no samples", lambda w: (w.x[:0], w.y[:0]), "ValueError", "empty"),
    batches("text for a batch", lambda w: "batch", "TypeError", "pairs", "str"),
    data(
        "a label of -100 without `ignore_index`",
        changed(3, -100),
        "ValueError",
        "0..2",
        "-100",
        "ignore_index=-100",
    ),
    data(
        "a negative label that is not `ignore_index`",
        changed(3, -1),
        "ValueError",
        "0..2",
        "-1",
        ignore_index=-100,
    ),
    data(
        "every label equal to `ignore_index`",
        lambda x, y: (x, torch.full_like(y, -100)),
        "ValueError",
        "ignore_index",
        "12 samples",
        ignore_index=-100,
    ),
    data("a label out of range", changed(11, 3), "ValueError", "targets", "0..2", "3"),
    data("one-hot labels", lambda x, y: (x, torch.eye(3)[y]), "ValueError", "(5, 3)", "argmax"),
    data(
        "one-hot integer labels",
        lambda x, y: (x, torch.eye(3)[y].long()),
        "ValueError",
        "(5, 3)",
        "argmax",
    ),
    data(
        "floating-point labels",
        lambda x, y: (x, y.float()),
        "ValueError",
        "integer class indices",
        "torch.float32",
    ),
    data("labels of shape (m, 1)", lambda x, y: (x, y[:, None]), "ValueError", "(5, 1)"),
    batches(
        "the tokens and offsets of an `EmbeddingBag`",
        lambda w: ((torch.arange(20), torch.arange(0, 20, 4)), w.y[:5]),
        "ValueError",
        "EmbeddingBag",
        "padding_idx",
    ),
    batches(
        "a mapping of which `forward` names no key",
        lambda w: {"image": w.x[:5], "labels": w.y[:5]},
        "ModelCallError",
        "'image'",
        "dict_key_x='image'",
        "name forward's arguments after their keys",
    ),
    batches(
        "labels that equal `input_ids`, as for a causal language model",
        lambda w: dict.fromkeys(("input_ids", "labels"), torch.arange(15).reshape(5, 3)),
        "ValueError",
        "shifts such labels",
        "ignore_index=-100",
    ),
    data(
        "one label for a sequence",
        lambda x, y: (x, y[:, 0]),
        "ValueError",
        "(batch, positions)",
        "(5,)",
        likelihood="sequence",
    ),
    data(
        "a sequence's labels of another length",
        lambda x, y: (x, y[:, :2]),
        "ValueError",
        "(5, 3)",
        "(5, 2)",
        likelihood="sequence",
    ),
    data(
        "sequences for a low-rank posterior",
        lambda x, y: (x, y),
        "ValueError",
        "(batch, outputs)",
        "(5, 3, 3)",
        likelihood="sequence",
        hessian_structure="lowrank",
    ),
    data(
        "sequences for a last-layer posterior",
        lambda x, y: (x, y),
        "ValueError",
        "freeze all other parameters",
        "(5, 3, 3)",
        likelihood="sequence",
        subset_of_weights="last_layer",
    ),
    data(
        "regression targets of the wrong width",
        lambda x, y: (x, y[:, :1]),
        "ValueError",
        "(5, 1)",
        "(5, 3)",
        likelihood="regression",
    ),
    data(
        "regression targets without the output's dimension",
        lambda x, y: (x, y[:, 0]),
        "ValueError",
        "unsqueeze",
        likelihood="regression",
    ),
    data(
        "integer regression targets",
        lambda x, y: (x, y.long()),
        "ValueError",
        "torch.int64",
        "float()",
        likelihood="regression",
    ),
    data(
        "NaN in a regression target",
        changed(3, torch.nan),
        "ValueError",
        "targets",
        "NaN",
        likelihood="regression",
    ),
    data(
        "an infinite regression target",
        changed(3, torch.inf),
        "ValueError",
        "targets",
        "infinite",
        likelihood="regression",
    ),
    Row(
        AREA,
        'residuals that are all zero, `sigma_noise="residual"`',
        lambda w: w.posterior(sigma_noise="residual").fit(
            w.loader(y=w.model(w.x).detach(), batch_size=12)
        ),
        "ValueError",
        ("sigma_noise", "zero"),
        "regression",
    ),
    data(
        "binary labels of 2",
        changed(3, 2.0),
        "ValueError",
        "between 0 and 1",
        "2.0",
        likelihood="bernoulli",
    ),
    data(
        "negative binary labels",
        changed(3, -1.0),
        "ValueError",
        "between 0 and 1",
        likelihood="bernoulli",
    ),
    data(
        "NaN in a binary label",
        changed(3, torch.nan),
        "ValueError",
        "between 0 and 1",
        likelihood="bernoulli",
    ),
    data(
        "class indices for several binary labels",
        lambda x, y: (x, y.argmax(-1)),
        "ValueError",
        "(5,)",
        "(5, 3)",
        "one_hot",
        likelihood="bernoulli",
    ),
    data(
        "single inputs for reward modelling",
        lambda x, y: (x[:, 0], y),
        "ValueError",
        "pairs",
        "(5, 1)",
        likelihood="reward_modeling",
    ),
    data(
        "a preference of neither of a pair",
        changed(3, 2),
        "ValueError",
        "0..1",
        likelihood="reward_modeling",
    ),
    data(
        "pairs for the last layer of a reward model",
        lambda x, y: (x, y),
        "ValueError",
        "last layer 'head'",
        "requires_grad_(False)",
        "subset_of_weights='all'",
        likelihood="reward_modeling",
        subset_of_weights="last_layer",
    ),
]
