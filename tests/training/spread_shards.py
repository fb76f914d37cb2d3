"""What several processes do with shards of the weights: refusals, and checkpoints."""

from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.distributed.tensor.parallel import ColwiseParallel, parallelize_module

import apo
from tests.training.models import Batch, loss, sentences
from tests.training.spread import CASES, Process, Wrap, loop, shards, transformer, whole

SAVED = (CASES[0], CASES[2])


def refused(process: Process) -> Any:
    """What is said of weights that are spread otherwise, and of rules that cannot step shards."""
    mesh = init_device_mesh("cpu", (process.world,))
    clipped = apo.chain(apo.clip_by_norm(1e3, per="global"), apo.adam())
    found = {}
    for kind, rule in (
        ("tensor", None),
        ("flat", None),
        ("partly", None),
        ("quasi-adam", apo.quasi_adam()),
        ("clip", clipped),
        ("kfac", None),
    ):
        model = nn.Sequential(nn.Flatten(), nn.Linear(192, 8), nn.Tanh(), nn.Linear(8, 4))
        if kind == "tensor":
            parallelize_module(model, mesh, {"1": ColwiseParallel()})
        elif kind == "flat":
            model = FullyShardedDataParallel(model, device_id=torch.device("cpu"))
        elif kind == "partly":
            fully_shard(model[1], mesh=mesh)
        else:
            fully_shard(model, mesh=mesh)
        base = rule or (apo.kfac(model) if kind == "kfac" else torch.optim.SGD(model.parameters(), 0.1))
        try:
            apo.APO(model, base, loss)
            found[kind] = ""
        except Exception as error:
            found[kind] = f"{type(error).__name__}: {error}"
    return found


def checkpointed(process: Process) -> Any:
    """Train for six steps, with a checkpoint after the third; and train the last three again from it."""
    found, parts = dict[str, Any](folder=process.folder), _parts(process)
    for case in SAVED:
        folder = f"{process.folder}/{case.name}"
        model = shards(transformer())
        opt = apo.APO(model, case.base(model), loss, **case.options)
        loop(model, opt, parts[:3])
        weights, state = get_state_dict(model, opt)
        dcp.save({"model": weights, "optim": state}, checkpoint_id=folder)
        found[case.name] = loop(model, opt, parts[3:]), whole(model), loaded(shards, process, folder, case)
    return found


def loaded(wrap: Wrap, process: Process, folder: str, case: Any) -> Any:
    """Load what `checkpointed` has saved, perhaps in another number of processes, and train on."""
    model = wrap(transformer())
    opt = apo.APO(model, case.base(model), loss, **case.options)
    weights, state = get_state_dict(model, opt)
    dcp.load({"model": weights, "optim": state}, checkpoint_id=folder)
    set_state_dict(model, opt, model_state_dict=weights, optim_state_dict=state)
    return loop(model, opt, _parts(process)[3:]), whole(model)


def _parts(process: Process) -> list[Batch]:
    return [process.part(joint) for joint in sentences(6)]
