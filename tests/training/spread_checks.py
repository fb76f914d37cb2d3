"""What is run in several processes: ``python -m tests.training.spread_checks FOLDER``; the tests read the results.

Torch is imported once, and the processes are forked from there.
"""

import copy
import multiprocessing
import sys
import traceback
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import apo
from tests.training.models import TASKS, Batch, images, loss, made
from tests.training.spread import CASES, copies, part, shards, train

Check = Callable[[int, int], Any]
NAMED = {case.name: case for case in CASES}
SHARDED = ("terms", "spike", "rule", "accumulation")


def mlp(rank: int = 0, steps: int = 4, world: int = 1) -> tuple[nn.Module, list[Batch]]:
    """A classifier of images in float64, and this process's part of batches."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(192, 8), nn.Tanh(), nn.Linear(8, 4)).double()
    return model, [part((x.double(), y), rank, world) for x, y in images(steps)]


def loop(model: nn.Module, opt: apo.APO, batches: list[Batch]) -> list[dict[str, float]]:
    """Train; hyperparameters after every step."""
    found = []
    for batch in batches:
        opt.zero_grad()
        loss(model(batch[0]), batch[1]).backward()
        opt.step(batch=batch)
        found.append(opt.hypers())
    return found


def ddp_kinds(rank: int, world: int) -> Any:
    """The variants of DDP, and a model that is wrapped after its optimizer is made, as Accelerate does."""
    found: dict[str, Any] = {}
    for kind in (
        "plain",
        "gradient_as_bucket_view",
        "static_graph",
        "find_unused_parameters",
        "later",
        "group",
        "copy",
    ):
        model, batches = mlp(rank, 4, world)
        group = dist.new_group() if kind in ("group", "copy") else None
        options = {kind: True} if hasattr(DistributedDataParallel(model), kind) else {}
        wrapped = DistributedDataParallel(model, process_group=group, **options)
        base = torch.optim.AdamW(model.parameters(), 1e-2)
        opt = apo.APO(model if kind == "later" else wrapped, base, loss, meta=apo.Gradient(torch.optim.SGD, every=1))
        hypers = loop(wrapped, opt, batches[:2])
        grads = [p.grad.clone() for p in model.parameters()]
        if kind == "copy":
            wrapped, opt = copy.deepcopy((model, opt))
            assert opt.hypers() == hypers[-1]
            wrapped = DistributedDataParallel(wrapped)
        found[kind] = hypers + loop(wrapped, opt, batches[2:]), grads
    return found


def disturbed(rank: int, world: int) -> Any:
    """BatchNorm and dropout: what each process finds after a meta-step, and its hyperparameters."""
    torch.manual_seed(rank)
    model = copies(made(TASKS[0]))
    torch.manual_seed(100 + rank)
    opt = apo.APO(model, torch.optim.AdamW(model.parameters(), 1e-2), loss, meta=apo.Newton(every=1))
    hypers, kept = [], True
    for joint in images(4):
        own = part(joint, rank, world)
        opt.zero_grad()
        loss(model(own[0]), own[1]).backward()
        before = [
            torch.get_rng_state(),
            *(b.clone() for b in model.buffers()),
            *(p.grad.clone() for p in opt_params(opt)),
        ]
        opt.step(batch=own)
        after = [torch.get_rng_state(), *model.buffers(), *(p.grad for p in opt_params(opt))]
        kept = kept and all(map(torch.equal, before, after))
        hypers.append(opt.hypers())
    return {"hypers": hypers, "kept": kept, "rng": torch.get_rng_state()}


def opt_params(opt: torch.optim.Optimizer) -> list[torch.Tensor]:
    """The parameters of an optimizer."""
    return [param for group in opt.param_groups for param in group["params"]]


def kfac(rank: int, world: int) -> Any:
    """K-FAC with each kind of Fisher information."""
    found = {}
    for kind in ("exact", "empirical", "mc"):
        model, batches = mlp(rank, 4, world)
        wrapped = copies(model) if world > 1 else model
        rule = apo.kfac(wrapped, lr=0.1, damping=0.1, fisher=kind)
        opt = apo.APO(wrapped, rule, loss, tune={"lr": "global", "damping": "global"}, meta=apo.Newton(every=1))
        hypers = loop(wrapped, opt, batches)
        found[kind] = hypers, [p.detach().clone() for p in model.parameters()]
    return found


def failures(rank: int, world: int) -> Any:
    """What is said, in each process, when one of them does something else than the others."""

    def failing(where: str) -> Callable[[nn.Module, Any], Any]:
        def evaluate(module: nn.Module, batch: Any) -> Any:
            if rank == 1 and (where == "search" or torch.is_grad_enabled()):
                raise ArithmeticError("a bad batch")
            outputs = module(batch[0])
            return loss(outputs, batch[1]), outputs

        return evaluate

    found = {}
    for kind in ("fed", "search", "judgement", "hypers", "local", "alone", "nonfinite", "nothing"):
        model, batches = mlp(rank, 2, world)
        wrapped = copies(model)
        options: dict[str, Any] = {"meta": apo.Newton(every=1, search=kind == "search")}
        if kind in ("search", "judgement"):
            options["evaluate"] = failing(kind)
        if kind == "alone":
            options["process_group"] = dist.new_group([rank], use_local_synchronization=True)
        if kind == "nonfinite":
            options["skip_nonfinite"] = True
        opt = apo.APO(wrapped, torch.optim.SGD(model.parameters(), 1e-2), loss, **options)
        if kind == "hypers" and rank == 1:
            opt.param_groups[0]["start_lr"] = 2e-2
        trained = model if kind in ("local", "alone") else wrapped
        x, y = batches[0]
        loss(trained(x), y).backward()
        if kind == "nonfinite" and rank == 1:
            model[1].weight.grad[0, 0] = torch.nan
        before = model[1].weight.detach().clone()
        bare = before - 1e-2 * model[1].weight.grad
        fed = None if kind == "nothing" or (kind == "fed" and rank == 1) else batches[0]
        try:
            opt.step(batch=fed)
            said = ""
        except Exception as error:
            said = f"{type(error).__name__}: {error}"
        now = model[1].weight.detach()
        found[kind] = said, torch.equal(now, before), torch.allclose(now, bare), opt.hypers()
    return found


def refused(rank: int, world: int) -> Any:
    """What is said of weights that are spread otherwise, and of rules that cannot step shards."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
    from torch.distributed.tensor.parallel import ColwiseParallel, parallelize_module

    mesh = init_device_mesh("cpu", (world,))
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
        model, _ = mlp()
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


