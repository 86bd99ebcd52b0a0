"""States of networks that were fitted in ``torch.compile`` or ``DataParallel``, up to version 5."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn

from laplace_debiased.network.wrappers import INSIDE


def without_wrappers(state: Mapping[str, Any], model: nn.Module) -> Mapping[str, Any]:
    """A state with the names that the network has by itself.

    Args:
        state: of a posterior.
        model: the network without a wrapper.
    """
    known = [name for name, _ in model.named_parameters()]
    names = [*state["covered"], *state["excluded"], *state.get("model", ())]
    for inside in INSIDE:
        prefix = f"{inside}."
        if all(n.startswith(prefix) for n in names) and not known[0].startswith(prefix):
            return without_wrappers(_renamed(state, inside), model)
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
