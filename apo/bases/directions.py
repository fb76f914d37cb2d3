"""The momentum-free direction of torch's own optimizers, read from their state after a step.

A learning rate is judged along the direction that the optimizer would take without momentum; momentum then acts on
top (the paper, §5 and App. G). Each function below is given a parameter group, the parameter's state after the step,
its gradient and its value before the step, and returns d in θ' = θ − lr·d, weight decay included.
"""

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

Group = dict[str, Any]
Direction = Callable[[Group, dict[str, Any], Tensor, Tensor], Tensor]


def _l2(group: Group, grad: Tensor, before: Tensor) -> Tensor:
    grad = -grad if group["maximize"] else grad
    return grad.add(before, alpha=group["weight_decay"]) if group["weight_decay"] else grad


def _split(group: Group, grad: Tensor, before: Tensor) -> tuple[Tensor, Tensor | None]:
    """The gradient, and the decay if it is decoupled (else it is in the gradient)."""
    if group.get("decoupled_weight_decay") and group["weight_decay"]:
        return -grad if group["maximize"] else grad, group["weight_decay"] * before
    return _l2(group, grad, before), None


def _scaled(group: Group, grad: Tensor, before: Tensor, denominator: Tensor | float) -> Tensor:
    grad, decay = _split(group, grad, before)
    direction = grad / denominator
    return direction if decay is None else direction + decay


def sgd(group: Group, state: dict[str, Any], grad: Tensor, before: Tensor) -> Tensor:
    """The gradient."""
    return _l2(group, grad, before)


def adam(group: Group, state: dict[str, Any], grad: Tensor, before: Tensor) -> Tensor:
    """The gradient over √v̂ + ε; Adam and NAdam."""
    square = state["max_exp_avg_sq"] if group.get("amsgrad") else state["exp_avg_sq"]
    correction = 1.0 - group["betas"][1] ** float(state["step"])
    return _scaled(group, grad, before, (square / correction).sqrt_().add_(group["eps"]))


def adamw(group: Group, state: dict[str, Any], grad: Tensor, before: Tensor) -> Tensor:
    """As `adam`, with the decay decoupled; groups of older versions of torch do not say so themselves."""
    return adam({**group, "decoupled_weight_decay": True}, state, grad, before)


def sparse_adam(group: Group, state: dict[str, Any], grad: Tensor, before: Tensor) -> Tensor:
    """As `adam` without a decay, where the gradient has rows; ε is added before the correction."""
    correction = 1.0 - group["betas"][1] ** float(state["step"])
    direction: Tensor = grad * math.sqrt(correction) / state["exp_avg_sq"].sqrt().add_(group["eps"])
    return -direction if group["maximize"] else direction


def radam(group: Group, state: dict[str, Any], grad: Tensor, before: Tensor) -> Tensor:
    """The gradient, rectified once the variance is tractable."""
    beta, step = group["betas"][1], float(state["step"])
    correction = 1.0 - beta**step
    longest = 2.0 / (1.0 - beta) - 1.0
    length = longest - 2.0 * step * beta**step / correction
    if length <= 5.0:
        return _scaled(group, grad, before, 1.0)
    rectifier = math.sqrt((length - 4) * (length - 2) * longest / ((longest - 4) * (longest - 2) * length))
    denominator = state["exp_avg_sq"].sqrt().add_(group["eps"]).div_(rectifier * math.sqrt(correction))
    return _scaled(group, grad, before, denominator)


def adamax(group: Group, state: dict[str, Any], grad: Tensor, before: Tensor) -> Tensor:
    """The gradient over the infinity norm."""
    return _scaled(group, grad, before, state["exp_inf"])


def rmsprop(group: Group, state: dict[str, Any], grad: Tensor, before: Tensor) -> Tensor:
    """The gradient over √s + ε."""
    square = state["square_avg"]
    if group["centered"]:
        square = square.addcmul(state["grad_avg"], state["grad_avg"], value=-1.0)
    return _scaled(group, grad, before, square.sqrt().add_(group["eps"]))


BY_CLASS: dict[type[torch.optim.Optimizer], Direction] = {
    torch.optim.SGD: sgd,
    torch.optim.Adam: adam,
    torch.optim.AdamW: adamw,
    torch.optim.NAdam: adam,
    torch.optim.SparseAdam: sparse_adam,
    torch.optim.RAdam: radam,
    torch.optim.Adamax: adamax,
    torch.optim.RMSprop: rmsprop,
}
UNCORRECTED = (torch.optim.SGD, torch.optim.RMSprop)
"""Optimizers whose momentum builds up to 1 / (1 − μ) times the first step."""


def momentum(group: Group) -> float:
    """The averaging coefficient of a group's momentum, 0 if it has none."""
    if "betas" in group:
        return float(group["betas"][0])
    return float(group.get("momentum", 0.0) or 0.0)


def built_up(group: Group, first: float) -> float:
    """How much longer a group's steps become than its first one, of which a gradient of 1 made ``first``.

    v ← μv + (1 − τ)g tends to (1 − τ) / (1 − μ) times the gradient, with Nesterov's look ahead or without.
    """
    mu = momentum(group)
    return (1.0 - float(group.get("dampening", 0.0))) / ((1.0 - mu) * first) if mu else 1.0
