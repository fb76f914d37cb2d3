"""Learning rates that follow a schedule fixed beforehand, or the training loss."""

import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Final, cast

import torch
from torch import Tensor, nn

import apo
from baselines.comparators.contract import Batch, OptimizerMethod
from baselines.optimizers import OPTIMIZERS, make_base

if TYPE_CHECKING:
    from baselines.config import Config

Schedule = Callable[[float, "Config"], float]  # fraction of the run done -> factor on the learning rate
STABLE: Final = 0.7  # of the run, before warm-stable-decay decays


class Scheduled(OptimizerMethod):
    """An optimizer whose learning rate follows a schedule; a rule is stepped by `apo.APO`, untuned.

    Args:
        model: what is trained.
        config: with what.
        schedule: from the fraction of the run done to the factor on the learning rate, warmup apart.
    """

    def __init__(self, model: nn.Module, config: "Config", schedule: Schedule) -> None:
        super().__init__(model, config)
        self.schedule = schedule
        self.evaluates_itself = OPTIMIZERS[config.optimizer].evaluates_itself
        base = make_base(model, config)
        self.optimizer = base if isinstance(base, torch.optim.Optimizer) else apo.APO(model, base, self.loss, tune={})

    def hypers(self) -> dict[str, float]:
        """The learning rate of the last step."""
        return {"lr": float(self.optimizer.param_groups[0]["lr"])}

    def factor(self, progress: float) -> float:
        """On the learning rate: the schedule's, times p / warmup while the fraction p of the run is below it."""
        warmup = self.config.warmup
        return self.schedule(progress, self.config) * (progress / warmup if progress < warmup else 1.0)

    def step(self, batch: Batch, progress: float) -> Tensor:
        """Set the learning rate, then take the optimizer's step."""
        for group in self.optimizer.param_groups:
            group["lr"] = self.config.lr * self.factor(progress)
        if self.evaluates_itself:
            take: Callable[[Callable[[], Tensor]], Tensor] = cast(Any, self.optimizer.step)
            return take(lambda: self.loss(self.model(batch[0]), batch[1]))
        loss = self.differentiate(batch)
        if isinstance(self.optimizer, apo.APO):
            self.optimizer.feed(batch)  # K-FAC estimates curvature on it
        self.optimizer.step()
        return loss


class Plateau(Scheduled):
    """The learning rate is multiplied by a factor while the smoothed loss stops falling, and divided while it falls.

    The rule and the defaults of GreedyLR (arXiv 2512.14527) as `transformers.GreedyLR` has it with `smooth=True`: the
    mean of the last 50 batch losses is compared with the smallest such mean so far; more than 10 new minima in a row
    divide the learning rate by 0.95, more than 10 steps in a row without one multiply it by 0.95. Its bounds, 1e-3 and
    1, and its return to the initial learning rate at the lower one are left out: they are absolute, and would keep
    Adam from learning rates below 1e-3.
    """

    FACTOR, PATIENCE, THRESHOLD, WINDOW = 0.95, 10, 1e-6, 50

    def __init__(self, model: nn.Module, config: "Config") -> None:
        super().__init__(model, config, constant)
        self.scale, self.best, self.good, self.bad = 1.0, math.inf, 0, 0
        self.losses: list[float] = []

    def factor(self, progress: float) -> float:
        """What the losses so far have made of it."""
        return self.scale

    def step(self, batch: Batch, progress: float) -> Tensor:
        """Take the optimizer's step, and let its loss change the learning rate of the next."""
        loss = super().step(batch, progress)
        self.observe(loss.item())
        return loss

    def observe(self, loss: float) -> None:
        """Count a loss, and change the factor when enough of them agree."""
        self.losses = [*self.losses, loss][-self.WINDOW :]
        mean = sum(self.losses) / len(self.losses)
        if mean < self.best - self.THRESHOLD:
            self.best, self.good, self.bad = mean, self.good + 1, 0
        else:
            self.good, self.bad = 0, self.bad + 1
        if self.good > self.PATIENCE:
            self.scale, self.good = self.scale / self.FACTOR, 0
        elif self.bad > self.PATIENCE:
            self.scale, self.bad = self.scale * self.FACTOR, 0

    def state_dict(self) -> dict[str, Any]:
        """The optimizer's state, and what has been counted."""
        own = {name: getattr(self, name) for name in ("scale", "best", "good", "bad", "losses")}
        return {"optimizer": super().state_dict(), **own}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore both."""
        super().load_state_dict(state["optimizer"])
        for name in ("scale", "best", "good", "bad", "losses"):
            setattr(self, name, state[name])


def _after_warmup(progress: float, config: "Config") -> float:
    """The fraction that is done of what follows the warmup, in [0, 1)."""
    return max(0.0, (progress - config.warmup) / (1 - config.warmup))


def constant(progress: float, config: "Config") -> float:
    """1 throughout."""
    return 1.0


def steps(progress: float, config: "Config") -> float:
    """Multiplied by `decay_factor` at each of `decay_at`."""
    return config.decay_factor ** sum(progress >= at for at in config.decay_at)


def exponential(progress: float, config: "Config") -> float:
    """From 1 to `decay_factor`, by the same factor at every step after the warmup."""
    return config.decay_factor ** _after_warmup(progress, config)


def linear(progress: float, config: "Config") -> float:
    """From 1 to 0 along a line, after the warmup."""
    return 1 - _after_warmup(progress, config)


def cosine(progress: float, config: "Config") -> float:
    """From 1 to 0 along half a cosine, after the warmup."""
    return (1 + math.cos(math.pi * _after_warmup(progress, config))) / 2


def inverse_sqrt(progress: float, config: "Config") -> float:
    """1 / √(the fraction done over the warmup) after the warmup (Vaswani et al. 2017, §5.3)."""
    return math.sqrt(config.warmup / max(progress, config.warmup))


def wsd(progress: float, config: "Config") -> float:
    """Warm, stable, decay: 1, then along a line to 0 over the last 30% of the run."""
    return min(1.0, (1 - progress) / (1 - STABLE))
