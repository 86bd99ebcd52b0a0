"""A posterior as tensors and plain values, and back."""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, replace
from types import MappingProxyType
from typing import Any

import torch
from laplace.utils.enums import LinkApprox
from torch import Tensor, nn

from laplace_debiased.checks import checked_flag
from laplace_debiased.curvature import Coverage
from laplace_debiased.debiasing.bias import Comparison
from laplace_debiased.estimation.structure import Fit
from laplace_debiased.estimation.target import Target
from laplace_debiased.network.identity import ModelFingerprint, fingerprint
from laplace_debiased.network.inputs import map_tensors, tensors_of
from laplace_debiased.network.memory import is_out_of_memory
from laplace_debiased.network.probe import Probe
from laplace_debiased.network.rng import preserved_rng
from laplace_debiased.network.wrappers import INSIDE
from laplace_debiased.options import Scheme, parse_choice
from laplace_debiased.posterior.shell import Shell
from laplace_debiased.tuning import TuningResult

STATE_VERSION = 6
"""1: no fingerprint of the model, no tuning result, blocks as lists. 2: comparisons as tables, and
factors as matrices. 3: factors of few rows as these rows. 4: matrices whole. 5: as below, nested.
6: flat where it is handed out, see :func:`~laplace_debiased.files.flattened`."""

_TENSORS = "mean", "prior_mean", "prior_precision", "sigma_noise"
_VALUES = "loss", "temperature", "enable_backprop"


def _as_it_is(value: Any) -> Tensor:
    """A value as a tensor of its own; ``as_tensor`` would move one to torch's default device."""
    return (value if isinstance(value, Tensor) else torch.as_tensor(value)).detach().clone()


def to_state(self: Shell) -> dict[str, Any]:
    """All of a fitted posterior beside its model and its options, in nested containers."""
    fit, link, tuning = self.fitted, self.tuned_link_approx, self.tuning_result
    probe = None if fit.probe is None else fit.probe.for_file
    last_layer = {} if fit.last_layer is None else {"last_layer_name": fit.last_layer}
    return {
        "version": STATE_VERSION,
        "cls_name": type(self).__name__,
        "likelihood": self.likelihood,
        **{name: _as_it_is(getattr(self, name)) for name in _TENSORS},
        **{name: getattr(self, name) for name in _VALUES},
        "tuned_link_approx": None if link is None else link.value,
        "tuning_result": None if tuning is None else asdict(tuning),
        "n_data": fit.n_data,
        "n_outputs": fit.n_outputs,
        "covered": list(fit.coverage.covered),
        "excluded": dict(fit.coverage.excluded),
        "general": sorted(fit.coverage.general),
        "model": dict(fit.model.entries),
        "modules": fit.model.modules,
        "probe": probe and map_tensors(Tensor.clone, [probe.inputs, probe.outputs]),
        "mean_loss": fit.mean_loss,
        "n_samples": fit.n_samples,
        "effective_samples": fit.effective_samples,
        "scheme": fit.scheme.value,
        "drawn": sorted(fit.drawn),
        "comparisons": [comparison.to_state() for comparison in fit.comparisons],
        **self._structure.to_state(fit),
        **last_layer,
    }


_NOTHING = type(None)
_KINDS: dict[str, tuple[type, ...]] = {
    "version": (int,),
    "likelihood": (str,),
    **dict.fromkeys(_TENSORS, (Tensor,)),
    **dict.fromkeys(("n_data", "n_outputs", "n_samples"), (int,)),
    **dict.fromkeys(("mean_loss", "loss", "temperature"), (float, int)),
    "enable_backprop": (bool,),
    "effective_samples": (float, int, _NOTHING),
    "covered": (list,),
    "drawn": (list,),
    "excluded": (dict,),
    "tuning_result": (dict, _NOTHING),
    "probe": (list, _NOTHING),
    "modules": (list, _NOTHING),
}
"""What the entries of a state must be, where they are there."""


