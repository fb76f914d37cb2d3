"""Weights that are spread over processes as by `fully_shard`: the part that is here, and what can be trained.

They are known by what they have and not by their class, `DTensor`, which is slow to import.
"""

import sys
from collections.abc import Mapping
from typing import Any, cast

from torch import Tensor, nn

PLAIN = (Tensor, nn.Parameter)


def is_sharded(tensor: Tensor) -> bool:
    """Whether a tensor is spread over processes: a DTensor."""
    return type(tensor) not in PLAIN and hasattr(tensor, "device_mesh") and hasattr(tensor, "placements")


def local(tensor: Tensor) -> Tensor:
    """The part of a tensor that is in this process, sharing its memory; the tensor itself where it is not spread."""
    return cast(Any, tensor.detach()).to_local() if is_sharded(tensor) else tensor


def spread_like(param: Tensor, part: Tensor) -> Tensor:
    """The tensor spread as a parameter of which a part is here; the part itself if it is 0-d, or nothing is spread."""
    if not is_sharded(param) or not part.ndim:
        return part
    whole = cast(Any, param)
    return cast(
        Tensor,
        type(whole.detach()).from_local(
            part, whole.device_mesh, whole.placements, run_check=False, shape=whole.shape, stride=whole.stride()
        ),
    )


def reshard(model: nn.Module) -> None:
    """Free whole weights that ``fully_shard`` keeps after a forward, as they may be those of another step."""
    fsdp = sys.modules.get("torch.distributed.fsdp")
    for module in model.modules() if fsdp is not None else ():
        if isinstance(module, fsdp.FSDPModule):  # type: ignore[union-attr]
            module.reshard()


def check_spread(model: nn.Module, params: Mapping[str, Tensor]) -> None:
    """Raise if the weights are spread over processes in a way that has not been seen to work.

    Args:
        model: The module.
        params: The optimizer's parameters, by name.

    Raises:
        ValueError: If they are. ``fully_shard`` over all processes works, and with copies of the shards (HSDP).
    """
    fsdp = sys.modules.get("torch.distributed.fsdp")
    modules = list(model.modules()) if fsdp is not None else []
    if any(isinstance(module, fsdp.FullyShardedDataParallel) for module in modules):  # type: ignore[union-attr]
        raise ValueError("FullyShardedDataParallel flattens the parameters: use torch.distributed.fsdp.fully_shard")
    spread = {name: cast(Any, param) for name, param in params.items() if is_sharded(param)}
    if not spread:
        return
    name, first = next(iter(spread.items()))
    if not any(isinstance(module, fsdp.FSDPModule) for module in modules):  # type: ignore[union-attr]
        raise ValueError(f"{name} is a DTensor, but the model is not fully_shard'ed: tensor parallelism is untested")
    for name in params:
        if name not in spread:
            raise ValueError(f"{name} is not sharded, but others are: give fully_shard the whole model")
        kinds = [p.is_shard() for p in spread[name].placements]
        if kinds not in ([True], [False, True]) or spread[name].device_mesh != first.device_mesh:
            raise ValueError(
                f"{name} is spread as {spread[name].placements}: only fully_shard on one mesh, with or without "
                "copies of the shards, is tested; not tensor parallelism"
            )
