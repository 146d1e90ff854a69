"""Networks whose weights are spread over processes (FSDP2), without more of it than this package needs.

https://docs.pytorch.org/docs/stable/distributed.fsdp.fully_shard.html
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict, set_model_state_dict
from torch.distributed.fsdp import FullyShardedDataParallel
from torch.distributed.tensor import DTensor

FSDP2_FROM = "2.11"
"""First version of torch whose FSDP2 was seen to train to the same numbers as one process. 2.6 and 2.7 fail on a CPU,
2.8 and 2.9 where intermediate results are computed again; with accumulated gradients these are 6e-8 off."""


def is_sharded(module: nn.Module) -> bool:
    """Whether a module's parameters are spread over processes."""
    return any(isinstance(p, DTensor) for p in module.parameters())


def whole(value: Tensor) -> Tensor:
    """A tensor, gathered where it is spread over processes; every process must call it then."""
    return value.full_tensor() if hasattr(value, "full_tensor") else value


def whole_weights(root: Any) -> AbstractContextManager[None]:
    """Where a trainer's model is FSDP1's: weights whole within the context, and spread again with what became of them.

    A part of such a model may not be asked for its state before all of it has run once.
    """
    if isinstance(root, FullyShardedDataParallel):
        return FullyShardedDataParallel.summon_full_params(root, writeback=True)
    return nullcontext()


def all_finite(value: Tensor) -> bool:
    """Whether no number of a tensor is NaN or infinite; of a sharded one, none of this process's share."""
    return bool((value.to_local() if hasattr(value, "to_local") else value).detach().isfinite().all())


def shard(module: nn.Module, mesh: Any) -> None:
    """Spread a module's parameters over processes: each block of every ``nn.ModuleList``, then what is left.

    Nothing is done to a module without parameters, or one that is sharded already. Torch older than
    :data:`FSDP2_FROM` is a ``RuntimeError``.
    """
    if torch.__version__ < FSDP2_FROM:
        raise RuntimeError(
            f"ModelParallelStrategy (FSDP2) needs torch {FSDP2_FROM} here, and this is {torch.__version__}, which "
            "fails or trains to other numbers; update torch, or take strategy=ddp"
        )
    from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method

    if is_sharded(module) or not any(True for _ in module.parameters()):
        return
    lists = [m for m in module.modules() if isinstance(m, nn.ModuleList)]
    for block in [child for children in lists for child in children]:
        # a block inside of a block would be a unit of its own for no gain, and a lone layer is not worth a message
        if any(True for _ in block.children()):
            fully_shard(block, mesh=mesh, reshard_after_forward=True)
    fully_shard(module, mesh=mesh, reshard_after_forward=True)
    if hasattr(module, "forward_features"):
        register_fsdp_forward_method(module, "forward_features")


def reshard(module: nn.Module) -> None:
    """Give up what a forward pass gathered, so that parameters are this process's share again; else nothing."""
    if not is_sharded(module):
        return
    from torch.distributed.fsdp import FSDPModule

    for part in module.modules():
        if isinstance(part, FSDPModule):
            part.reshard()


def whole_state(module: nn.Module) -> dict[str, Any]:
    """A module's ``state_dict`` on the CPU, gathered where it is sharded; every process must call it then."""
    if not is_sharded(module):
        return module.state_dict()
    return get_model_state_dict(module, options=StateDictOptions(full_state_dict=True, cpu_offload=True))


def load_whole(module: nn.Module, state: Mapping[str, Tensor]) -> None:
    """Inverse of :func:`whole_state`, into a module that may be sharded; other names or shapes are a RuntimeError."""
    if not is_sharded(module):
        module.load_state_dict(state)
        return
    set_model_state_dict(module, dict(state), options=StateDictOptions(full_state_dict=True))
