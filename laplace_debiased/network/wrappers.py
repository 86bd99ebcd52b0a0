"""Networks as training loops hand them over: wrapped for several processes, or cut up over them."""

from __future__ import annotations

from torch import nn
from torch.nn.parallel import DistributedDataParallel

COMPILED = "OptimizedModule"
"""What ``torch.compile`` wraps a module in; its class lies behind a second of imports."""
INSIDE = "_orig_mod", "module"
"""Where wrappers hold their network, and how its names begin in them."""


def plain_network(model: nn.Module) -> nn.Module:
    """The network inside of ``torch.compile``, ``DataParallel`` and ``DistributedDataParallel``.

    Anything else is given back as it is, and so is a wrapper that has hooks: they are part of
    the function.
    """
    parallel = isinstance(model, nn.DataParallel | DistributedDataParallel)
    if not (parallel or type(model).__name__ == COMPILED):
        return model
    if model._forward_hooks or model._forward_pre_hooks:
        return model
    return plain_network(next(model.children()))


def own_name(model: nn.Module, name: str | None) -> str | None:
    """The name that a module of a network has by itself, given the one in its wrapper or this."""
    known = dict(model.named_modules())
    while (
        name is not None and name not in known and name.startswith(tuple(f"{i}." for i in INSIDE))
    ):
        name = name.split(".", 1)[1]
    return name


def check_whole(model: nn.Module) -> None:
    """Check that this process has all of a network's weights; a ValueError says what to do."""
    cut = [name for name, p in model.named_parameters() if type(p).__name__ == "DTensor"]
    cut += [n for n, m in model.named_modules() if type(m).__name__ == "FullyShardedDataParallel"]
    if cut:
        raise ValueError(
            f"the network is cut up over processes ({cut[0] or 'all of it'!r} is; FSDP or tensor "
            "parallelism): a posterior needs whole weights on every rank. Collect them with "
            "torch.distributed.checkpoint.state_dict.get_model_state_dict(model, "
            "options=StateDictOptions(full_state_dict=True)), load them into a plain copy of the "
            "network, and pass that."
        )
