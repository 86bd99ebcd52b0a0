"""A posterior with all its options as a file, and back."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import fields, replace
from enum import Enum
from typing import Any, TypeVar

import torch
from laplace.curvature.curvature import CurvatureInterface
from torch import Tensor, nn

from laplace_debiased.errors import StoredFileError
from laplace_debiased.estimation.keywords import RESIDUAL
from laplace_debiased.files import PathLike, read_record, write_record
from laplace_debiased.network.interrupts import uninterrupted
from laplace_debiased.network.modes import public_call
from laplace_debiased.network.substitution import substituted
from laplace_debiased.network.wrappers import plain_network
from laplace_debiased.parallel import Ranks
from laplace_debiased.posterior import state
from laplace_debiased.posterior.shell import Shell

KIND = "laplace_debiased posterior"
FORMAT_VERSION = 1
"""Version of the file around a state; states count their own versions."""

Kind = TypeVar("Kind")


RETIRED = {"ratio_step": False, "weight_sharing": "expand"}
"""Options that files of earlier versions hold, with the one value that means what is done now."""


@public_call
def state_dict(self: Shell) -> dict[str, Any]:
    """Everything that a posterior needs beside its model: tensors and plain values only.

    Raises:
        NotFittedError: before ``fit``.
    """
    owner = {
        "cls_name": type(self).__name__,
        "likelihood": self.likelihood,
        **{name: getattr(self, name) for name in state.HYPER_PARAMETERS},
    }
    return state.to_state(self.fitted, self._structure, owner)


@public_call
def load_state_dict(self: Shell, state_dict: dict[str, Any], *, check_weights: bool = True) -> None:
    """Restore :meth:`state_dict`.

    Args:
        self: a posterior.
        state_dict: the state.
        check_weights: refuse a model with other weights; False checks names and shapes only.

    Raises:
        ValueError: if it belongs to another class, likelihood, model or set of parameters.
            Nothing is changed then.
    """
    found = state.from_state(
        state_dict,
        self._structure,
        self._target,
        type(self).__name__,
        self.likelihood,
        check_weights=check_weights,
    )
    before = dict(vars(self))
    with uninterrupted():
        try:
            self._adopt(found.fit, found.model)
            self._fitted_on = None
            for name, value in found.hyper_parameters.items():
                setattr(self, name, value)
        except BaseException:  # a prior of another shape, say
            vars(self).clear()
            vars(self).update(before)
            raise


@public_call
def save(self: Shell, path: PathLike) -> None:
    """Write the posterior with all its options to a file; the model is saved by its owner.

    The file holds tensors and plain values only. It is written beside ``path`` first and then
    renamed: a crash leaves the old file or the new one. Of several processes rank 0 writes, and
    nobody waits: all may call this, or rank 0 alone.

    Args:
        self: a posterior.
        path: where to.

    Raises:
        NotFittedError: before ``fit``.
        TypeError: if ``path`` is no path, or an option is neither a tensor nor a plain value.
        OSError: as the file system says; an earlier file is then as it was.
    """
    arguments = {name: _plain(name, value) for name, value in constructor_arguments(self).items()}
    payload = {"posterior": type(self).__name__, "arguments": arguments, "state": self.state_dict()}
    if Ranks.present(self._target.device).is_first:
        with uninterrupted():  # torch's writer, cut off, may end the process when it is collected
            write_record(path, KIND, FORMAT_VERSION, payload)


def reduced(self: Shell) -> tuple[Any, ...]:
    """How a posterior is copied and pickled."""
    kind, model, arguments = type(self), self._target.model, constructor_arguments(self)
    if self._fit is not None:
        return rebuilt, (kind, model, arguments, self.state_dict())
    start = {n: getattr(self, n) for n in ("prior_precision", "prior_mean", "sigma_noise")}
    return unfitted, (kind, model, start | arguments)


def constructor_arguments(self: Shell) -> dict[str, Any]:
    """Arguments that construct this posterior's like; what a state holds is not among them."""
    arguments, target = self._arguments, self._target
    backend, options = arguments.backend, arguments.options
    given = {
        "likelihood": arguments.likelihood,
        "dict_key_x": arguments.dict_key_x,
        "dict_key_y": arguments.dict_key_y,
        "strict": arguments.strict,
        "rank": arguments.rank,
        "n_outputs": arguments.n_outputs,
        "ignore_index": arguments.ignore_index,
        "allow_probabilities": arguments.allow_probabilities,
        "sigma_noise": RESIDUAL if arguments.residual_noise else None,
        **{option.name: getattr(options, option.name) for option in fields(options)},
        "scheme": arguments.scheme,
    }
    if backend is not None:
        given["backend"] = backend.kind
        given["backend_kwargs"] = dict(backend.kwargs) or None
        given["asdl_fisher_kwargs"] = dict(backend.kron_kwargs) or None
    if target.last_layer is not None:
        given["feature_reduction"] = target.last_layer.reduction
        given["last_layer_name"] = target.last_layer.name
    left_out = {"pool_size", "n_outputs", "columns"}  # None is a choice there
    kept = {k: v for k, v in given.items() if v is not None or k in left_out}
    return kept | {"temperature": self.temperature, "enable_backprop": self.enable_backprop}


