"""A posterior with all its options as a file, and back."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from enum import Enum
from typing import Any, TypeVar

import torch
from laplace.curvature.curvature import CurvatureInterface
from torch import Tensor, nn

from laplace_debiased.errors import ArgumentTypeError, StoredFileError
from laplace_debiased.estimation.arguments import RESIDUAL
from laplace_debiased.files import PathLike, flattened, nested, read_record, write_record
from laplace_debiased.network.interrupts import uninterrupted
from laplace_debiased.network.modes import public_call
from laplace_debiased.network.substitution import substituted
from laplace_debiased.network.wrappers import plain_network
from laplace_debiased.parallel.ranks import Ranks
from laplace_debiased.posterior.shell import Shell
from laplace_debiased.posterior.state import edits_explained, from_state, to_state

_ARGUMENTS = (
    *("likelihood", "dict_key_x", "dict_key_y", "strict", "rank", "n_outputs", "ignore_index"),
    "allow_probabilities",
)

KIND = "laplace_debiased posterior"
FORMAT_VERSION = 2
"""Version of the file around a state; states count their own versions. 1: nested."""

Kind = TypeVar("Kind")

RETIRED = {"ratio_step": False, "weight_sharing": "expand"}
"""Options that files of earlier versions hold, with the one value that means what is done now."""


@public_call
def state_dict(self: Shell) -> dict[str, Any]:
    """Everything that a posterior needs beside its model: flat, of tensors and plain values only.

    ``mean``, ``loss``, ``prior_mean``, ``prior_precision``, ``sigma_noise``, ``n_data``,
    ``n_outputs``, ``likelihood``, ``temperature``, ``enable_backprop`` and ``cls_name`` are
    laplace-torch's. Of its ``H``, the curvature is kept as eigenbases: ``H[0]/output_basis`` of the
    first covered tensor, with its *per-sample mean* curvatures in ``tables[0]``; low rank: basis
    [P, k] in ``H[0]``, *per-sample mean* eigenvalues [k] in ``H[1]``. Keys of what is nested are
    those of :func:`~laplace_debiased.files.flattened`; its ``nested`` gives containers, which
    ``load_state_dict`` takes too.

    Raises:
        NotFittedError: before ``fit``.
        ValueError: if something that no prior can be was written into the prior precision.
    """
    self._check_H_init()
    self._checked_prior()
    return flattened(to_state(self))


@public_call
def load_state_dict(self: Shell, state_dict: dict[str, Any], *, check_weights: bool = True) -> None:
    """Restore :meth:`state_dict`, of this or an earlier version.

    Args:
        self: a posterior.
        state_dict: the state.
        check_weights: refuse a model with other weights; False checks names and shapes only.

    Raises:
        ValueError: if it belongs to another class, likelihood, model or set of parameters, or was
            edited. Nothing is changed then.
    """
    if not isinstance(state_dict, Mapping):
        raise ArgumentTypeError(
            f"state_dict must be what la.state_dict() gives; got {type(state_dict).__name__}."
        )
    fit, hyper_parameters = from_state(self, nested(state_dict), check_weights=check_weights)
    before = dict(vars(self))
    with uninterrupted(), edits_explained():
        try:
            self._adopt(fit)
            self._fitted_on = None
            for name in ("mean", "loss", "tuning_result"):  # no setters check these
                vars(self)[name] = hyper_parameters.pop(name)
            for name, value in hyper_parameters.items():
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
    payload = {"posterior": type(self).__name__, "arguments": arguments, "state": to_state(self)}
    if Ranks.present(self._target.device).is_first:
        with uninterrupted():  # torch's writer, cut off, may end the process when it is collected
            write_record(path, KIND, FORMAT_VERSION, flattened(payload))


def reduced(self: Shell) -> tuple[Any, ...]:
    """How a posterior is copied and pickled."""
    arguments, state = constructor_arguments(self), None
    if self._fit is not None:
        state = to_state(self)
    else:
        start = {n: getattr(self, n) for n in ("prior_precision", "prior_mean", "sigma_noise")}
        arguments = start | arguments
    return rebuilt, (type(self), self._target.model, arguments, state)


def constructor_arguments(self: Shell) -> dict[str, Any]:
    """Arguments that construct this posterior's like; what a state holds is not among them."""
    arguments, target = self._arguments, self._target
    backend, options = arguments.backend, arguments.options
    given = {
        **{name: getattr(arguments, name) for name in _ARGUMENTS},
        "sigma_noise": RESIDUAL if arguments.residual_noise else None,
        **vars(options),
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


def loaded(
    kinds: Iterable[type[Kind]],
    path: PathLike,
    model: nn.Module,
    map_location: torch.device | str | None,
    *,
    check_weights: bool,
) -> Kind:
    """A posterior of one of some classes from its file; see ``DebiasedLaplace.load``."""
    record = read_record(path, KIND, FORMAT_VERSION, map_location)
    try:
        record = nested(record)
    except ValueError as error:
        raise StoredFileError(f"{path}: {error}") from error
    for name, kind_of_entry in (("arguments", dict), ("posterior", str), ("state", dict)):
        if not isinstance(record.get(name), kind_of_entry):
            raise StoredFileError(f"{path} has no {name!r}; save the posterior again.")
    by_name, found = {kind.__name__: kind for kind in kinds}, record["posterior"]
    if found not in by_name:
        raise StoredFileError(
            f"{path} holds a {found}, not a {' or '.join(by_name)}; read it with {found}.load, or "
            "with DebiasedLaplace.load, which reads all of the library's own."
        )
    arguments = record["arguments"]
    retired = {name: arguments.pop(name, default) for name, default in RETIRED.items()}
    gone = {name: value for name, value in retired.items() if value != RETIRED[name]}
    if arguments.get("magnitudes") == "rayleigh_ritz":
        gone["magnitudes"] = "rayleigh_ritz"
    if gone:
        made_with = ", ".join(f"{name}={value!r}" for name, value in gone.items())
        raise StoredFileError(
            f"{path} was made with {made_with}, which this version no longer has: fit anew, "
            "or read it with the version that wrote it."
        )
    if "backend" in arguments:
        arguments["backend"] = _backend_named(arguments["backend"])
    return rebuilt(by_name[found], model, arguments, record["state"], check_weights=check_weights)


def rebuilt(
    kind: Callable[..., Kind],
    model: nn.Module,
    arguments: Mapping[str, Any],
    state: dict[str, Any] | None,
    *,
    check_weights: bool = True,
) -> Kind:
    """A posterior of a class from its arguments and its nested state; None before its fit."""
    if state is None:
        return kind(model, **arguments)
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module; got {type(model).__name__}.")
    # What is covered is the state's to say: a network may be frozen by the time it is served.
    named = dict(plain_network(model).named_parameters())
    frozen = [named[n] for n in state.get("covered", ()) if n in named]
    construct: Callable[..., Any] = kind
    with substituted({p: p.detach().requires_grad_() for p in frozen if not p.requires_grad}):
        posterior = construct(model, **{**arguments, "strict": False})
        posterior.load_state_dict(state, check_weights=check_weights)
    posterior._arguments = replace(posterior._arguments, strict=arguments.get("strict", False))
    return posterior


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
    for kind in pending:
        if f"{kind.__module__}.{kind.__qualname__}" == name:
            return kind
        pending += kind.__subclasses__()
    raise StoredFileError(
        f"the posterior was made with the curvature backend {name}, which is not known here: "
        "import the module that defines it first."
    )
