"""The momentum-free direction of torch's own optimizers, ahead of their step.

A learning rate is judged along the direction that the optimizer would take without momentum; momentum then acts on
top (the paper, §5 and App. G). Each function below is given a parameter group, the parameter's state before the step,
its gradient and its value, and returns d in θ' = θ − lr·d, weight decay included; it changes nothing.
"""

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

Group = dict[str, Any]
Direction = Callable[[Group, dict[str, Any], Tensor, Tensor], Tensor]


def sgd(group: Group, state: dict[str, Any], grad: Tensor, param: Tensor) -> Tensor:
    """The gradient."""
    return _l2(group, grad, param)


def adam(group: Group, state: dict[str, Any], grad: Tensor, param: Tensor) -> Tensor:
    """The gradient over √v̂ + ε; Adam and NAdam."""
    grad, decay = _split(group, grad, param)
    beta = group["betas"][1]
    correction = 1.0 - beta ** _count(state)
    square = _square(state, "exp_avg_sq", beta, grad, correction)
    if group.get("amsgrad") and state:
        square = torch.maximum(square, state["max_exp_avg_sq"].to(grad.dtype) / correction)
    return _over(grad, square.sqrt_().add_(group["eps"]), decay)


def adamw(group: Group, state: dict[str, Any], grad: Tensor, param: Tensor) -> Tensor:
    """As `adam`, with the decay decoupled; groups of older versions of torch do not say so themselves."""
    return adam({**group, "decoupled_weight_decay": True}, state, grad, param)


def sparse_adam(group: Group, state: dict[str, Any], grad: Tensor, param: Tensor) -> Tensor:
    """As `adam` without a decay, where the gradient has rows; ε is added before the correction."""
    beta = group["betas"][1]
    square = _square(state, "exp_avg_sq", beta, grad)
    sign = -1.0 if group["maximize"] else 1.0
    return _over(sign * math.sqrt(1.0 - beta ** _count(state)) * grad, square.sqrt_().add_(group["eps"]))


def radam(group: Group, state: dict[str, Any], grad: Tensor, param: Tensor) -> Tensor:
    """The gradient, rectified once the variance is tractable."""
    grad, decay = _split(group, grad, param)
    beta, step = group["betas"][1], _count(state)
    correction = 1.0 - beta**step
    longest = 2.0 / (1.0 - beta) - 1.0
    length = longest - 2.0 * step * beta**step / correction
    if length <= 5.0:
        return grad if decay is None else grad + decay
    rectifier = math.sqrt((length - 4) * (length - 2) * longest / ((longest - 4) * (longest - 2) * length))
    square = _square(state, "exp_avg_sq", beta, grad)
    return _over(grad, square.sqrt_().add_(group["eps"]).div_(rectifier * math.sqrt(correction)), decay)


def adamax(group: Group, state: dict[str, Any], grad: Tensor, param: Tensor) -> Tensor:
    """The gradient over the infinity norm."""
    grad = _l2(group, grad, param)
    largest = grad.abs().add_(group["eps"])
    if state:
        largest = torch.maximum(group["betas"][1] * state["exp_inf"].to(grad.dtype), largest)
    return _over(grad, largest)


def rmsprop(group: Group, state: dict[str, Any], grad: Tensor, param: Tensor) -> Tensor:
    """The gradient over √s + ε."""
    grad = _l2(group, grad, param)
    square = _square(state, "square_avg", group["alpha"], grad)
    if group["centered"]:
        fresh = (1.0 - group["alpha"]) * grad
        mean = fresh.add_(state["grad_avg"], alpha=group["alpha"]) if state else fresh
        square = square.addcmul_(mean, mean, value=-1.0)
    return _over(grad, square.sqrt_().add_(group["eps"]))


def _l2(group: Group, grad: Tensor, param: Tensor) -> Tensor:
    grad = -grad if group["maximize"] else grad
    return grad.add(param, alpha=group["weight_decay"]) if group["weight_decay"] else grad


def _split(group: Group, grad: Tensor, param: Tensor) -> tuple[Tensor, Tensor | None]:
    """The gradient, and the decay if it is decoupled (else it is in the gradient)."""
    if group.get("decoupled_weight_decay") and group["weight_decay"]:
        return -grad if group["maximize"] else grad, group["weight_decay"] * param
    return _l2(group, grad, param), None


def _over(grad: Tensor, denominator: Tensor, decay: Tensor | None = None) -> Tensor:
    """The quotient, in the place of the denominator, and the decay."""
    direction = torch.div(grad, denominator, out=denominator)
    return direction if decay is None else direction.add_(decay)


def _square(state: dict[str, Any], key: str, beta: float, grad: Tensor, over: float = 1.0) -> Tensor:
    """The running average of g² after the step, over a number; before the first step there is no state."""
    if not state:
        return grad.square().mul_((1.0 - beta) / over)
    return torch.mul(state[key].to(grad.dtype), beta / over).addcmul_(grad, grad, value=(1.0 - beta) / over)


def _count(state: dict[str, Any]) -> float:
    """The number of steps after the step."""
    return float(state["step"]) + 1.0 if state else 1.0


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


def momentum(group: Mapping[str, Any]) -> float:
    """The averaging coefficient of a group's momentum, 0 if it has none."""
    if "betas" in group:
        return float(group["betas"][0])
    return float(group.get("momentum", 0.0) or 0.0)


def gain(group: Mapping[str, Any]) -> float:
    """What v ← μv + (1 − τ)g tends to, over the gradient g: (1 − τ) / (1 − μ), with Nesterov's look ahead or without."""
    mu = momentum(group)
    return (1.0 - float(group.get("dampening", 0.0))) / (1.0 - mu) if mu else 1.0
