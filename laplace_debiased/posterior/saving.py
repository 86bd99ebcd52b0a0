"""A posterior with all its options as a file, and back."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import fields, replace
from enum import Enum
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from laplace.curvature.curvature import CurvatureInterface
from torch import Tensor, nn

from laplace_debiased.errors import StoredFileError
from laplace_debiased.files import PathLike, read_record, write_record
from laplace_debiased.network.locks import model_lock
from laplace_debiased.network.modes import requiring_grad
from laplace_debiased.posterior.configure import RESIDUAL

if TYPE_CHECKING:
    from laplace_debiased.posterior.stored import StoredPosterior

KIND = "laplace_debiased posterior"
FORMAT_VERSION = 1
"""Version of the file around a state; states count their own versions."""

Kind = TypeVar("Kind")


def constructor_arguments(posterior: Any) -> dict[str, Any]:
    """Arguments that construct a posterior's like; what a state holds is not among them."""
    settings = posterior._settings
    arguments = {
        "likelihood": settings.likelihood,
        "temperature": posterior.temperature,
        "enable_backprop": posterior.enable_backprop,
        "dict_key_x": posterior.dict_key_x,
        "dict_key_y": posterior.dict_key_y,
        "strict": settings.strict,
        "rank": settings.rank,
        "ignore_index": settings.ignore_index,
        "allow_probabilities": settings.allow_probabilities,
        "sigma_noise": RESIDUAL if settings.residual_noise else None,
        "scheme": settings.scheme,
        "backend": settings.backend,
        "asdl_fisher_kwargs": dict(getattr(posterior, "_asdl_fisher_kwargs", None) or {}) or None,
    }
    if settings.backend is not None:
        given = dict(posterior._backend_kwargs)
        given.pop("last_layer", None)  # laplace-torch's own addition
        arguments["backend_kwargs"] = given or None
    for option in fields(settings.options):
        arguments.setdefault(option.name, getattr(settings.options, option.name))
    if posterior._covered_model is not posterior.model:
        arguments["feature_reduction"] = posterior.model.feature_reduction
        arguments["last_layer_name"] = getattr(posterior.model, "_last_layer_name", None)
    left_out = {"pool_size"}  # None is a choice there
    return {k: v for k, v in arguments.items() if v is not None or k in left_out}


def save_posterior(posterior: StoredPosterior, path: PathLike) -> None:
    """Write a posterior to a file.

    Raises:
        NotFittedError: before ``fit``.
        TypeError: if ``path`` is no path, or an option is neither a tensor nor a plain value.
        OSError: as the file system says; an earlier file is then as it was.
    """
    payload = {
        "posterior": type(posterior).__name__,
        "arguments": {
            name: _plain(name, value) for name, value in constructor_arguments(posterior).items()
        },
        "state": posterior.state_dict(),
    }
    write_record(path, KIND, FORMAT_VERSION, payload)


def read_posterior(path: PathLike, map_location: torch.device | str | None) -> dict[str, Any]:
    """Read the record of a posterior.

    Raises:
        TypeError, FileNotFoundError, StoredFileError: as ``read_record``.
    """
    record = read_record(path, KIND, FORMAT_VERSION, map_location)
    missing = {"posterior", "arguments", "state"} - set(record)
    if missing:
        raise StoredFileError(f"{path} has no {sorted(missing)[0]!r}; save the posterior again.")
    return record


def restored(
    kind: type[Kind], record: Mapping[str, Any], model: nn.Module, *, check_weights: bool = True
) -> Kind:
    """A posterior of a class from its record.

    Raises:
        ValueError: if the model is not the one that the record was made with.
    """
    arguments = dict(record["arguments"])
    if "backend" in arguments:
        arguments["backend"] = _backend_named(arguments["backend"])
    return rebuilt(kind, model, arguments, record["state"], check_weights=check_weights)


def rebuilt(
    kind: type[Kind],
    model: nn.Module,
    arguments: Mapping[str, Any],
    state: Mapping[str, Any],
    *,
    check_weights: bool = True,
) -> Kind:
    """A posterior of a class from its arguments and its state."""
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module; got {type(model).__name__}.")
    # What is covered is the state's to say: a network may be frozen by the time it is served.
    construct: Callable[..., Any] = kind
    with _trainable(model, state.get("covered", ())):
        posterior = construct(model, **{**arguments, "strict": False})
        posterior.load_state_dict(state, check_weights=check_weights)
    posterior._settings = _with_strict(posterior._settings, arguments.get("strict", False))
    return posterior


def unfitted(kind: Callable[..., Kind], model: nn.Module, arguments: Mapping[str, Any]) -> Kind:
    """A posterior of a class before its fit."""
    return kind(model, **arguments)


@contextmanager
def _trainable(model: nn.Module, names: Any) -> Iterator[None]:
    named = dict(model.named_parameters())
    with model_lock(model), requiring_grad(named[name] for name in names if name in named):
        yield


def _with_strict(settings: Any, strict: bool) -> Any:
    return replace(settings, strict=strict)


def _plain(name: str, value: Any) -> Any:
    """An option as a plain value.

    Raises:
        TypeError: if it is none.
    """
    match value:
        case Enum():
            return value.value
        case type() if issubclass(value, CurvatureInterface):
            return f"{value.__module__}.{value.__qualname__}"
        case bool() | int() | float() | str() | None | Tensor():
            return value
        case list() | tuple():
            return [_plain(name, entry) for entry in value]
        case dict():
            return {str(key): _plain(name, entry) for key, entry in value.items()}
    raise TypeError(
        f"the option {name!r} holds a {type(value).__name__}, which a file cannot: save the state "
        "with torch.save(la.state_dict(), path), and load it into a posterior that you construct."
    )


def _backend_named(name: str) -> type[CurvatureInterface]:
    pending: list[type] = [CurvatureInterface]
    while pending:
        kind = pending.pop()
        if f"{kind.__module__}.{kind.__qualname__}" == name:
            return kind
        pending += kind.__subclasses__()
    raise StoredFileError(
        f"the posterior was made with the curvature backend {name}, which is not known here: "
        "import the module that defines it first."
    )
