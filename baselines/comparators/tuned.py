"""`apo.APO` itself, through the contract of its comparators."""

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

import apo
from baselines.comparators.contract import Batch, Method
from baselines.optimizers import make_base

if TYPE_CHECKING:
    from baselines.config import Config


class Apo(Method):
    """`apo.APO`, tuning an optimizer of `torch.optim` or a rule."""

    def __init__(self, model: nn.Module, config: "Config") -> None:
        super().__init__(model, config)
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
