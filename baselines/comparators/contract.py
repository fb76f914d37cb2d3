"""What a method is: it trains a model step by step, and may change its hyperparameters."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from baselines.models import MODELS

if TYPE_CHECKING:
    from baselines.config import Config

Batch = tuple[Tensor, Tensor]  # inputs [B, C, H, W], targets [B] (of an autoencoder: as the inputs); texts: [B, T] both


class Method(ABC):
    """Trains a model step by step, and may change its hyperparameters.

    Args:
        model: what is trained.
        config: with what.
    """

    def __init__(self, model: nn.Module, config: "Config") -> None:
        self.model, self.config = model, config
        self.loss: Callable[..., Tensor] = MODELS[config.model].loss

    @abstractmethod
    def hypers(self) -> dict[str, float]:
        """The learning rate in force, "lr", and what else is tuned, by name.

        It is that of the last step, or for apo that of the next. An estimated one is left out before the first step.
        """

    @abstractmethod
    def step(self, batch: Batch, progress: float) -> Tensor:
        """Take one training step.

        Args:
            batch: inputs and targets.
            progress: the fraction of the run that lies behind, in [0, 1).

        Returns:
            The batch's loss before the step, [] without a graph.
        """

    @abstractmethod
    def state_dict(self) -> dict[str, Any]:
        """All that the steps to come depend on, apart from the model's weights and buffers, without pickled objects."""

    @abstractmethod
    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what `state_dict` gave; the model's weights and buffers have been restored before."""

    def evaluating(self) -> AbstractContextManager[None]:
        """While in this context, the model holds the weights that are to be judged: those it trains, or their average.

        Training goes on as if there had been no evaluation, to the bit.
        """
        return nullcontext()


class OptimizerMethod(Method):
    """A method that is an optimizer of the torch kind, and nothing besides."""

    optimizer: torch.optim.Optimizer

    def differentiate(self, batch: Batch) -> Tensor:
        """Put the gradient of the batch's loss into `.grad`; the loss, [] without a graph."""
        self.optimizer.zero_grad()
        loss = self.loss(self.model(batch[0]), batch[1])
        loss.backward()
        if self.config.clip:
            clip(self.model, self.config)
        return loss.detach()

    def step(self, batch: Batch, progress: float) -> Tensor:
        """Take the optimizer's step."""
        loss = self.differentiate(batch)
        self.optimizer.step()
        return loss

    def state_dict(self) -> dict[str, Any]:
        """The optimizer's state."""
        return self.optimizer.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore the optimizer's state."""
        self.optimizer.load_state_dict(state)


def clip(model: nn.Module, config: "Config") -> None:
    """Shorten the gradients to a norm of `config.clip`: each parameter's own, or that of all together."""
    assert config.clip is not None
    parameters = list(model.parameters())
    for together in [parameters] if config.clip_by == "global" else [[parameter] for parameter in parameters]:
        nn.utils.clip_grad_norm_(together, config.clip)


def batch_normalises(model: nn.Module) -> bool:
    """Whether the model has batch normalisation, whose statistics belong to the weights they were taken at."""
    return any(isinstance(module, nn.modules.batchnorm._BatchNorm) for module in model.modules())


@contextmanager
def put_back(model: nn.Module) -> Iterator[None]:
    """Whatever happens to the model's weights and buffers in this context, afterwards they are as before."""
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    try:
        yield
    finally:
        model.load_state_dict(before)
