"""Schedule-free SGD and AdamW: an average of the weights in place of a schedule, by their authors' package.

Source: Defazio et al. 2024 (arXiv 2405.15682); schedulefree. Gradients are taken at y, between the average x and the
weights z that SGD or AdamW moves; x is what is judged. The authors' settings: β = 0.9, warmup weighted by its squared
learning rate. As they advise, statistics of batch normalisation are brought to x before an evaluation by 50 batches,
here the last ones.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Final

import torch
from torch import Tensor, nn

from baselines.comparators.contract import Batch, OptimizerMethod, batch_normalises, put_back
from baselines.optimizers import weight_decay

if TYPE_CHECKING:
    from baselines.config import Config


BATCHES: Final = 50


class ScheduleFree(OptimizerMethod):
    """`SGDScheduleFree` for sgdm, `AdamWScheduleFree` for adamw, with warmup as the package has it."""

    def __init__(self, model: nn.Module, config: "Config") -> None:
        super().__init__(model, config)
        from schedulefree import AdamWScheduleFree, SGDScheduleFree

        make = SGDScheduleFree if config.optimizer == "sgdm" else AdamWScheduleFree
        self.package = make(model.parameters(), lr=config.lr, weight_decay=weight_decay(config))
        self.package.train()
        self.optimizer = self.package
        self.keeps = BATCHES if batch_normalises(model) else 0
        self.recent: list[Tensor] = []  # inputs, for the statistics at x

    def hypers(self) -> dict[str, float]:
        """The learning rate of the last step."""
        return {"lr": float(self.optimizer.param_groups[0]["lr"])}

    def step(self, batch: Batch, progress: float) -> Tensor:
        """Set the learning rate, which grows during the warmup, and take the optimizer's step."""
        (group,) = self.optimizer.param_groups
        warmup = self.config.warmup
        group["lr"] = self.config.lr * (progress / warmup if progress < warmup else 1.0)
        self.recent = [*self.recent, batch[0]][-self.keeps :] if self.keeps else []
        return super().step(batch, progress)

    @contextmanager
    def evaluating(self) -> Iterator[None]:
        """The model holds the average x; y is put back from a copy, as the package's way back rounds."""
        with put_back(self.model):
            self.package.eval()
            try:
                with torch.no_grad():
                    for inputs in self.recent:
                        self.model(inputs)
                yield
            finally:
                self.package.train()

    def state_dict(self) -> dict[str, Any]:
        """The optimizer's state and the inputs that statistics are taken on."""
        return {"optimizer": super().state_dict(), "recent": self.recent}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore both."""
        super().load_state_dict(state["optimizer"])
        device = next(self.model.parameters()).device
        self.recent = [inputs.to(device) for inputs in state["recent"]]
