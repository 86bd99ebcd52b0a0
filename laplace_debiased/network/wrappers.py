"""Networks as training loops hand them over: wrapped for several processes, or cut up over them."""

from __future__ import annotations

from torch import nn
from torch.nn.parallel import DistributedDataParallel


def plain_network(model: nn.Module) -> nn.Module:
    """The network inside of ``DistributedDataParallel``; anything else as it is."""
    while isinstance(model, DistributedDataParallel):
        model = model.module
    return model


def check_whole(model: nn.Module) -> None:
    """Check that this process has all of a network's weights.

    Raises:
        ValueError: if some are cut up over processes, saying what to do.
    """
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
