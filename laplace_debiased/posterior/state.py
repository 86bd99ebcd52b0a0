"""A posterior as tensors and plain values, and back: functions of a fit and hyper-parameters."""

from __future__ import annotations

import math
import re
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from types import MappingProxyType
from typing import Any

import torch
from laplace.utils.enums import LinkApprox
from torch import Tensor, nn

from laplace_debiased.checks import checked_flag
from laplace_debiased.curvature import Coverage
from laplace_debiased.estimation import Fit, Structure, Target
from laplace_debiased.network.identity import ModelFingerprint, fingerprint
from laplace_debiased.network.inputs import map_tensors
from laplace_debiased.network.memory import is_out_of_memory
from laplace_debiased.network.probe import Probe
from laplace_debiased.network.rng import preserved_rng
from laplace_debiased.network.wrappers import INSIDE
from laplace_debiased.options import Scheme, parse_choice
from laplace_debiased.tuning import TuningResult

STATE_VERSION = 5
"""1: no fingerprint of the model, no tuning result, blocks as lists. 2: comparisons as tables, and
factors as matrices. 3: factors of few rows as these rows. 4: matrices whole. 5: as below."""

HYPER_PARAMETERS = (
    "mean",
    "loss",
    "prior_mean",
    "prior_precision",
    "sigma_noise",
    "temperature",
    "enable_backprop",
    "tuned_link_approx",
    "tuning_result",
)
"""Attributes of a posterior that a state holds beside its fit."""


def to_state(fit: Fit, structure: Structure, owner: Mapping[str, Any]) -> dict[str, Any]:
    """A posterior's state; laplace-torch's own entries are among them.

    Args:
        fit: the fitted curvature.
        structure: what it is of.
        owner: name of the posterior's class, its likelihood and its hyper-parameters.
    """
    plain = {name: _plain(value) for name, value in owner.items()}
    last_layer = {} if fit.last_layer is None else {"last_layer_name": fit.last_layer}
    return {
        "version": STATE_VERSION,
        **plain,
        "n_data": fit.n_data,
        "n_outputs": fit.n_outputs,
        "covered": list(fit.coverage.covered),
        "excluded": dict(fit.coverage.excluded),
        "general": sorted(fit.coverage.general),
        "model": fit.model.to_state(),
        "modules": fit.model.modules,
        "probe": _probe_to_state(fit.probe),
        "mean_loss": fit.mean_loss,
        "n_samples": fit.n_samples,
        "effective_samples": fit.effective_samples,
        "scheme": fit.scheme.value,
        "drawn": sorted(fit.drawn),
        **structure.to_state(fit),
        **last_layer,
    }


def _probe_to_state(probe: Probe | None) -> list[Any] | None:
    """The sample that was made up, and its outputs."""
    kept = None if probe is None else probe.for_file
    return None if kept is None else map_tensors(Tensor.clone, [kept.inputs, kept.outputs])


def _plain(value: Any) -> Any:
    match value:
        case Tensor():
            return value.detach().clone()
        case LinkApprox():
            return value.value
        case TuningResult():
            return {k: list(v) if isinstance(v, tuple) else v for k, v in asdict(value).items()}
    return value


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 1


def _is_finite(value: Any) -> bool:
    if isinstance(value, Tensor):
        if value.is_meta or value.layout is not torch.strided:
            return False
        return not value.is_complex() and bool(torch.isfinite(value).all())
    return isinstance(value, int | float) and math.isfinite(value)


def _is_number(value: Any) -> bool:
    return _is_finite(value) and (not isinstance(value, Tensor) or value.numel() == 1)


_VECTOR = "a finite tensor", lambda value: isinstance(value, Tensor) and _is_finite(value)
_COUNT = "a positive integer", _is_count
_ENTRIES: dict[str, tuple[str, Callable[[Any], bool]]] = {
    "version": _COUNT,
    "mean": ("a finite vector", lambda value: _VECTOR[1](value) and value.ndim == 1),
    **dict.fromkeys(("prior_mean", "prior_precision", "sigma_noise"), _VECTOR),
    **dict.fromkeys(("n_data", "n_outputs", "n_samples"), _COUNT),
    **dict.fromkeys(("mean_loss", "loss"), ("a finite number", _is_number)),
    "covered": (
        "a list of names",
        lambda value: isinstance(value, list) and all(isinstance(name, str) for name in value),
    ),
    "excluded": ("a mapping", lambda value: isinstance(value, Mapping)),
    "drawn": ("a list", lambda value: isinstance(value, list | tuple | set | frozenset | Tensor)),
    "tuned_link_approx": (
        "a link",
        lambda value: value is None or value in [link.value for link in LinkApprox],
    ),
    "probe": (
        "inputs and outputs",
        lambda value: (
            value is None
            or (isinstance(value, list) and len(value) == 2 and isinstance(value[1], Tensor))
        ),
    ),
    "modules": ("a list", lambda value: value is None or isinstance(value, list)),
    "tuning_result": ("a mapping", lambda value: value is None or isinstance(value, Mapping)),
    "temperature": (
        "a positive number",
        lambda value: isinstance(value, int | float) and _is_finite(value) and value > 0,
    ),
    "enable_backprop": ("True or False", lambda value: isinstance(value, bool)),
    "effective_samples": ("a number", lambda value: value is None or _is_finite(value)),
}
"""What the entries of a state must be, where they are there."""


