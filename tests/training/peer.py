"""One interface to what tunes a learning rate: a training loop of a step at a time."""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from tests.training.models import Batch, loss


class NotApplicable(Exception):
    """A situation that a package has no part in, with the reason."""


class Peer:
    """A training loop under one of the packages.

    Attributes:
        optimizer: The object that takes the step.
    """

    def __init__(
        self,
        model: nn.Module,
        lr: float = 0.05,
        cls: str = "SGD",
        criterion: Callable[[Any, Any], Tensor] = loss,
        context: Callable[[], AbstractContextManager[Any]] = nullcontext,
        clip: float | None = None,
        groups: list[dict[str, Any]] | None = None,
    ) -> None:
        self.model, self.start, self.criterion, self.context, self.clip = model, lr, criterion, context, clip
        self.optimizer: Any = self.build(cls, lr, groups)

    def build(self, cls: str, lr: float, groups: list[dict[str, Any]] | None) -> Any:
        """The object that takes the step: of a class of torch.optim, or what stands for it."""
        raise NotImplementedError

    def step(self, *batches: Batch) -> float:
        """One iteration: forward, backward, step and judgement; several batches are accumulated. The loss before it."""
        raise NotImplementedError

    @property
    def lr(self) -> float:
        """The learning rate of the next step, schedules apart."""
        raise NotImplementedError

    @property
    def factor(self) -> float:
        """What has been learned, as a factor of the learning rate that was set."""
        return self.lr / self.start

    def slope(self, *batches: Batch) -> float:
        """The derivative of the loss on the batches after a step on them, by the logarithm of the learning rate."""
        raise NotImplementedError

    def save(self) -> Any:
        """What a checkpoint holds."""
        return self.optimizer.state_dict()

    def load(self, saved: Any) -> None:
        """Resume from a checkpoint."""
        self.optimizer.load_state_dict(saved)

    def total(self, model: nn.Module, batches: tuple[Batch, ...]) -> Tensor:
        """The mean loss over the batches, in one graph."""
        with self.context():
            return torch.stack([self.criterion(model(x), y) for x, y in batches]).mean()

    def backward(self, batches: tuple[Batch, ...], **options: bool) -> float:
        """Accumulate the gradient, a batch at a time; the loss."""
        parts = []
        for batch in batches:
            part = self.total(self.model, (batch,)) / len(batches)
            part.backward(**options)
            parts.append(part.item())
        return sum(parts)


def named(module: Any, name: str) -> Any:
    """What a module calls by a name, whatever its capitals."""
    found = [key for key in dir(module) if key.lower() == name.lower()]
    if not found:
        raise NotApplicable(f"it has no {name}")
    return getattr(module, found[0])
