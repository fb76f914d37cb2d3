"""apo and four packages with which a learning rate can be tuned, each as its documents show.

gdtuo differentiates the next training loss by the learning rate of the step before. Prodigy estimates a distance
instead.
"""

import math
from typing import Any

import prodigyopt
import torch
from gradient_descent_the_ultimate_optimizer import gdtuo
from torch import Tensor, nn

import apo
from tests.training.models import Batch
from tests.training.peer import NotApplicable, Peer, named
from tests.training.unrolled import Higher, HigherByBackward, TorchOpt, TorchOptByBackward


class Apo(Peer):
    """This library, with its defaults."""

    def build(self, cls: str, lr: float, groups: list[dict[str, Any]] | None) -> Any:
        self.base = getattr(torch.optim, cls)(groups or self.model.parameters(), lr=lr)
        return apo.APO(self.model, self.base, self.criterion)

    def step(self, *batches: Batch) -> float:
        self.optimizer.zero_grad()
        before = self.backward(batches)
        if self.clip is not None:
            nn.utils.clip_grad_norm_(self.model.parameters(), self.clip)
        for batch in batches:
            self.optimizer.feed(batch)
        self.optimizer.step()
        return before

    @property
    def lr(self) -> float:
        return next(iter(self.optimizer.hypers().values()))

    @property
    def factor(self) -> float:
        return float(self.optimizer.param_groups[0]["lr_factor"])

    def slope(self, *batches: Batch) -> float:
        meta = apo.Gradient(torch.optim.SGD, lr=1e-3, every=1)
        self.optimizer = apo.APO(self.model, self.base, self.criterion, meta=meta)
        before = self.lr
        self.step(*batches)
        return math.log(before / self.lr) / 1e-3


class Gdtuo(Peer):
    """A `ModuleWrapper` under an optimizer that is itself under SGD, with the rates of its paper and README."""

    def build(self, cls: str, lr: float, groups: list[dict[str, Any]] | None) -> Any:
        if groups:
            raise NotApplicable("it takes a module, no groups")
        top = gdtuo.SGD(1e-2 if cls == "SGD" else 1e-5)
        wrapper = gdtuo.ModuleWrapper(self.model, optimizer=named(gdtuo, cls)(alpha=lr, optimizer=top))
        wrapper.initialize()
        return wrapper

    def step(self, *batches: Batch) -> float:
        before = self.differentiated(batches)
        if self.clip is not None:
            nn.utils.clip_grad_norm_(self.optimizer.parameters.values(), self.clip)
        self.optimizer.step()
        return before

    def differentiated(self, batches: tuple[Batch, ...]) -> float:
        self.optimizer.begin()
        self.optimizer.zero_grad()
        return self.backward(batches, create_graph=True)

    @property
    def alpha(self) -> Tensor:
        return self.optimizer.optimizer.parameters["alpha"]

    @property
    def lr(self) -> float:
        squared = isinstance(self.optimizer.optimizer, gdtuo.RMSProp)
        return self.alpha.item() ** 2 if squared else self.alpha.item()

    def slope(self, *batches: Batch) -> float:
        self.step(*batches)
        alpha = self.alpha
        self.differentiated(batches)
        return (alpha.grad * alpha).item()


class Prodigy(Peer):
    """A torch optimizer at lr=1; what it adapts is d, which multiplies lr and starts from 1e-6 if not below."""

    def build(self, cls: str, lr: float, groups: list[dict[str, Any]] | None) -> Any:
        if cls not in ("SGD", "Adam", "AdamW"):  # the tests' default, and what it is
            raise NotApplicable("it is an optimizer of its own")
        return prodigyopt.Prodigy(groups or self.model.parameters(), lr=1.0, d0=min(lr, 1e-6))

    def step(self, *batches: Batch) -> float:
        self.optimizer.zero_grad()
        before = self.backward(batches)
        if self.clip is not None:
            nn.utils.clip_grad_norm_(self.model.parameters(), self.clip)
        self.optimizer.step()
        return before

    @property
    def lr(self) -> float:
        return float(self.optimizer.param_groups[0]["d"])

    @property
    def factor(self) -> float:
        return self.lr

    def slope(self, *batches: Batch) -> float:
        self.step(*batches)
        raise NotApplicable("it trains, and takes no hypergradient")


PEERS: dict[str, type[Peer]] = {
    "apo": Apo,
    "higher": Higher,
    "TorchOpt": TorchOpt,
    "gdtuo": Gdtuo,
    "Prodigy": Prodigy,
}
BY_BACKWARD: dict[str, type[Peer]] = {"higher": HigherByBackward, "TorchOpt": TorchOptByBackward}
