"""What a model takes: a tensor, several, or a mapping; how it is cut, moved and handed over."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from laplace_debiased.errors import ModelCallError
from laplace_debiased.network.memory import is_out_of_memory

LABELS = "labels"
"""Entry that a keyword call leaves out where the model has a default for it: given their labels,
Hugging Face's models compute a loss, and remember what kind it was."""


def tensors_of(inputs: Any) -> Iterator[Tensor]:
    """All tensors of a model's input, in order."""
    if isinstance(inputs, Tensor):
        yield inputs
    elif isinstance(inputs, Mapping):
        for value in inputs.values():
            yield from tensors_of(value)
    elif isinstance(inputs, tuple | list):
        for value in inputs:
            yield from tensors_of(value)


def map_tensors(function: Callable[[Tensor], Any], inputs: Any) -> Any:
    """The same structure with ``function`` of every tensor; what is no tensor stays."""
    if isinstance(inputs, Tensor):
        return function(inputs)
    if isinstance(inputs, Mapping):
        return _like(inputs, {key: map_tensors(function, value) for key, value in inputs.items()})
    if isinstance(inputs, tuple | list):
        values = [map_tensors(function, value) for value in inputs]
        named = isinstance(inputs, tuple) and hasattr(inputs, "_fields")
        return type(inputs)(*values) if named else type(inputs)(values)
    return inputs


def plain_containers(inputs: Any) -> Any:
    """The same entries in dicts, tuples and lists."""
    if isinstance(inputs, Mapping):
        return {key: plain_containers(value) for key, value in inputs.items()}
    if isinstance(inputs, tuple | list):
        return (tuple if isinstance(inputs, tuple) else list)(map(plain_containers, inputs))
    return inputs


class AttributeDict(dict[str, Any]):
    """A dict whose entries can be read as attributes too, as a tokenizer's batch allows."""

    def __getattr__(self, name: str) -> Any:
        """The entry of that name."""
        try:
            return self[name]
        except KeyError:
            raise AttributeError(name) from None


def _like(inputs: Mapping[str, Any], entries: dict[str, Any]) -> Any:
    """The entries as the mapping's own type, where that is built from a dict."""
    try:
        return type(inputs)(entries)  # type: ignore[call-arg]
    except (TypeError, ValueError):
        return entries


def batch_length(inputs: Any) -> int:
    """Number m of samples of a model's input: of its first tensor that has a dimension.

    Raises:
        TypeError: if the input holds no such tensor.
    """
    for tensor in tensors_of(inputs):
        if tensor.is_nested:
            check_dense(tensor)
        if tensor.ndim > 0:
            return tensor.shape[0]
    raise TypeError(
        "model inputs must be a tensor with a batch dimension, or a mapping, tuple or list that "
        f"holds one; got {type(inputs).__name__}."
    )


def check_dense(inputs: Any, name: str = "the model's inputs") -> None:
    """Check that no tensor of a model's input, or of what ``name`` says, is sparse.

    Raises:
        ValueError: naming the first that is.
    """
    for tensor in tensors_of(inputs):
        if tensor.is_nested:
            raise ValueError(
                f"{name} are a nested tensor, whose samples differ in shape; pad them to one "
                "(torch.nested.to_padded_tensor)."
            )
        if tensor.layout is not torch.strided:
            raise ValueError(
                f"{name} {described(tensor)} are of layout {tensor.layout}; give dense ones "
                "(inputs.to_dense())."
            )


def select_rows(inputs: Any, rows: slice | Tensor) -> Any:
    """Those samples of a model's input; tensors that are not per sample [m, ...] are kept.

    Raises:
        ValueError: for sparse inputs.
    """
    check_dense(inputs)
    if isinstance(inputs, Tensor):
        return inputs[rows]
    length = batch_length(inputs)

    def chosen(tensor: Tensor) -> Tensor:
        return tensor[rows] if tensor.ndim > 0 and tensor.shape[0] == length else tensor

    return map_tensors(chosen, inputs)


def row_slices(m: int, step: int) -> Iterator[slice]:
    """Slices of at most ``step`` that cover m samples in order."""
    for start in range(0, m, step):
        yield slice(start, min(start + step, m))


_PIECE_BYTES = 2 * 2**20
"""Of inputs that a forward pass on a CPU takes at a time: three images of 224 × 224 pixels."""


