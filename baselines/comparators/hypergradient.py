"""Hypergradient descent: the learning rate follows the derivative of the last loss by the last learning rate.

    h = ∂f(θ_{t−1} − α u_{t−1}) / ∂α = −gᵀu_{t−1},    α_t = α_{t−1} − βh,    θ_t = θ_{t−1} − α_t u_t

with u the optimizer's direction: g (SGD-HD), g + μv (SGDN-HD), m̂/(√v̂ + ε) (Adam-HD). Source: Baydin et al. 2018
(arXiv 1703.04782), the additive rule. The authors' code (gbaydin/hypergradient-descent) is no package and calls torch
as it was in 2018. As there, weight decay is part of g, and α may become negative: nothing guards it.
"""

from typing import TYPE_CHECKING, Any, Final

import torch
from torch import Tensor, nn

from baselines.comparators.contract import Batch, OptimizerMethod
from baselines.optimizers import make_base

if TYPE_CHECKING:
    from baselines.config import Config

RATES: Final = {"sgd": 1e-3, "sgdm": 1e-3, "adam": 1e-7}  # β in the paper's MNIST experiments


class Hypergradient(OptimizerMethod):
    """SGD-HD, SGDN-HD or Adam-HD, on top of `torch.optim`."""

    def __init__(self, model: nn.Module, config: "Config") -> None:
        super().__init__(model, config)
        base = make_base(model, config)
        assert isinstance(base, torch.optim.Optimizer)  # of the optimizers in RATES, without --rule
        self.optimizer = base
        self.rate = RATES[config.optimizer] if config.meta_lr is None else config.meta_lr
        self.directions: list[Tensor] = []  # u of the last step; none before the first

    def hypers(self) -> dict[str, float]:
        """The learning rate α of the last step."""
        return {"lr": self.optimizer.param_groups[0]["lr"]}

    def step(self, batch: Batch, progress: float) -> Tensor:
        """Move the learning rate by the gradient of this batch, then the weights by both."""
        loss = self.differentiate(batch)
        (group,) = self.optimizer.param_groups
        params: list[nn.Parameter] = group["params"]
        decay = group["weight_decay"]
        grads = [param.grad.add(param.detach(), alpha=decay) for param in params if param.grad is not None]
        products = [torch.vdot(g.flatten(), u.flatten()) for g, u in zip(grads, self.directions, strict=False)]
        group["lr"] += self.rate * sum(product.item() for product in products)
        self.optimizer.step()
        states = [self.optimizer.state[param] for param in params]
        self.directions = [self._direction(g, state, group) for g, state in zip(grads, states, strict=True)]
        return loss

    @staticmethod
    def _direction(grad: Tensor, state: dict[str, Any], group: dict[str, Any]) -> Tensor:
        """What lr was multiplied by in the step that has been taken."""
        if "exp_avg" in state:
            beta1, beta2 = group["betas"]
            taken = state["step"].item()  # of float32, which would round the corrections
            mean = state["exp_avg"] / (1 - beta1**taken)
            return mean / ((state["exp_avg_sq"] / (1 - beta2**taken)).sqrt() + group["eps"])
        return grad + group["momentum"] * state["momentum_buffer"] if group["momentum"] else grad

    def state_dict(self) -> dict[str, Any]:
        """The optimizer's state and the last direction."""
        return {"optimizer": super().state_dict(), "directions": self.directions}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore both."""
        super().load_state_dict(state["optimizer"])
        device = next(self.model.parameters()).device
        self.directions = [direction.to(device) for direction in state["directions"]]