def from_state(
    self: Shell, state: Mapping[str, Any], *, check_weights: bool
) -> tuple[Fit, dict[str, Any]]:
    """Read a state for a posterior with its model; nothing is changed.

    A state of version 1 does not say which model it belongs to: it is taken to be this one, with
    a warning.

    With ``check_weights`` the model's weights must be those of the fit, else its names and shapes.
    Returned are the fit, as of the model as it is now, and the hyper-parameters by name.

    Raises:
        ValueError: naming the entry that does not fit, or what the model has differently.
    """
    checked_flag("check_weights", check_weights)
    _check_entries(self, state)
    model = self._target.model
    present = fingerprint(model)
    with edits_explained():
        fit, hyper_parameters = _parsed(self, _without_wrappers(state, model), present)
    _check_parameters(fit, self._target, len(hyper_parameters["mean"]))
    changes = fit.model.differences(present, values=check_weights)
    if not changes and check_weights and fit.probe is not None:
        with preserved_rng():
            changes = tuple(filter(None, [fit.probe.change(model)]))
    if changes:
        more = f" and {len(changes) - 3} more" if len(changes) > 3 else ""
        raise ValueError(
            "the state belongs to another model or to other weights: "
            f"{', '.join(changes[:3])}{more}. Load the weights that the posterior was fitted with "
            "first (model.load_state_dict), or pass check_weights=False if they are equal but for "
            "a cast."
        )
    if "model" not in state:
        warnings.warn(
            "this state was made by an early version, which did not record its model: whether the "
            "weights are the right ones cannot be checked. Save it again to record them.",
            UserWarning,
            stacklevel=4,
        )
    probe = fit.probe if check_weights else None
    return replace(fit, model=present, probe=probe), hyper_parameters


@contextmanager
def edits_explained() -> Iterator[None]:
    """Say of what Python or torch raise on entries that do not fit each other where it comes from.

    Raises:
        ValueError: in place of it.
    """
    try:
        yield
    except (TypeError, AttributeError, LookupError, RuntimeError, ValueError, AssertionError) as e:
        if is_out_of_memory(e):
            raise
        raise ValueError(
            f"the state is damaged or was edited ({type(e).__name__}: {e}); save the posterior "
            "again."
        ) from e


def _check_entries(self: Shell, state: Mapping[str, Any]) -> None:
    for name in ("cls_name", "covered", "likelihood", "mean", "version"):
        if name not in state:
            raise ValueError(f"the state has no {name!r}; it is not a debiased posterior's.")
    if str(state["cls_name"]) != type(self).__name__:
        raise ValueError(
            f"the state belongs to a {state['cls_name']}, not to a {type(self).__name__}; check "
            "subset_of_weights and hessian_structure."
        )
    for name, kinds in _KINDS.items():
        if name in state and not (type(state[name]) in kinds and _is_sound(name, state[name])):
            wanted = " or ".join("None" if kind is _NOTHING else kind.__name__ for kind in kinds)
            raise ValueError(
                f"the state's {name!r} must be {wanted}, numbers finite and counts positive; got "
                f"{str(state[name])[:40]!r}. It is damaged or was edited; save the posterior again."
            )
    if state["version"] > STATE_VERSION:
        raise ValueError(
            f"the state has version {state['version']}, newer than {STATE_VERSION}; upgrade "
            "laplace-debiased."
        )
    if state["likelihood"] != self.likelihood:
        raise ValueError(
            f"the state is for likelihood={state['likelihood']!r}, not {self.likelihood!r}."
        )


def _is_sound(name: str, value: Any) -> bool:
    match value:
        case list() if name == "covered":
            return all(isinstance(parameter, str) for parameter in value)
        case Tensor():
            whole = not value.is_meta and value.layout is torch.strided and not value.is_complex()
            vector = name != "mean" or value.ndim == 1
            return whole and vector and bool(torch.isfinite(value).all())
        case bool():
            return True
        case int():
            return value > 0
        case float():
            return math.isfinite(value)
    return True