def pieces(inputs: Any) -> Iterator[Any]:
    """Some samples of a model's input after others, for a forward pass that keeps no graph.

    On a CPU only, and only where samples are large: activations of a whole batch leave the caches,
    and each is memory that the system hands out page by page and takes back at once. 50 images
    through EfficientNet-Lite0 take 1.1 s in pieces, and 4 s together. A GPU wants all at a time.

    Raises:
        ValueError: for sparse inputs.
    """
    length = batch_length(inputs)
    tensors = [tensor for tensor in tensors_of(inputs) if tensor.ndim > 0]
    size = sum(tensor.numel() * tensor.element_size() for tensor in tensors)
    if size <= _PIECE_BYTES or any(tensor.device.type != "cpu" for tensor in tensors):
        yield inputs
        return
    for rows in row_slices(length, max(1, length * _PIECE_BYTES // size)):
        yield select_rows(inputs, rows)


def to_device(inputs: Any, device: torch.device, name: str = "the model's inputs") -> Any:
    """Move every tensor of a model's input, or of what ``name`` says, to ``device``.

    Raises:
        ValueError: if one is on the meta device, and so holds no data, or is sparse.
    """
    check_dense(inputs, name)

    def moved(tensor: Tensor) -> Tensor:
        if tensor.is_meta and device.type != "meta":
            raise ValueError(
                f"{name} {described(tensor)} are on the meta device and hold no data; "
                "load them onto a real one."
            )
        return tensor.to(device)

    return map_tensors(moved, inputs)


def tensor_shapes(inputs: Any) -> tuple:
    """Structure and per-sample shapes of a model's input, to be compared and hashed."""
    if isinstance(inputs, Tensor):
        return tuple(inputs.shape[1:])
    if isinstance(inputs, Mapping):
        return tuple((str(key), tensor_shapes(value)) for key, value in inputs.items())
    if isinstance(inputs, tuple | list):
        return tuple(tensor_shapes(value) for value in inputs)
    return ()


def call_arguments(model: nn.Module, inputs: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """How a model is called with a batch's inputs, from the signature of its ``forward``.

    One argument as it comes is laplace-torch's convention. A mapping goes in by keywords where the
    signature names some of its keys (then those that it takes), or takes keywords only; several
    tensors go in one by one where the signature has room for them.

    Args:
        model: the model.
        inputs: a batch's inputs.

    Returns:
        Positional and keyword arguments.
    """
    if isinstance(inputs, Tensor) or not isinstance(inputs, Mapping | tuple | list):
        return (inputs,), {}
    try:
        parameters = signature_of(model).values()
    except (TypeError, ValueError):
        return (inputs,), {}
    kinds = inspect.Parameter
    positional = [
        p for p in parameters if p.kind in (kinds.POSITIONAL_ONLY, kinds.POSITIONAL_OR_KEYWORD)
    ]
    several = any(p.kind is kinds.VAR_POSITIONAL for p in parameters)
    if isinstance(inputs, Mapping):
        return _by_name(inputs, list(parameters), bool(positional) or several)
    n = len(inputs)
    if n >= 2 and (several or 2 <= n <= len(positional)):
        return tuple(inputs), {}
    return (inputs,), {}


def signature_of(model: nn.Module) -> Mapping[str, inspect.Parameter]:
    """Parameters of a model's ``forward``, by name.

    A wrapper that passes on whatever it is given (``torch.compile``, ``DataParallel``, PEFT's
    models) takes what the one module in it takes.

    Raises:
        TypeError, ValueError: if there is no signature.
    """
    parameters = inspect.signature(model.forward).parameters
    kinds = {parameter.kind for parameter in parameters.values()}
    inside = list(model.children())
    passes_on = kinds == {inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD}
    return signature_of(inside[0]) if passes_on and len(inside) == 1 else parameters


def _by_name(
    inputs: Mapping[str, Any], parameters: list[inspect.Parameter], takes_positional: bool
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    kinds = inspect.Parameter
    named = {
        p.name: p for p in parameters if p.kind in (kinds.POSITIONAL_OR_KEYWORD, kinds.KEYWORD_ONLY)
    }
    any_name = any(p.kind is kinds.VAR_KEYWORD for p in parameters)
    known = [key for key in inputs if key in named]
    if not known and not (any_name and not takes_positional):
        return (inputs,), {}
    optional = LABELS in named and named[LABELS].default is not kinds.empty
    keys = [
        key
        for key in inputs
        if (key in named or any_name) and not (key == LABELS and (optional or key not in named))
    ]
    return (), {str(key): inputs[key] for key in keys}


def check_model_arguments(model: nn.Module, given: Mapping[str, Any]) -> None:
    """Check that a model takes further arguments of these names.

    Raises:
        TypeError: naming the first that it does not.
    """
    try:
        parameters = signature_of(model)
    except (TypeError, ValueError):
        return
    if any(p.kind is inspect.Parameter.VAR_KEYWORD for p in parameters.values()):
        return
    for name in given:
        if name not in parameters:
            raise TypeError(
                f"neither a prediction nor the model's forward takes an argument {name!r}."
            )


def invoke(model: nn.Module, inputs: Any) -> Any:
    """Call a model with a batch's inputs, and take the logits of what it returns.

    Raises:
        ModelCallError: if the model fails on them; out of memory passes through as it is.
    """
    args, kwargs = call_arguments(model, inputs)
    versions = list(map(version_of, tensors_of(inputs)))
    with explained_failure(inputs):
        outputs = logits_of(model(*args, **kwargs))
    if list(map(version_of, tensors_of(inputs))) != versions:
        raise ModelCallError(
            "the model writes to its inputs in place, so that no second pass sees the same; let "
            "its first operation make a new tensor (nn.ReLU(inplace=False), x = x / 255)."
        )
    return outputs


def version_of(tensor: Tensor) -> int:
    """A tensor's version counter; an inference tensor counts none."""
    return 0 if tensor.is_inference() else tensor._version


NO_TENSOR = "the model must return a tensor of outputs"
WITHOUT_OFFSETS = (
    " For an EmbeddingBag give tokens (batch, longest bag) without offsets, padded with the "
    "layer's padding_idx."
)
_FAILURES = (RuntimeError, TypeError, ValueError, LookupError, AttributeError)


@contextmanager
def explained_failure(inputs: Any) -> Iterator[None]:
    """Turn a failure of the model's own code into one that says what went in.

    Raises:
        ModelCallError: in place of it; out of memory passes through as it is.
    """
    try:
        yield
    except _FAILURES as error:
        told = isinstance(error, ModelCallError) or str(error).startswith(NO_TENSOR)
        if told or is_out_of_memory(error):
            raise
        raise ModelCallError(
            f"the model failed on inputs {described(inputs)}: {type(error).__name__}: {error}. "
            "Check that the inputs have the shapes, dtypes and keys that the model was trained on."
            f"{_by_key(inputs) if isinstance(inputs, Mapping) else _for_bags(inputs)}"
        ) from error


def _by_key(inputs: Mapping[str, Any]) -> str:
    """How the network is given an entry of a mapping."""
    tensors = (key for key, one in inputs.items() if isinstance(one, Tensor) and key != LABELS)
    key = next(tensors, "input_ids")
    return (
        " A mapping goes in whole where forward names none of its keys: for a model of one tensor "
        f"say which it is (dict_key_x={key!r} of the posterior), name forward's arguments after "
        "their keys, or yield pairs (inputs, targets)."
    )


def _for_bags(inputs: Any) -> str:
    """What to give in place of flat tokens and the offsets of bags, if these may be such."""
    if not isinstance(inputs, tuple | list) or len(inputs) != 2:
        return ""
    flat = all(isinstance(one, Tensor) and one.ndim == 1 for one in inputs)
    return WITHOUT_OFFSETS if flat and not inputs[1].is_floating_point() else ""


def described(inputs: Any) -> str:
    """Shapes and dtypes of a model's input, for messages."""
    if isinstance(inputs, Tensor):
        return f"{tuple(inputs.shape)} of {inputs.dtype}"
    if isinstance(inputs, Mapping):
        entries = (f"{key!r}: {described(value)}" for key, value in inputs.items())
        return "{" + ", ".join(entries) + "}"
    if isinstance(inputs, tuple | list):
        return "(" + ", ".join(described(value) for value in inputs) + ")"
    return type(inputs).__name__


def plain_tensors(inputs: Any) -> Any:
    """The inputs with inference tensors copied, so that derivatives can be taken through them."""
    return map_tensors(lambda tensor: tensor.clone() if tensor.is_inference() else tensor, inputs)


def logits_of(outputs: Any) -> Any:
    """The entry ``logits`` of a model's output, if it is a record that has one."""
    if isinstance(outputs, Tensor):
        return outputs
    logits = (
        outputs.get("logits") if isinstance(outputs, Mapping) else getattr(outputs, "logits", None)
    )
    return logits if isinstance(logits, Tensor) else outputs