def hierarchy(rank: int, world: int) -> Any:
    """Two copies of two shards."""
    return train(NAMED["terms"], shards, rank, world)


CHECKS: dict[int, dict[str, Check]] = {
    2: {
        **{f"ddp {c.name}": lambda rank, world, c=c: train(c, copies, rank, world) for c in CASES},
        **{f"fsdp {name}": lambda rank, world, c=NAMED[name]: train(c, shards, rank, world) for name in SHARDED},
        "ddp kinds": ddp_kinds,
        "disturbed": disturbed,
        "kfac": kfac,
        "failures": failures,
        "refused": refused,
    },
    4: {"hsdp": hierarchy},
}


def work(rank: int, world: int, folder: str) -> None:
    """Run the checks of one number of processes in one of these."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store{world}", rank=rank, world_size=world)
    found = {}
    for name, check in CHECKS[world].items():
        try:
            found[name] = check(rank, world)
        except Exception:
            found[name] = traceback.format_exc()
            break
    torch.save(found, f"{folder}/found.{world}.{rank}")
    dist.barrier()
    dist.destroy_process_group()


def main(folder: str) -> None:
    """Run all checks."""
    context = multiprocessing.get_context("fork")
    for world in CHECKS:
        processes = [context.Process(target=work, args=(rank, world, folder)) for rank in range(world)]
        for process in processes:
            process.start()
        for process in processes:
            process.join()


if __name__ == "__main__":
    main(sys.argv[1])
