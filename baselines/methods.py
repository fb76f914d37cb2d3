"""What a run can be trained with: one contract, one table.

A *method* trains a model and may change its hyperparameters. It takes one training step at a time, says which
hyperparameters are in force, and saves and restores its whole state. `METHODS` is the table; a new comparator is one
entry more.
"""

import math
from collections.abc import Callable
from typing import Any, Final, Protocol

import torch
from torch import Tensor, nn

import apo
from baselines.config import Config
from baselines.models import MODELS
from baselines.optimizers import OPTIMIZERS

Batch = tuple[Tensor, Tensor]  # inputs [B, C, H, W], targets [B] (of an autoencoder: as the inputs)
Schedule = Callable[[float, Config], float]  # fraction of the run done -> factor on the learning rate


class Method(Protocol):
    """Trains a model step by step, and may change its hyperparameters."""

    def hypers(self) -> dict[str, float]:
        """The learning rate in force (of the last step for a schedule) and what else is tuned, by name."""

    def step(self, batch: Batch, progress: float) -> Tensor:
        """Take one training step.

        Args:
            batch: inputs [B, C, H, W] and targets.
            progress: the fraction of the run that lies behind, in [0, 1).

        Returns:
            The batch's loss before the step, [] without a graph.
        """

    def state_dict(self) -> dict[str, Any]:
        """All that the steps to come depend on, apart from the model's weights."""

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what `state_dict` gave."""


def make_base(model: nn.Module, config: Config) -> apo.Rule[Any, Any] | torch.optim.Optimizer:
    """What takes the steps: apo's rule or an optimizer of `torch.optim`, with that library's defaults."""
    optimizer = OPTIMIZERS[config.optimizer]
    given = {name: getattr(config, name) for name in optimizer.options}
    options = {"lr": config.lr} | {name: value for name, value in given.items() if value is not None}
    if config.uses_rule or optimizer.of_torch is None:
        return optimizer.rule(model, **options)
    return optimizer.of_torch(model.parameters(), **options)


class Scheduled:
    """An optimizer whose learning rate follows a schedule fixed beforehand; a rule is stepped by `apo.APO`, untuned."""

    def __init__(self, model: nn.Module, config: Config, schedule: Schedule) -> None:
        self.model, self.config, self.schedule = model, config, schedule
        self.loss = MODELS[config.model].loss
        base = make_base(model, config)
        self.optimizer = base if isinstance(base, torch.optim.Optimizer) else apo.APO(model, base, self.loss, tune={})

    def hypers(self) -> dict[str, float]:
        """The learning rate of the last step."""
        return {"lr": float(self.optimizer.param_groups[0]["lr"])}

    def step(self, batch: Batch, progress: float) -> Tensor:
        """Set the learning rate, then take the optimizer's step."""
        for group in self.optimizer.param_groups:
            group["lr"] = self.config.lr * self.schedule(progress, self.config)
        self.optimizer.zero_grad()
        loss = self.loss(self.model(batch[0]), batch[1])
        loss.backward()
        if isinstance(self.optimizer, apo.APO):
            self.optimizer.feed(batch)  # K-FAC estimates curvature on it
        self.optimizer.step()
        return loss.detach()

    def state_dict(self) -> dict[str, Any]:
        """The optimizer's state; the schedule has none."""
        return self.optimizer.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore the optimizer's state."""
        self.optimizer.load_state_dict(state)


class Apo:
    """`apo.APO`, tuning an optimizer of `torch.optim` or a rule."""

    def __init__(self, model: nn.Module, config: Config) -> None:
        self.model, self.config = model, config
        self.loss = MODELS[config.model].loss
        self.optimizer = apo.APO(
            model,
            make_base(model, config),
            self.loss,
            objective=apo.Proximal(fsd=config.fsd, wsd=config.wsd),
            tune=dict.fromkeys(config.tune, "global"),
            meta=apo.Newton(every=config.every)
            if config.meta == "newton"
            else apo.Gradient(torch.optim.RMSprop, lr=0.1, every=config.every),
        )
        self.previous: Batch | None = None  # B', kept here so that a checkpoint between two calls loses no term

    def hypers(self) -> dict[str, float]:
        """The learning rate and what else is tuned."""
        return {"lr": float(self.optimizer.param_groups[0]["lr"])} | self.optimizer.hypers()

    def step(self, batch: Batch, progress: float) -> Tensor:
        """Take the optimizer's step, and a meta-step when one is due."""
        self.optimizer.zero_grad()
        loss = self.loss(self.model(batch[0]), batch[1])
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
