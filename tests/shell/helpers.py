"""What the tests of the shell share: a model that an extra evaluation could disturb, batches, bases, snapshots."""

import itertools
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import apo
from tests.cases import bits

Batch = tuple[Tensor, Tensor]
Build = Callable[[nn.Module], Any]


class Counting(nn.Module):
    """A layer with a buffer that it replaces, and one that it writes into, at every forward."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("calls", torch.zeros(()))
        self.register_buffer("last", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        self.calls = self.calls + 1.0
        self.last.copy_(x.detach().mean())
        return x


def net(seed: int = 0, dropout: float = 0.3) -> nn.Sequential:
    """A classifier of 6 features into 3 classes, with BatchNorm, dropout and custom buffers."""
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Linear(6, 8), nn.BatchNorm1d(8), nn.Tanh(), Counting(), nn.Dropout(dropout), nn.Linear(8, 3)
    )


def batches(count: int, seed: int = 1, size: int = 12, dtype: torch.dtype = torch.float32) -> list[Batch]:
    """Batches of a noisy linear classification."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(6, 3, generator=torch.Generator().manual_seed(99))
    found = []
    for _ in range(count):
        x = torch.randn(size, 6, generator=generator)
        y = (x @ weight + 0.5 * torch.randn(size, 3, generator=generator)).argmax(1)
        found.append((x.to(dtype), y))
    return found


def endless(seed: int = 1, size: int = 32) -> Iterator[Batch]:
    """Batches without end."""
    return itertools.chain.from_iterable(batches(50, seed + i, size) for i in itertools.count())


def backward(model: nn.Module, batch: Batch, share: float = 1.0) -> float:
    """One training forward and backward; the gradient is added to what is there."""
    loss = F.cross_entropy(model(batch[0]), batch[1])
    (share * loss).backward()
    return loss.item()


def train(model: nn.Module, opt: apo.APO, data: Iterable[Batch]) -> list[float]:
    """An ordinary training loop under the shell; the losses."""
    losses = []
    for batch in data:
        opt.zero_grad()
        losses.append(backward(model, batch))
        opt.step(batch=batch)
    return losses


def matrices(model: nn.Module) -> list[Tensor]:
    """The weights of linear layers."""
    return [p for p in model.parameters() if p.ndim == 2]


def vectors(model: nn.Module) -> list[Tensor]:
    """All other parameters."""
    return [p for p in model.parameters() if p.ndim != 2]


def simple(cls: type[torch.optim.Optimizer], **options: Any) -> Build:
    """A base of a class of torch, over all parameters."""
    return lambda model: cls(model.parameters(), **options)


def muon_and_adamw(model: nn.Module) -> list[torch.optim.Optimizer]:
    """Muon on matrices, AdamW on the rest."""
    return [torch.optim.Muon(matrices(model), lr=0.02), torch.optim.AdamW(vectors(model), lr=1e-3)]


class Base(NamedTuple):
    """A base optimizer of the table."""

    name: str
    build: Build


o = torch.optim
TORCH_BASES = [
    Base("sgd", simple(o.SGD, lr=0.1)),
    Base("sgd-momentum", simple(o.SGD, lr=0.05, momentum=0.9, weight_decay=1e-2)),
    Base("adamw", simple(o.AdamW, lr=1e-2)),
    Base("adamw-foreach", simple(o.AdamW, lr=1e-2, foreach=True)),
    Base("adamw-fused", simple(o.AdamW, lr=1e-2, fused=True)),
    Base("rmsprop", simple(o.RMSprop, lr=1e-2, momentum=0.5)),
    Base("muon-adamw", muon_and_adamw),
]


def optimizers(base: Any) -> list[torch.optim.Optimizer]:
    """A base as a list of optimizers."""
    return base if isinstance(base, list) else [base]


def entries(state: Any) -> dict[str, Any]:
    """One parameter's state in a fixed order, tensors as bytes."""
    return {key: bits(value) if isinstance(value, Tensor) else value for key, value in sorted(state.items())}


def weights(model: nn.Module) -> list[bytes]:
    """The parameters, bit for bit."""
    return [bits(p) for p in model.parameters()]


def traces(model: nn.Module) -> list[Any]:
    """What an extra evaluation might disturb, bit for bit: buffers, gradients, flags, random numbers."""
    return [
        {name: bits(buffer) for name, buffer in model.named_buffers()},
        [None if p.grad is None else bits(p.grad) for p in model.parameters()],
        [module.training for module in model.modules()],
        bits(torch.get_rng_state()),
    ]


def state(model: nn.Module, opts: Iterable[torch.optim.Optimizer]) -> list[Any]:
    """The optimizers' state of every parameter, bit for bit."""
    opts = list(opts)
    return [[entries(opt.state[p]) for opt in opts if p in opt.state] for p in model.parameters()]


def everything(model: nn.Module, opt: apo.APO) -> list[Any]:
    """Weights, traces, state, groups, tuned numbers."""
    groups = [{k: v for k, v in group.items() if k != "params"} for group in opt.param_groups]
    return [weights(model), traces(model), state(model, [opt]), groups, opt.hypers(), opt.state_dict()["param_groups"]]


def shell(meta: Any = None, model: nn.Module | None = None, lr: float = 0.1, **options: Any) -> tuple[Any, apo.APO]:
    model = net() if model is None else model
    meta = apo.Newton(every=3, search=False) if meta is None else meta
    return model, apo.APO(model, torch.optim.SGD(model.parameters(), lr=lr), F.cross_entropy, meta=meta, **options)


def call(model: nn.Module, opt: apo.APO, batch: Batch, **options: Any) -> bool:
    """A call of the loop; whether it was a meta-step."""
    rows = len(opt.record)
    opt.zero_grad()
    backward(model, batch)
    opt.step(batch=batch, **options)
    return len(opt.record) > rows
