"""A wrapper that does at every forward what people's modules do to themselves, and a look at everything it touches."""

import random
from collections import Counter, defaultdict, deque
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from tests.cases import bits


class Fuse:
    """Lets so many forwards pass, then raises; no attribute of a module, so that nobody puts it back."""

    left = 0

    def burn(self, model: nn.Module) -> None:
        """Count a forward; at the last one, disturb what can be disturbed and raise."""
        self.left -= 1
        if self.left == 0:
            model.eval()
            torch.rand(3)
            raise RuntimeError("trapped")


class Odd(nn.Module):
    """A model whose forward also rewrites buffers and attributes of every kind, and draws from every generator."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model, self.fuse = model, Fuse()
        self.register_buffer("replaced", torch.zeros(()))
        self.register_buffer("written", torch.zeros(3), persistent=False)
        self.register_buffer("again", self.written)
        self.register_buffer("resized", torch.zeros(1))
        self.register_buffer("absent", None)
        self.register_buffer("present", torch.ones(1))
        self.register_buffer("sparse", torch.eye(3).to_sparse())
        self.register_buffer("version", torch.zeros((), dtype=torch.long))
        self.alias = nn.Module()
        self.alias.register_buffer("written", self.written)
        self.calls, self.hidden = 0, torch.zeros(())
        self.history: list[float] = []
        self.tally: dict[str, int] = {}
        self.members: set[int] = set()
        self.recent, self.counter, self.sums = deque([0.0], maxlen=2), Counter[str](), defaultdict[str, float](float)
        self.cache = {"first": 1, "second": 2}
        self.running = torch.zeros(3)

    def forward(self, x: Tensor) -> Tensor:
        self.fuse.burn(self)
        self.calls += 1
        self.replaced = self.replaced + 1.0
        self.written.add_(1.0)
        self.again = self.again * 2.0
        self.resized.resize_(self.calls + 1).fill_(self.calls)
        self.absent = torch.ones(2) if self.absent is None else None
        self.present = torch.ones(2) if self.present is None else None
        self.sparse.mul_(2.0)
        self.version.data = self.version.data + 1
        self.register_buffer(f"late{self.calls}", torch.ones(1))
        setattr(self, f"new{self.calls}", self.calls)
        self.history.append(random.random())
        self.tally[str(self.calls)] = self.calls
        self.members.add(self.calls)
        self.recent.append(random.random())
        self.counter["calls"] += 1
        self.sums["calls"] += 1.0
        self.cache["first"] = self.cache.pop("first")  # the last to be used goes to the end
        self.running += 1.0
        outputs: Tensor = self.model(x) * (1.0 + 0.01 * np.random.rand())
        self.hidden = outputs
        return outputs


def view(tensor: Tensor) -> Any:
    """Which tensor it is, and what is in it."""
    copy = tensor.detach().clone().to_dense()  # NumPy, which `bits` uses, would keep the tensor from being resized
    return id(tensor), tuple(copy.shape), bits(copy)


def attributes(module: nn.Module) -> dict[str, Any]:
    """Which object every attribute of a module is, and which ones are in it if it is a list, a dict or a set."""
    own = vars(module)
    inside: dict[str, Any] = {key: list(map(id, x)) for key, x in own.items() if isinstance(x, list | set | deque)}
    inside |= {key: [(k, id(v)) for k, v in x.items()] for key, x in own.items() if isinstance(x, dict)}
    inside |= {key: view(x) for key, x in own.items() if isinstance(x, Tensor)}
    return {key: (id(value), inside.get(key)) for key, value in own.items()}


def found(model: nn.Module) -> dict[str, Any]:
    """Everything that an evaluation might disturb."""
    return {
        "buffers": {name: view(b) for name, b in model.named_buffers(remove_duplicate=False)},
        "grads": [None if p.grad is None else view(p.grad) for p in model.parameters()],
        "attributes": [attributes(module) for module in model.modules()],
        "torch": bits(torch.get_rng_state()),
        "python": random.getstate(),
        "numpy": repr(np.random.get_state()),
    }
