"""What is run in several processes: ``python -m tests.training.spread_checks FOLDER``; the tests read the results.

Torch is imported once, and the processes are forked from there.
"""

import contextlib
import copy
import io
import multiprocessing
import sys
import traceback
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import apo
from tests.documents import programs
from tests.training.models import TASKS, Batch, images, loss, made
from tests.training.spread import CASES, SHARDED, Process, copies, loop, shards, train
from tests.training.spread_shards import checkpointed, refused

PATIENCE = timedelta(minutes=2)
"""How long a process waits for another, before it fails."""
Check = Callable[[Process], Any]


def mlp(process: Process, steps: int) -> tuple[nn.Module, list[Batch]]:
    """A classifier of images in float64, and this process's part of batches."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(192, 8), nn.Tanh(), nn.Linear(8, 4)).double()
    return model, [process.part((x.double(), y)) for x, y in images(steps)]


def ddp_kinds(process: Process) -> Any:
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
        model, batches = mlp(process, 4)
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


def disturbed(process: Process) -> Any:
    """BatchNorm and dropout: what each process finds after a meta-step, and its hyperparameters."""
    torch.manual_seed(process.rank)
    model = copies(made(TASKS[0]))
    torch.manual_seed(100 + process.rank)
    opt = apo.APO(model, torch.optim.AdamW(model.parameters(), 1e-2), loss, meta=apo.Newton(every=1))
    hypers, kept = [], True
    for joint in images(4):
        own = process.part(joint)
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


def kfac(process: Process) -> Any:
    """K-FAC with each kind of Fisher information."""
    found = {}
    for kind in ("exact", "empirical", "mc"):
        model, batches = mlp(process, 4)
        wrapped = copies(model) if process.world > 1 else model
        rule = apo.kfac(wrapped, lr=0.1, damping=0.1, fisher=kind)
        meta = apo.Gradient(torch.optim.SGD, lr=0.01, every=1)
        opt = apo.APO(wrapped, rule, loss, tune={"lr": "global", "damping": "global"}, meta=meta)
        hypers = loop(wrapped, opt, batches)
        found[kind] = hypers, [p.detach().clone() for p in model.parameters()]
    return found


def failures(process: Process) -> Any:
    """What is said, in each process, when one of them does something else than the others."""

    def failing(where: str) -> Callable[[nn.Module, Any], Any]:
        def evaluate(module: nn.Module, batch: Any) -> Any:
            if process.rank == 1 and (where == "search" or torch.is_grad_enabled()):
                raise ArithmeticError("a bad batch")
            outputs = module(batch[0])
            return loss(outputs, batch[1]), outputs

        return evaluate

    found = {}
    for kind in ("fed", "search", "judgement", "hypers", "local", "alone", "nonfinite", "nothing"):
        model, batches = mlp(process, 2)
        wrapped = copies(model)
        options: dict[str, Any] = {"meta": apo.Newton(every=1, search=kind == "search")}
        if kind in ("search", "judgement"):
            options["evaluate"] = failing(kind)
        if kind == "alone":
            options["process_group"] = dist.new_group([process.rank], use_local_synchronization=True)
        if kind == "nonfinite":
            options["skip_nonfinite"] = True
        opt = apo.APO(wrapped, torch.optim.SGD(model.parameters(), 1e-2), loss, **options)
        if kind == "hypers" and process.rank == 1:
            opt.param_groups[0]["start_lr"] = 2e-2
        trained = model if kind in ("local", "alone") else wrapped
        x, y = batches[0]
        loss(trained(x), y).backward()
        if kind == "nonfinite" and process.rank == 1:
            model[1].weight.grad[0, 0] = torch.nan
        before = model[1].weight.detach().clone()
        bare = before - 1e-2 * model[1].weight.grad
        fed = None if kind == "nothing" or (kind == "fed" and process.rank == 1) else batches[0]
        try:
            opt.step(batch=fed)
            said = ""
        except Exception as error:
            said = f"{type(error).__name__}: {error}"
        now = model[1].weight.detach()
        found[kind] = said, torch.equal(now, before), torch.allclose(now, bare), opt.hypers()
    return found


def documented(process: Process) -> Any:
    """What the programs of the page on several processes print; torchrun would make the group that is there already."""
    printed = []
    for program in programs("docs/training/distributed.md"):
        output = io.StringIO()
        init, destroy = dist.init_process_group, dist.destroy_process_group
        dist.init_process_group = dist.destroy_process_group = lambda: None
        try:
            with contextlib.redirect_stdout(output):
                exec(program, {"__name__": "__main__"})
        finally:
            dist.init_process_group, dist.destroy_process_group = init, destroy
        printed.append(output.getvalue())
    return printed


CHECKS: dict[int, dict[str, Check]] = {
    2: {
        **{f"ddp {c.name}": lambda process, c=c: train(c, copies, process) for c in CASES},
        **{f"fsdp {c.name}": lambda process, c=c: train(c, shards, process) for c in SHARDED},
        "ddp kinds": ddp_kinds,
        "disturbed": disturbed,
        "kfac": kfac,
        "failures": failures,
        "programs": documented,
        "refused": refused,
        "checkpoint": checkpointed,
    },
    4: {"hsdp": lambda process: train(CASES[0], shards, process)},
}


def work(rank: int, world: int, folder: str) -> None:
    """Run the checks of one number of processes in one of these."""
    torch.set_num_threads(1)
    store = f"file://{folder}/store{world}"
    dist.init_process_group("gloo", init_method=store, rank=rank, world_size=world, timeout=PATIENCE)
    found = {}
    for name, check in CHECKS[world].items():
        try:
            found[name] = check(Process(rank, world, folder))
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
