"""What a run can be trained with: one contract, one table.

A *method* trains a model and may change its hyperparameters. It takes one training step at a time, says which learning
rate is in force, and saves and restores its whole state. `METHODS` is the table; a new comparator is one entry more.
"""

import math
from collections.abc import Callable
from functools import partial
from typing import Any, Final, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import apo
from baselines.config import Config

Batch = tuple[Tensor, Tensor]  # inputs [B, C, H, W], targets [B]
Schedule = Callable[[float, Config], float]  # fraction of the run done -> factor on the learning rate


class Method(Protocol):
    """Trains a model step by step, and may change its hyperparameters."""

    @property
    def lr(self) -> float:
        """The learning rate in force: of the last step for a schedule, the tuned one for apo."""

    def step(self, batch: Batch, progress: float) -> Tensor:
        """Take one training step.

        Args:
            batch: inputs [B, C, H, W] and targets [B].
            progress: the fraction of the run that lies behind, in [0, 1).

        Returns:
            The batch's loss before the step, [] without a graph.
        """

    def state_dict(self) -> dict[str, Any]:
        """All that the steps to come depend on, apart from the model's weights."""

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what `state_dict` gave."""


def make_optimizer(model: nn.Module, config: Config) -> torch.optim.Optimizer:
    """The optimizer of `torch.optim` that `config` names, with that library's defaults but for sgdm's momentum."""
    factories: dict[str, Callable[..., torch.optim.Optimizer]] = {
        "sgd": torch.optim.SGD,
        "sgdm": partial(torch.optim.SGD, momentum=0.9, nesterov=True),
        "rmsprop": torch.optim.RMSprop,
        "adam": torch.optim.Adam,
        "adamw": torch.optim.AdamW,
    }
    return factories[config.optimizer](model.parameters(), **_options(config))


def make_rule(config: Config) -> Any:
    """The update rule in apo that `config` names, every hyperparameter of which could be tuned."""
    factories: dict[str, Callable[..., Any]] = {
        "sgd": apo.sgd,
        "sgdm": partial(apo.sgd, momentum=0.9, nesterov=True),
        "rmsprop": apo.rmsprop,
        "adam": apo.adam,
        "adamw": apo.adamw,
    }
    return factories[config.optimizer](**_options(config))


def _options(config: Config) -> dict[str, float]:
    decay = {} if config.weight_decay is None else {"weight_decay": config.weight_decay}
    return {"lr": config.lr, **decay}


class Scheduled:
    """An optimizer of `torch.optim` whose learning rate follows a schedule fixed beforehand."""

    def __init__(self, model: nn.Module, config: Config, schedule: Schedule) -> None:
        self.model, self.config, self.schedule = model, config, schedule
        self.optimizer = make_optimizer(model, config)

    @property
    def lr(self) -> float:
        """The learning rate of the last step."""
        return float(self.optimizer.param_groups[0]["lr"])

    def step(self, batch: Batch, progress: float) -> Tensor:
        """Set the learning rate, then take the optimizer's step."""
        for group in self.optimizer.param_groups:
            group["lr"] = self.config.lr * self.schedule(progress, self.config)
        self.optimizer.zero_grad()
        loss = F.cross_entropy(self.model(batch[0]), batch[1])
        loss.backward()
        self.optimizer.step()
        return loss.detach()

    def state_dict(self) -> dict[str, Any]:
        """The optimizer's state; the schedule has none."""
        return self.optimizer.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore the optimizer's state."""
        self.optimizer.load_state_dict(state)


class Apo:
    """`apo.APO` around an optimizer of `torch.optim`, or around apo's own rule of that name."""

    def __init__(self, model: nn.Module, config: Config) -> None:
        self.model, self.config = model, config
        self.optimizer = apo.APO(
            model,
            make_rule(config) if config.rule else make_optimizer(model, config),
            F.cross_entropy,
            objective=apo.Proximal(fsd=config.fsd, wsd=config.wsd),
            meta=apo.Newton(every=config.every)
            if config.meta == "newton"
            else apo.Gradient(torch.optim.RMSprop, lr=0.1, every=config.every),
        )
        self.previous: Batch | None = None  # B', kept here so that a checkpoint between two calls loses no term

    @property
    def lr(self) -> float:
        """The tuned learning rate."""
        return self.optimizer.hypers()["lr"]

    def step(self, batch: Batch, progress: float) -> Tensor:
        """Take the optimizer's step, and a meta-step when one is due."""
        self.optimizer.zero_grad()
        loss = F.cross_entropy(self.model(batch[0]), batch[1])
        loss.backward()
        self.optimizer.step(batch=batch, other=self.previous)
        self.previous = batch if self.config.fsd > 0 else None
        return loss.detach()

    def state_dict(self) -> dict[str, Any]:
        """The optimizer's state and, with fsd > 0, the batch of the last step."""
        return {"optimizer": self.optimizer.state_dict(), "previous": self.previous}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore both."""
        self.optimizer.load_state_dict(state["optimizer"])
        device = next(self.model.parameters()).device
        previous = state["previous"]
        self.previous = None if previous is None else (previous[0].to(device), previous[1].to(device))


def constant(progress: float, config: Config) -> float:
    """1 throughout."""
    return 1.0


def cosine(progress: float, config: Config) -> float:
    """From 1 to 0 along half a cosine."""
    return (1 + math.cos(math.pi * progress)) / 2


def steps(progress: float, config: Config) -> float:
    """Multiplied by `decay_factor` at each of `decay_at`."""
    return config.decay_factor ** sum(progress >= at for at in config.decay_at)


METHODS: Final[dict[str, Callable[[nn.Module, Config], Method]]] = {
    "fixed": lambda model, config: Scheduled(model, config, constant),
    "cosine": lambda model, config: Scheduled(model, config, cosine),
    "step": lambda model, config: Scheduled(model, config, steps),
    "apo": Apo,
}
