"""`apo.APO` itself, through the contract of its comparators."""

from typing import TYPE_CHECKING, Any, Final, cast

import torch
from torch import Tensor, nn

import apo
from baselines.comparators.contract import Batch, OptimizerMethod
from baselines.comparators.schedules import Schedule, constant, cosine, linear, wsd
from baselines.optimizers import make_base

if TYPE_CHECKING:
    from baselines.config import Config

BY: Final = ("global", "layer", "parameter")
RELATIVE: Final[dict[str, Schedule]] = {"constant": constant, "linear": linear, "cosine": cosine, "wsd": wsd}


def _meta(config: "Config") -> apo.Newton | apo.Gradient:
    """What moves the hyperparameters; the paper's rate is that of its §5, and by layer that of its App. C."""
    if config.meta == "newton":
        return apo.Newton(every=config.every, curvature=cast(Any, config.curvature), relaxation=config.relaxation)
    default = 0.1 if config.by == "global" else 1e-3
    rate = default if config.meta_lr is None else config.meta_lr
    return apo.Gradient(torch.optim.RMSprop, lr=rate, every=config.every)


class Apo(OptimizerMethod):
    """`apo.APO`, tuning an optimizer of `torch.optim` or a rule."""

    optimizer: apo.APO

    def __init__(self, model: nn.Module, config: "Config") -> None:
        super().__init__(model, config)
        self.progress = 0.0
        self.relative = RELATIVE[config.relative]
        self.optimizer = apo.APO(
            model,
            make_base(model, config),
            self.loss,
            objective=apo.Proximal(
                fsd=config.fsd,
                wsd=config.wsd,
                loss_model=cast(Any, config.loss_model),
                lookahead=cast(Any, config.lookahead),
                other_fraction=config.other_fraction,
            ),
            tune=dict.fromkeys(config.tune, config.by),
            meta=_meta(config),
            relative=None if self.relative is constant else lambda steps: self.relative(self.progress, config),
        )
        self.previous: Batch | None = None  # B', kept here so that a checkpoint between two calls loses no term

    def hypers(self) -> dict[str, float]:
        """The learning rate, times its schedule, and what else is tuned."""
        hypers = {"lr": float(self.optimizer.param_groups[0]["lr"])} | self.optimizer.hypers()
        return hypers | {"lr": hypers["lr"] * self.relative(self.progress, self.config)}

    def step(self, batch: Batch, progress: float) -> Tensor:
        """Take the optimizer's step, and a meta-step when one is due."""
        self.progress = progress
        loss = self.differentiate(batch)
        self.optimizer.step(batch=batch, other=self.previous)
        self.previous = batch if self.config.fsd > 0 else None
        return loss

    def state_dict(self) -> dict[str, Any]:
        """The optimizer's state, the place in the schedule and, with fsd > 0, the batch of the last step."""
        return {"optimizer": self.optimizer.state_dict(), "progress": self.progress, "previous": self.previous}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore them."""
        self.optimizer.load_state_dict(state["optimizer"])
        self.progress = state["progress"]
        device = next(self.model.parameters()).device
        previous = state["previous"]
        self.previous = None if previous is None else (previous[0].to(device), previous[1].to(device))
