"""Which parameters carry a posterior, which do not, and why."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from types import MappingProxyType

from torch import nn
from torch.nn.utils.parametrize import is_parametrized

from laplace_debiased.errors import CoverageError

FROZEN = "frozen by the user (requires_grad=False)"
TIED = "shared by several modules (tied weights)"
UNUSED = (
    "no operation on it affects the outputs: its module is not called, or runs in compiled code"
)
NOT_LAST = "not in the last layer"
_CHOSEN = (FROZEN, NOT_LAST)
"""Reasons that the user chose, which are no gaps."""


@dataclass(frozen=True)
class Coverage:
    """Which parameters of a model carry a posterior.

    Attributes:
        covered: names of the covered parameters, in the order of ``model.parameters()``.
        excluded: reason by name for every other parameter; these stay fixed at the MAP estimate.
        sizes: number of entries by parameter name.
        general: covered parameters whose operations have no rule: their gradients are formed
            sample by sample with ``torch.func``.
    """

    covered: tuple[str, ...]
    excluded: Mapping[str, str]
    sizes: Mapping[str, int]
    general: frozenset[str] = frozenset()

    @property
    def n_covered(self) -> int:
        """Number of covered parameter entries."""
        return sum(self.sizes[name] for name in self.covered)

    @property
    def n_excluded(self) -> int:
        """Number of parameter entries that are left out, those that the user froze included."""
        return sum(self.sizes[name] for name in self.excluded)

    @property
    def share(self) -> float:
        """Share of all parameter entries that is covered, in [0, 1]."""
        total = self.n_covered + self.n_excluded
        return self.n_covered / total if total else 0.0

    @property
    def gaps(self) -> Mapping[str, str]:
        """Excluded parameters that the user did not choose to leave out."""
        return {name: why for name, why in self.excluded.items() if why not in _CHOSEN}

    def without(self, reasons: Mapping[str, str]) -> Coverage:
        """The same coverage with further parameters left out."""
        return replace(
            self,
            covered=tuple(name for name in self.covered if name not in reasons),
            excluded=MappingProxyType({**self.excluded, **reasons}),
            general=self.general - reasons.keys(),
        )

    def require(self, *, strict: bool) -> None:
        """Check that something is covered, and under ``strict`` everything that is trainable.

        Raises:
            CoverageError: if not; the message names the parameters and the reasons.
        """
        if strict and self.gaps:
            raise CoverageError(
                "strict=True, but these parameters cannot carry a posterior:\n"
                + _lines(self.gaps)
                + "\nFreeze them with requires_grad_(False), or leave strict=False to fix them at "
                "their trained values."
            )
        if not self.covered:
            raise CoverageError(
                "no parameter of the model can carry a posterior:\n"
                + (_lines(self.excluded) or "  it has none; weights of quantised layers are none")
            )

    def low_share(self) -> str | None:
        """What to say where less than half of the trainable entries is covered; else None."""
        chosen = sum(self.sizes[n] for n, why in self.excluded.items() if why in _CHOSEN)
        trainable = self.n_covered + self.n_excluded - chosen
        if not trainable or self.n_covered >= trainable / 2:
            return None
        entries: dict[str, int] = {}
        for name, why in self.gaps.items():
            entries[why] = entries.get(why, 0) + self.sizes[name]
        most = sorted(entries, key=lambda why: -entries[why])[:2]
        reasons = "; ".join(f"{entries[why]:,} entries: {why}" for why in most)
        return (
            f"only {self.n_covered:,} of {trainable:,} trainable parameter entries "
            f"({100 * self.n_covered / trainable:.0f} %) carry a posterior; the rest stays at its "
            f"trained values. The commonest reasons: {reasons}. What covers more: "
            "laplace_debiased.curvature.register_operation_rule for an operation of yours, "
            "hessian_structure='lowrank' for any network, subset_of_weights='last_layer'. "
            "print(la.coverage) names all parameters."
        )

    def table(self, *, whole: bool = False) -> str:
        """As a table that a person can read.

        Args:
            whole: one row per parameter; else one per outermost module and reason, unless there
                are few parameters.
        """
        head = (
            f"{self.n_covered:,} of {self.n_covered + self.n_excluded:,} parameter entries "
            f"({100 * self.share:.1f} %) carry a posterior."
        )
        answers = [*((name, "covered") for name in self.covered), *self.excluded.items()]
        if whole or len(answers) <= _WHOLE:
            rows = [f"  {name:<40} {self.sizes[name]:>12,}  {why}" for name, why in answers]
            return "\n".join([head, *rows])
        groups: dict[tuple[str, str], list[str]] = {}
        for name, why in answers:
            groups.setdefault((_module_of(name), why), []).append(name)
        width = max(len(module) for module, _ in groups)
        rows = []
        for (module, why), names in groups.items():
            entries = sum(self.sizes[name] for name in names)
            rows.append(f"  {module:<{width}} {len(names):>5} tensors {entries:>14,}  {why}")
        return "\n".join([head, *rows, "  (coverage.table(whole=True) names every parameter)"])

    def __str__(self) -> str:
        return self.table()


_WHOLE = 24
"""Parameters up to which a table has a row for each."""


def _module_of(name: str) -> str:
    """The outer modules that a parameter sits in: two names, or more where they are numbers."""
    parts = name.split(".")[:-1]
    kept = [part for part in parts if not part.isdigit()][:2]
    return ".".join(kept) if kept else ".".join(parts[:1]) or name


def _lines(reasons: Mapping[str, str]) -> str:
    return "\n".join(f"  {name}: {why}" for name, why in reasons.items())


def _without(model: nn.Module, excluded: Mapping[str, str]) -> Coverage:
    sizes = {name: parameter.numel() for name, parameter in model.named_parameters()}
    covered = tuple(name for name in sizes if name not in excluded)
    reasons = {name: excluded[name] for name in sizes if name in excluded}
    return Coverage(covered, MappingProxyType(reasons), MappingProxyType(sizes))


def _frozen(model: nn.Module) -> dict[str, str]:
    return {name: FROZEN for name, p in model.named_parameters() if not p.requires_grad}


def parameter_coverage(model: nn.Module) -> Coverage:
    """Cover every parameter that requires gradients, whatever its layer; tied ones once."""
    return _without(model, _frozen(model))


def operation_coverage(model: nn.Module) -> Coverage:
    """Which parameters a Kronecker posterior may cover, as far as no forward pass has shown more.

    What a forward pass does with them decides (see ``inspection``); parameters of a
    parametrisation are known to be none of the layer's own.
    """
    named = dict(model.named_parameters())
    excluded = {
        name: f"its dtype is {p.dtype}" for name, p in named.items() if not p.is_floating_point()
    }
    excluded |= parametrisations(model)
    return _without(model, excluded | _frozen(model))


def parametrisations(model: nn.Module) -> dict[str, str]:
    """Reasons, by name, of parameters that a weight is computed from."""
    found = {}
    for module_name, module in model.named_modules():
        prefix = f"{module_name}." if module_name else ""
        kind = type(module).__name__.removeprefix("Parametrized")
        if is_parametrized(module):
            for attribute, chain in module.parametrizations.items():
                names = ", ".join(type(step).__name__.lstrip("_") for step in chain)
                for name, _ in chain.named_parameters():
                    key = f"{prefix}parametrizations.{attribute}.{name}"
                    found[key] = f"{kind}.{attribute} is re-parametrised by {names}"
        for hook in module._forward_pre_hooks.values():
            attribute = getattr(hook, "name", None)
            if type(hook).__name__ in ("WeightNorm", "SpectralNorm") and attribute:
                for ending in ("_g", "_v", "_orig"):
                    found[f"{prefix}{attribute}{ending}"] = (
                        f"{kind}.{attribute} is re-parametrised by {type(hook).__name__}"
                    )
    return found


@dataclass(frozen=True, eq=False)
class Layer:
    """A layer by name, with those of its parameters that are covered.

    Attributes:
        name: its qualified name.
        module: the layer.
        weight: name of its weight, if that is covered.
        bias: name of its bias, if that is covered.
    """

    name: str
    module: nn.Module
    weight: str | None = None
    bias: str | None = None


def host_coverage(model: nn.Module) -> tuple[Coverage, tuple[Layer, ...]]:
    """Which parameters laplace-torch's own backends get right, and the layers that own them.

    Linear layers, and 2-d convolutions without groups, whose weights belong to no other layer.
    """
    owners: dict[int, list[tuple[str, nn.Module, str]]] = {}
    for module_name, module in model.named_modules():
        for attribute, parameter in module.named_parameters(recurse=False, remove_duplicate=False):
            owners.setdefault(id(parameter), []).append((module_name, module, attribute))
    excluded: dict[str, str] = {}
    layers: dict[str, Layer] = {}
    for name, parameter in model.named_parameters():
        (module_name, module, attribute), *others = owners[id(parameter)]
        reason = TIED if others else _host_exclusion(module, attribute)
        if reason is not None:
            excluded[name] = reason
        elif parameter.requires_grad:
            layer = layers.get(module_name, Layer(module_name, module))
            is_weight = attribute == "weight"
            layer = replace(layer, weight=name) if is_weight else replace(layer, bias=name)
            layers[module_name] = layer
    return _without(model, excluded | _frozen(model)), tuple(layers.values())


def _host_exclusion(module: nn.Module, attribute: str) -> str | None:
    kind = type(module).__name__
    for supported in (nn.Linear, nn.Conv2d):
        if isinstance(module, supported) and type(module).forward is supported.forward:
            if getattr(module, "groups", 1) > 1:
                return f"{kind} with groups is not supported by the backend"
            if attribute in ("weight", "bias") and isinstance(module.weight, nn.Parameter):
                return None
            return f"{kind}.{attribute} is not supported by the backend"
    return f"{kind} layers are not supported by the backend"
