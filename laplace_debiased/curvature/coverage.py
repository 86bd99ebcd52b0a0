"""Which parameters carry a posterior, which do not, and why."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from types import MappingProxyType

from torch import nn

from laplace_debiased.curvature.layers import Layer, rule_for
from laplace_debiased.errors import CoverageError

FROZEN = "frozen by the user (requires_grad=False)"
TIED = "shared by several modules (tied weights)"
UNUSED = "its module was not called in the forward pass, or does not affect the outputs"
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
    """

    covered: tuple[str, ...]
    excluded: Mapping[str, str]
    sizes: Mapping[str, int]

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
        return Coverage(
            tuple(name for name in self.covered if name not in reasons),
            MappingProxyType({**self.excluded, **reasons}),
            self.sizes,
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
                "no parameter of the model can carry a posterior:\n" + _lines(self.excluded)
            )

    def __str__(self) -> str:
        head = (
            f"{self.n_covered} of {self.n_covered + self.n_excluded} parameter entries "
            f"({100 * self.share:.1f} %) carry a posterior."
        )
        rows = [f"  {name:<40} {self.sizes[name]:>10}  covered" for name in self.covered]
        rows += [
            f"  {name:<40} {self.sizes[name]:>10}  {why}" for name, why in self.excluded.items()
        ]
        return "\n".join([head, *rows])


def _lines(reasons: Mapping[str, str]) -> str:
    return "\n".join(f"  {name}: {why}" for name, why in reasons.items())


def _owners(model: nn.Module) -> dict[int, list[tuple[str, nn.Module, str]]]:
    """Where each parameter object sits: (module name, module, attribute) by ``id``."""
    owners: dict[int, list[tuple[str, nn.Module, str]]] = {}
    for module_name, module in model.named_modules():
        for attribute, parameter in module.named_parameters(recurse=False, remove_duplicate=False):
            owners.setdefault(id(parameter), []).append((module_name, module, attribute))
    return owners


def parameter_coverage(model: nn.Module) -> Coverage:
    """Cover every parameter that requires gradients, whatever its layer; tied ones once."""
    named = dict(model.named_parameters())
    return Coverage(
        tuple(name for name, p in named.items() if p.requires_grad),
        MappingProxyType({name: FROZEN for name, p in named.items() if not p.requires_grad}),
        MappingProxyType({name: p.numel() for name, p in named.items()}),
    )


def layer_coverage(
    model: nn.Module, *, host_layers: bool = False
) -> tuple[Coverage, tuple[Layer, ...]]:
    """Decide by layer type which parameters a Kronecker posterior can cover.

    Args:
        model: the network.
        host_layers: only what laplace-torch's own backends get right: linear layers, and 2-d
            convolutions without groups.

    Returns:
        The coverage, and the covered layers in the order of ``model.named_modules()``.
    """
    owners = _owners(model)
    covered: list[str] = []
    excluded: dict[str, str] = {}
    for name, parameter in model.named_parameters():
        reason = _exclusion(parameter, owners[id(parameter)])
        if reason is None and host_layers:
            reason = _host_exclusion(owners[id(parameter)][0][1])
        if reason is None:
            covered.append(name)
        else:
            excluded[name] = reason
    sizes = {name: parameter.numel() for name, parameter in model.named_parameters()}
    coverage = Coverage(tuple(covered), MappingProxyType(excluded), MappingProxyType(sizes))
    return coverage, layers_of(model, covered)


def _exclusion(parameter: nn.Parameter, places: list[tuple[str, nn.Module, str]]) -> str | None:
    if not parameter.requires_grad:
        return FROZEN
    if len(places) > 1:
        return TIED
    _, module, attribute = places[0]
    rule = rule_for(module)
    kind = type(module).__name__
    if rule is None:
        return _no_rule(module, attribute)
    if attribute not in rule.parameters:
        if not isinstance(getattr(module, rule.parameters[0], None), nn.Parameter):
            return f"{kind}.{attribute} is re-parametrised"
        return f"{kind}.{attribute} is no parameter that the layer's rule covers"
    if not isinstance(getattr(module, rule.parameters[0], None), nn.Parameter):
        return f"the weight of its {kind} is re-parametrised"
    return rule.unsupported(module)


def _host_exclusion(module: nn.Module) -> str | None:
    if isinstance(module, nn.Linear):
        return None
    if isinstance(module, nn.Conv2d):
        if module.groups == 1:
            return None
        return f"{type(module).__name__} with groups is not supported by the backend"
    return f"{type(module).__name__} layers are not supported by the backend"


def _no_rule(module: nn.Module, attribute: str) -> str:
    kind = type(module).__name__
    if any(True for _ in module.children()):
        return f"{kind}.{attribute} belongs to no layer"
    return f"{kind} layers are not supported"


def layers_of(model: nn.Module, covered: Iterable[str]) -> tuple[Layer, ...]:
    """The layers that own the covered parameters."""
    names = frozenset(covered)
    layers = []
    for module_name, module in model.named_modules():
        rule = rule_for(module)
        if rule is None:
            continue
        prefix = f"{module_name}." if module_name else ""
        weight, bias = (
            f"{prefix}{attribute}" if f"{prefix}{attribute}" in names else None
            for attribute in rule.parameters
        )
        if weight or bias:
            layers.append(Layer(module_name, module, rule, weight, bias))
    return tuple(layers)