@dataclass(frozen=True, eq=False)
class Restored:
    """What a state holds.

    Attributes:
        fit: the fitted curvature.
        model: fingerprint of the model as it is now.
        hyper_parameters: by name; see :data:`HYPER_PARAMETERS`.
    """

    fit: Fit
    model: ModelFingerprint
    hyper_parameters: Mapping[str, Any]


def from_state(
    state: Mapping[str, Any],
    structure: Structure,
    target: Target,
    kind: str,
    likelihood: str,
    *,
    check_weights: bool = True,
) -> Restored:
    """Read a state for a posterior with its model; nothing is changed.

    A state of version 1 does not say which model it belongs to: it is taken to be this one, with
    a warning.

    Args:
        state: the state.
        structure: of the posterior.
        target: the model, and which of its weights.
        kind: name of the posterior's class.
        likelihood: of the posterior.
        check_weights: whether the model's weights must be those of the fit, or only its names and
            shapes. The model as it is now is then the one to be watched.

    Raises:
        ValueError: naming the entry that does not fit, or what the model has differently.
    """
    checked_flag("check_weights", check_weights)
    _check_entries(state, kind, likelihood)
    with _explained():
        state = _without_wrappers(state, target.model)
        return _restored(state, structure, target, check_weights=check_weights)


def _without_wrappers(state: Mapping[str, Any], model: nn.Module) -> Mapping[str, Any]:
    """A state with the names that the network has by itself.

    Up to version 5 a network in ``torch.compile`` or ``DataParallel`` has the wrapper's names.

    Args:
        state: of a posterior.
        model: the network without a wrapper.
    """
    known = [name for name, _ in model.named_parameters()]
    names = [*state["covered"], *state["excluded"], *state.get("model", ())]
    for inside in INSIDE:
        prefix = f"{inside}."
        if all(n.startswith(prefix) for n in names) and not known[0].startswith(prefix):
            return _without_wrappers(_renamed(state, inside), model)
    return state


def _renamed(state: Mapping[str, Any], inside: str) -> dict[str, Any]:
    """The state of what a wrapper holds under a name."""

    def own(name: str) -> str:
        return name.removeprefix(inside).removeprefix(".")

    new = dict(state)
    for key in ("covered", "general"):
        new[key] = [own(name) for name in state.get(key, ())]
    for key in ("excluded", "model"):
        if key in state:
            new[key] = {own(name): value for name, value in state[key].items()}
    if state.get("modules") is not None:
        new["modules"] = [own(line) for line in state["modules"] if line.startswith(inside)]
    if "last_layer_name" in state:
        new["last_layer_name"] = own(state["last_layer_name"])
    return new


@contextmanager
def _explained() -> Iterator[None]:
    """Say of what is edited or damaged that it is.

    Raises:
        ValueError: in place of what Python or torch raised.
    """
    try:
        yield
    except (TypeError, AttributeError, LookupError, RuntimeError, ValueError) as error:
        own = isinstance(error, ValueError) and not _is_of_python(error)
        if own or is_out_of_memory(error):
            raise
        raise ValueError(
            f"the state is damaged or was edited ({type(error).__name__}: {error}); save the "
            "posterior again."
        ) from error


_UNEQUAL = re.compile(r"zip\(\)|values to unpack|can be converted to Python scalars")
"""What Python and torch call entries of other lengths than expected."""


def _is_of_python(error: ValueError) -> bool:
    return _UNEQUAL.search(str(error)) is not None


def _restored(
    state: Mapping[str, Any], structure: Structure, target: Target, *, check_weights: bool
) -> Restored:
    last_layer = _checked_last_layer(state, target)
    _check_parameters(state, target)
    curvature, comparisons = structure.from_state(state, target.device)
    present = fingerprint(target.model)
    stored = _stored_fingerprint(state, present, check_weights=check_weights)
    probe = _checked_probe(state, target.model) if check_weights else None
    names = tuple(state["covered"])
    sizes = {name: p.numel() for name, p in target.model.named_parameters()}
    excluded = MappingProxyType(dict(state["excluded"]))
    fit = Fit(
        curvature,
        comparisons,
        float(state["mean_loss"]),
        int(state["n_outputs"]),
        int(state["n_samples"]),
        int(state["n_data"]),
        parse_choice(Scheme, state["scheme"], "scheme"),
        Coverage(names, excluded, MappingProxyType(sizes), frozenset(state.get("general", ()))),
        frozenset(state["drawn"]),
        stored,
        state.get("effective_samples"),
        last_layer,
        probe=probe,
    )
    return Restored(fit, present, _hyper_parameters(state, target))