def _without_wrappers(state: Mapping[str, Any], model: nn.Module) -> Mapping[str, Any]:
    """A state with the names that the network has by itself.

    Up to version 5 a network in ``torch.compile`` or ``DataParallel`` has the wrapper's names.
    """
    known = next(name for name, _ in model.named_parameters())
    names = [*state["covered"], *state["excluded"], *state.get("model", ())]
    for inside in INSIDE:

        def own(value: Any, inside: str = inside) -> Any:
            match value:
                case str():
                    return value.removeprefix(inside).removeprefix(".")
                case dict():
                    return {own(name): entry for name, entry in value.items()}
                case list():
                    return [own(name) for name in value if not name.startswith("\t")]  # the wrapper
            return value

        if all(n.startswith(f"{inside}.") for n in names) and not known.startswith(f"{inside}."):
            return _without_wrappers(
                {k: own(v) if k in _NAMES else v for k, v in state.items()}, model
            )
    return state


_NAMES = "covered", "general", "excluded", "model", "modules", "last_layer_name"
"""Entries of a state that hold names of parameters and modules, or are by such names."""


def _parsed(
    self: Shell, state: Mapping[str, Any], present: ModelFingerprint
) -> tuple[Fit, dict[str, Any]]:
    """The fit and the hyper-parameters; whatever Python or torch raise means that it is edited."""
    target, probe, parts = self._target, state.get("probe"), enumerate(state["comparisons"])
    if any(t.is_meta or t.layout is not torch.strided for t in tensors_of(state)):
        raise ValueError("a tensor is sparse or holds no data.")
    if probe is not None and not probe[1].is_floating_point():
        raise ValueError("the outputs of 'probe' are no real numbers.")
    cast = _in_dtype(state, target.dtype)
    sizes = {name: p.numel() for name, p in target.model.named_parameters()}
    fit = Fit(
        self._structure.from_state(cast, target.device),
        tuple(Comparison.from_state(part, f"comparisons[{i}]") for i, part in parts),
        float(state["mean_loss"]),
        state["n_outputs"],
        state["n_samples"],
        state["n_data"],
        parse_choice(Scheme, state["scheme"], "scheme"),
        Coverage(
            tuple(state["covered"]),
            MappingProxyType(state["excluded"]),
            MappingProxyType(sizes),
            frozenset(state.get("general", ())),
        ),
        frozenset(state["drawn"]),
        ModelFingerprint.from_state(state["model"], state.get("modules"))
        if "model" in state
        else present,
        state.get("effective_samples"),
        None if target.last_layer is None else state["last_layer_name"],
        probe=None if probe is None else Probe(probe[0], probe[1].detach(), is_made_up=True),
    )
    link, tuning = state["tuned_link_approx"], state.get("tuning_result")
    return fit, {
        **{name: state[name].to(target.device, target.dtype) for name in _TENSORS},
        **{name: state[name] for name in _VALUES},
        "tuned_link_approx": None
        if link is None
        else parse_choice(LinkApprox, link, "tuned_link_approx"),
        "tuning_result": None if tuning is None else _tuning_of(tuning),
    }


def _in_dtype(state: Mapping[str, Any], dtype: torch.dtype) -> Mapping[str, Any]:
    """The state with its curvature in a posterior's dtype: the model may have been cast since."""
    if state["mean"].dtype == dtype:
        return state

    def cast(tensor: Tensor) -> Tensor:
        return tensor.to(dtype) if tensor.is_floating_point() else tensor

    curvature = {k: map_tensors(cast, state[k]) for k in ("H", "tables", "folds") if k in state}
    return {**state, **curvature}


def _tuning_of(state: Mapping[str, Any]) -> TuningResult:
    values: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in state.items()}
    return TuningResult(**values)


def _check_parameters(fit: Fit, target: Target, size: int) -> None:
    """Check that the network has the layer and the parameters that a fit is of."""
    name, known = fit.last_layer, dict(target.model.named_parameters())
    if target.last_layer is not None:
        if not isinstance(dict(target.model.named_modules()).get(str(name)), nn.Linear):
            raise ValueError(f"the model has no linear layer {name!r}, which the state covers.")
        if target.last_layer.name not in (None, name):
            raise ValueError(
                f"the state is for the last layer {name!r}, this posterior for "
                f"{target.last_layer.name!r}."
            )
    for parameter in fit.coverage.covered:
        if parameter not in known:
            raise ValueError(f"the model has no parameter {parameter!r}, which the state covers.")
    there = sum(known[parameter].numel() for parameter in fit.coverage.covered)
    if size != there:
        raise ValueError(f"the state covers {size} parameter entries; the model has {there} there.")
