"""GeN: the learning rate is the minimum of a parabola through three losses along the step.

    L(θ + sΔ) ≈ L₀ − As + ½Bs²,   A = (L₋ − L₊)/2,   B = L₊ + L₋ − 2L₀,   s* = A/B      (Δ: the step at the present lr)
    lr ← 0.9 lr + 0.1 lr · clip(s*, ½, 2)   if A, B > 0;      lr ← lr/2   if a loss is not finite

Source: Bu & Xu 2024 (arXiv 2407.02772), with the bounds, the smoothing and the halving of the authors' package
gen-optim 0.1.1. That prints, lets the optimizer's averages advance twice, and takes the losses on the next batch; here
they are taken on the gradient's batch, whose L₀ is there already: two forward passes every `every` steps.
"""

import math
from typing import TYPE_CHECKING, Any, Final

import torch
from torch import Tensor, nn

from baselines.comparators.contract import Batch, OptimizerMethod
from baselines.optimizers import make_base

if TYPE_CHECKING:
    from baselines.config import Config

SMOOTHING: Final = 0.9


def best_scale(before: float, here: float, after: float) -> float | None:
    """The minimum s* of the parabola through (−1, before), (0, here) and (1, after); None if it has none above 0."""
    slope, bend = (before - after) / 2, after + before - 2 * here
    return slope / bend if slope > 0 and bend > 0 else None


class GeN(OptimizerMethod):
    """GeN over an optimizer of `torch.optim`, whose step is proportional to lr."""

    def __init__(self, model: nn.Module, config: "Config") -> None:
        super().__init__(model, config)
        base = make_base(model, config)
        assert isinstance(base, torch.optim.Optimizer)  # --rule is refused
        self.optimizer = base
        self.steps = 0

    def hypers(self) -> dict[str, float]:
        """The learning rate of the last step."""
        return {"lr": float(self.optimizer.param_groups[0]["lr"])}

    def step(self, batch: Batch, progress: float) -> Tensor:
        """Take the optimizer's step; every so often, at the learning rate that the losses along it suggest."""
        due = self.steps % self.config.every == 0
        self.steps += 1
        if not due:
            return super().step(batch, progress)
        params = list(self.model.parameters())
        before = [param.detach().clone() for param in params]
        loss = super().step(batch, progress)
        moves = [param.detach() - old for param, old in zip(params, before, strict=True)]

        def place(scale: float) -> None:
            with torch.no_grad():
                for param, old, move in zip(params, before, moves, strict=True):
                    param.copy_(old).add_(move, alpha=scale)

        losses = []
        buffers = [buffer.clone() for buffer in self.model.buffers()]
        for scale in (-1.0, 1.0):
            place(scale)
            with torch.no_grad():
                losses.append(self.loss(self.model(batch[0]), batch[1]).item())
        for buffer, old in zip(self.model.buffers(), buffers, strict=True):
            buffer.copy_(old)
        factor = self.factor(losses[0], loss.item(), losses[1])
        place(factor)
        for group in self.optimizer.param_groups:
            group["lr"] *= factor
        return loss

    def state_dict(self) -> dict[str, Any]:
        """The optimizer's state and the number of steps taken."""
        return {"optimizer": super().state_dict(), "steps": self.steps}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore both."""
        super().load_state_dict(state["optimizer"])
        self.steps = state["steps"]

    @staticmethod
    def factor(before: float, here: float, after: float) -> float:
        """What the learning rate is multiplied by, from the losses at −1, 0 and 1 steps."""
        if not all(map(math.isfinite, (before, here, after))):
            return 0.5
        scale = best_scale(before, here, after)
        return 1.0 if scale is None else SMOOTHING + (1 - SMOOTHING) * min(max(scale, 0.5), 2.0)