def read_posterior(
    path: PathLike, map_location: torch.device | str | None, kind: str | None = None
) -> dict[str, Any]:
    """Read the record of a posterior.

    Args:
        path: the file.
        map_location: where its tensors are placed first.
        kind: name of the class that it must hold, or None for any.

    Raises:
        TypeError, FileNotFoundError, StoredFileError: as ``read_record``.
        StoredFileError: if it holds another class.
    """
    record = read_record(path, KIND, FORMAT_VERSION, map_location)
    missing = {"posterior", "arguments", "state"} - set(record)
    if missing:
        raise StoredFileError(f"{path} has no {sorted(missing)[0]!r}; save the posterior again.")
    found = record["posterior"]
    if kind not in (None, found):
        raise StoredFileError(
            f"{path} holds a {found}, not a {kind}; read it with {found}.load, or with "
            "DebiasedLaplace.load, which reads any."
        )
    return record


def restored(
    kind: type[Kind], record: Mapping[str, Any], model: nn.Module, *, check_weights: bool = True
) -> Kind:
    """A posterior of a class from its record.

    Raises:
        ValueError: if the model is not the one that the record was made with.
    """
    arguments = _without_retired(record["arguments"])
    if "backend" in arguments:
        arguments["backend"] = _backend_named(arguments["backend"])
    return rebuilt(kind, model, arguments, record["state"], check_weights=check_weights)


def _without_retired(arguments: Mapping[str, Any]) -> dict[str, Any]:
    """Stored arguments without those options that are no more.

    Raises:
        StoredFileError: naming one that held another value than its old default.
    """
    kept = dict(arguments)
    for name, default in RETIRED.items():
        value = kept.pop(name, default)
        if value != default:
            raise StoredFileError(
                f"the posterior was made with {name}={value!r}, an option that this version no "
                "longer has: fit it anew, or read it with the version that wrote it."
            )
    if kept.get("magnitudes") == "rayleigh_ritz":
        raise StoredFileError(
            "the posterior was made with magnitudes='rayleigh_ritz', which this version no longer "
            "has: fit it anew, or read it with the version that wrote it."
        )
    return kept


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
    with substituted(_trainable(plain_network(model), state.get("covered", ()))):
        posterior = construct(model, **{**arguments, "strict": False})
        posterior.load_state_dict(state, check_weights=check_weights)
    posterior._arguments = replace(posterior._arguments, strict=arguments.get("strict", False))
    return posterior


def unfitted(kind: Callable[..., Kind], model: nn.Module, arguments: Mapping[str, Any]) -> Kind:
    """A posterior of a class before its fit."""
    return kind(model, **arguments)


def _trainable(model: nn.Module, names: Any) -> dict[Tensor, Tensor]:
    """Stand-ins that require gradients for those of the named parameters that do not."""
    named = dict(model.named_parameters())
    frozen = (named[name] for name in names if name in named and not named[name].requires_grad)
    return {parameter: parameter.detach().requires_grad_() for parameter in frozen}


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
