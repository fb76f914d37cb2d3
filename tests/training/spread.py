"""Training loops for several processes, which one process can run as well, on the joint batch."""

import contextlib
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils._python_dispatch import TorchDispatchMode

import apo
from tests.training.models import TASKS, Batch, loss, made, sentences

STEPS, SPIKE = 6, 3e3
Wrap = Callable[[nn.Module], nn.Module]


class Case(NamedTuple):
    """A way of training a Transformer.

    Attributes:
        name: Its name.
        base: From the model to the base optimizer.
        options: Those of `apo.APO`.
        micro: How many batches are accumulated for a step.
        spike: The step at which the learning rate is `SPIKE` times as long, for once.
    """

    name: str
    base: Callable[[nn.Module], Any]
    options: dict[str, Any]
    micro: int = 1
    spike: int = -1


def _groups(model: nn.Module) -> list[dict[str, Any]]:
    params = list(model.parameters())
    return [{"params": params[:5], "lr": 0.02}, {"params": params[5:], "lr": 0.01}]


EVERY_STEP, EVERY_OTHER = apo.Newton(every=1), apo.Newton(every=2)
CASES = [
    Case(
        "terms",
        lambda model: torch.optim.AdamW(_groups(model), foreach=True),
        {"meta": EVERY_OTHER, "objective": apo.Proximal(fsd=0.3, wsd=0.1, other_fraction=1.0)},
    ),
    Case("spike", lambda model: torch.optim.AdamW(model.parameters(), 1e-2, fused=True), {"meta": EVERY_STEP}, spike=4),
    Case(
        "rule",
        lambda model: apo.rmsprop(lr=1e-2),
        {"tune": {"lr": "parameter", "rho": "global", "eps": "group"}, "meta": apo.Gradient(torch.optim.Adam, every=2)},
    ),
    Case("accumulation", lambda model: apo.adam(lr=1e-2), {"meta": EVERY_OTHER}, micro=2),
    Case("far-off", lambda model: torch.optim.SGD(model.parameters(), 300.0), {"meta": EVERY_OTHER}),
    Case(
        "layers",
        lambda model: torch.optim.SGD(model.parameters(), 0.1, momentum=0.9, nesterov=True),
        {"tune": {"lr": "layer"}, "meta": EVERY_OTHER},
    ),
    Case(
        "linear",
        lambda model: torch.optim.AdamW(model.parameters(), 1e-2),
        {"objective": apo.Proximal(loss_model="linear", wsd=5.0), "meta": apo.Gradient(torch.optim.SGD, lr=0.1)},
    ),
]


SHARDED = CASES[:4]
"""Those that are run with shards."""


class Sent(TorchDispatchMode):
    """The bytes of everything that the processes send each other, operation by operation."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes: list[tuple[str, int]] = []

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function.namespace in ("c10d", "_c10d_functional"):
            tensors = [t for a in args for t in (a if isinstance(a, list | tuple) else [a]) if isinstance(t, Tensor)]
            self.bytes.append((function.name(), sum(t.numel() * t.element_size() for t in tensors)))
        return function(*args, **(kwargs or {}))

    def taken(self) -> list[tuple[str, int]]:
        """What has been sent since the last call."""
        taken, self.bytes = self.bytes, []
        return taken


def transformer() -> nn.Module:
    """A Transformer without dropout in float64, with one parameter that is frozen."""
    model = made(TASKS[1], dropout=0.0, dtype=torch.float64)
    model.position.requires_grad_(False)
    return model


class Process(NamedTuple):
    """One of several processes, or one alone, and where files may go."""

    rank: int = 0
    world: int = 1
    folder: str = ""

    def part(self, batch: Batch) -> Batch:
        """Its part of a batch."""
        return batch[0].chunk(self.world)[self.rank], batch[1].chunk(self.world)[self.rank]


ALONE = Process()


@contextlib.contextmanager
def unsynchronised(model: nn.Module, last: bool) -> Iterator[None]:
    """Accumulate gradients without averaging them until the last batch of a step."""
    if isinstance(model, DistributedDataParallel) and not last:
        with model.no_sync():
            yield
        return
    if hasattr(model, "set_requires_gradient_sync"):
        model.set_requires_gradient_sync(last)
    yield


def train(case: Case, wrap: Wrap = lambda model: model, process: Process = ALONE) -> dict[str, Any]:
    """Train for some steps on a share of every batch.

    Returns:
        Hyperparameters after every step, the rows of the record, the tuning's numbers, the weights at the end, and what
        was sent in the backward and in the step of every step.
    """
    model = wrap(transformer())
    opt = apo.APO(model, case.base(model), loss, **case.options)
    hypers, sent = [], []
    with Sent() as counted:
        joint = iter(sentences(STEPS * case.micro, size=8))
        for number in range(STEPS):
            opt.zero_grad()
            for at in range(case.micro):
                own = process.part(next(joint))
                with unsynchronised(model, last=at == case.micro - 1):
                    (loss(model(own[0]), own[1]) / case.micro).backward()
                opt.feed(own)
            for group in opt.param_groups:
                group["lr"] *= SPIKE if number == case.spike else 1.0
            trained = counted.taken()
            opt.step()
            sent.append((trained, counted.taken()))
            for group in opt.param_groups:
                group["lr"] /= SPIKE if number == case.spike else 1.0
            hypers.append({**opt.hypers(), "effective": opt.param_groups[0]["effective_lr"]})
    numbers = {name: x for name, x in opt.state_dict()["param_groups"][0].items() if name.startswith("apo/")}
    return {"hypers": hypers, "record": opt.record.rows, "numbers": numbers, "weights": whole(model), "sent": sent}


def loop(model: nn.Module, opt: apo.APO, batches: list[Batch]) -> list[dict[str, float]]:
    """Train; hyperparameters after every step."""
    found = []
    for batch in batches:
        opt.zero_grad()
        loss(model(batch[0]), batch[1]).backward()
        opt.step(batch=batch)
        found.append(opt.hypers())
    return found


def whole(model: nn.Module) -> dict[str, Tensor]:
    """All weights, gathered where they are sharded."""
    if hasattr(model, "reshard"):
        model.reshard()
    named = {name.removeprefix("module."): param.detach() for name, param in model.named_parameters()}
    return {name: p.full_tensor() if hasattr(p, "full_tensor") else p.clone() for name, p in named.items()}


def copies(model: nn.Module) -> nn.Module:
    """DDP."""
    return DistributedDataParallel(model)


def shards(model: nn.Module) -> nn.Module:
    """FSDP2 over all processes; over four, two copies of two shards."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    world = dist.get_world_size()
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("copy", "shard")) if world == 4 else None
    mesh = mesh or init_device_mesh("cpu", (world,))
    for block in model.blocks:
        fully_shard(block, mesh=mesh)
    return fully_shard(model, mesh=mesh)