def _check_entries(state: Mapping[str, Any], kind: str, likelihood: str) -> None:
    missing = {"cls_name", "mean", "likelihood", "covered", "version"} - set(state)
    if missing:
        raise ValueError(
            f"the state has no {sorted(missing)[0]!r}; it is not a debiased posterior's."
        )
    if state["cls_name"] != kind:
        raise ValueError(
            f"the state belongs to a {state['cls_name']}, not to a {kind}; check "
            "subset_of_weights and hessian_structure."
        )
    if not isinstance(state["version"], int) or state["version"] > STATE_VERSION:
        raise ValueError(
            f"the state has version {state['version']}, newer than {STATE_VERSION}; upgrade "
            "laplace-debiased."
        )
    if state["likelihood"] != likelihood:
        raise ValueError(
            f"the state is for likelihood={state['likelihood']!r}, not {likelihood!r}."
        )
    for name, (wanted, holds) in _ENTRIES.items():
        if name in state and not holds(state[name]):
            raise ValueError(
                f"the state's {name!r} must be {wanted}; got {str(state[name])[:40]!r}. It is "
                "damaged or was edited; save the posterior again."
            )


def _checked_last_layer(state: Mapping[str, Any], target: Target) -> str | None:
    if target.last_layer is None:
        return None
    name = state.get("last_layer_name")
    modules = dict(target.model.named_modules())
    if not isinstance(modules.get(str(name)), torch.nn.Linear):
        raise ValueError(f"the model has no linear layer {name!r}, which the state covers.")
    if target.last_layer.name not in (None, name):
        raise ValueError(
            f"the state is for the last layer {name!r}, this posterior for "
            f"{target.last_layer.name!r}."
        )
    return str(name)


def _check_parameters(state: Mapping[str, Any], target: Target) -> None:
    known = dict(target.model.named_parameters())
    unknown = [name for name in state["covered"] if name not in known]
    if unknown:
        raise ValueError(f"the model has no parameter {unknown[0]!r}, which the state covers.")
    size = sum(known[name].numel() for name in state["covered"])
    if len(state["mean"]) != size:
        raise ValueError(
            f"the state covers {len(state['mean'])} parameter entries; the model has {size} there."
        )


def _stored_fingerprint(
    state: Mapping[str, Any], present: ModelFingerprint, *, check_weights: bool
) -> ModelFingerprint:
    """Fingerprint of the model at the fit, which must be that of the present one."""
    if "model" not in state:
        warnings.warn(
            "this state was made by an early version, which did not record its model: whether the "
            "weights are the right ones cannot be checked. Save it again to record them.",
            UserWarning,
            stacklevel=6,
        )
        return present
    stored = ModelFingerprint.from_state(state["model"], state.get("modules"))
    _refuse(stored.differences(present, values=check_weights))
    return present


def _checked_probe(state: Mapping[str, Any], model: nn.Module) -> Probe | None:
    """The sample that a state holds, for which the model must give what it gave at the fit."""
    if state.get("probe") is None:
        return None
    inputs, outputs = state["probe"]
    probe = Probe(inputs, outputs, is_made_up=True)
    with preserved_rng():
        change = probe.change(model)
    _refuse(() if change is None else (change,))
    return probe


def _refuse(changes: tuple[str, ...]) -> None:
    if not changes:
        return
    more = f" and {len(changes) - 3} more" if len(changes) > 3 else ""
    raise ValueError(
        "the state belongs to another model or to other weights: "
        f"{', '.join(changes[:3])}{more}. Load the weights that the posterior was fitted with "
        "first (model.load_state_dict), or pass check_weights=False if they are equal but for "
        "a cast."
    )


def _hyper_parameters(state: Mapping[str, Any], target: Target) -> dict[str, Any]:
    tensors = ("mean", "prior_mean", "prior_precision", "sigma_noise")
    link, tuning = state["tuned_link_approx"], state.get("tuning_result")
    return {
        **{name: state[name].to(target.device, target.dtype) for name in tensors},
        **{name: state[name] for name in ("loss", "temperature", "enable_backprop")},
        "tuned_link_approx": None if link is None else LinkApprox(link),
        "tuning_result": None if tuning is None else _tuning_from_state(tuning),
    }


def _tuning_from_state(state: Mapping[str, Any]) -> TuningResult:
    values: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in state.items()}
    return TuningResult(**values)
