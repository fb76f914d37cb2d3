"""The momentum-free direction of torch's own optimizers, ahead of their step.

A learning rate is judged along the direction that the optimizer would take without momentum; momentum then acts on
top (the paper, §5 and App. G). Each function below is given a parameter group, the parameter's state before the step,
its gradient and its value, and returns d in θ' = θ − lr·d, weight decay included, so many times; it changes nothing.
"""

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

Group = dict[str, Any]
LEAST = 1e-3
"""A β below it is not divided by: what is averaged could become too large."""
Direction = Callable[[Group, dict[str, Any], Tensor, Tensor, float], Tensor]


def sgd(group: Group, state: dict[str, Any], grad: Tensor, param: Tensor, times: float = 1.0) -> Tensor:
    """The gradient."""
    return times * _l2(group, grad, param)


def adam(group: Group, state: dict[str, Any], grad: Tensor, param: Tensor, times: float = 1.0) -> Tensor:
    """The gradient over √v̂ + ε; Adam and NAdam."""
    grad, decay = _split(group, grad, param, times)
    square, unit = _square(state, "exp_avg_sq", group["betas"][1], grad)
    if group.get("amsgrad") and state:
        square = torch.maximum(square, state["max_exp_avg_sq"].to(grad.dtype) / unit)
    return _over(times, grad, square, unit / _correction(group, state), group["eps"], decay)


def adamw(group: Group, state: dict[str, Any], grad: Tensor, param: Tensor, times: float = 1.0) -> Tensor:
    """As `adam`, with the decay decoupled; groups of older versions of torch do not say so themselves."""
    return adam({**group, "decoupled_weight_decay": True}, state, grad, param, times)


def sparse_adam(group: Group, state: dict[str, Any], grad: Tensor, param: Tensor, times: float = 1.0) -> Tensor:
    """As `adam` without a decay, where the gradient has rows; ε is added before the correction."""
    square, unit = _square(state, "exp_avg_sq", group["betas"][1], grad)
    sign = -1.0 if group["maximize"] else 1.0
    return _over(sign * math.sqrt(_correction(group, state)) * times, grad, square, unit, group["eps"])


def radam(group: Group, state: dict[str, Any], grad: Tensor, param: Tensor, times: float = 1.0) -> Tensor:
    """The gradient, rectified once the variance is tractable."""
    grad, decay = _split(group, grad, param, times)
    beta, correction = group["betas"][1], _correction(group, state)
    longest = 2.0 / (1.0 - beta) - 1.0
    length = longest - 2.0 * _count(state) * (1.0 - correction) / correction
    if length <= 5.0:
        return times * grad if decay is None else decay.add_(grad, alpha=times)
    rectifier = math.sqrt((length - 4) * (length - 2) * longest / ((longest - 4) * (longest - 2) * length))
    square, unit = _square(state, "exp_avg_sq", beta, grad)
    return _over(times * rectifier * math.sqrt(correction), grad, square, unit, group["eps"], decay)


def adamax(group: Group, state: dict[str, Any], grad: Tensor, param: Tensor, times: float = 1.0) -> Tensor:
    """The gradient over the infinity norm."""
    grad = _l2(group, grad, param)
    largest = grad.abs().add_(group["eps"])
    if state:
        largest = torch.maximum(group["betas"][1] * state["exp_inf"].to(grad.dtype), largest)
    return torch.div(grad, largest, out=largest).mul_(times)


def rmsprop(group: Group, state: dict[str, Any], grad: Tensor, param: Tensor, times: float = 1.0) -> Tensor:
    """The gradient over √s + ε."""
    grad = _l2(group, grad, param)
    square, unit = _square(state, "square_avg", group["alpha"], grad)
    if group["centered"]:
        fresh = (1.0 - group["alpha"]) * grad
        mean = fresh.add_(state["grad_avg"], alpha=group["alpha"]) if state else fresh
        square = square.addcmul_(mean, mean, value=-1.0 / unit)
    return _over(times, grad, square, unit, group["eps"])


def _l2(group: Group, grad: Tensor, param: Tensor) -> Tensor:
    grad = -grad if group["maximize"] else grad
    return grad.add(param, alpha=group["weight_decay"]) if group["weight_decay"] else grad


def _split(group: Group, grad: Tensor, param: Tensor, times: float) -> tuple[Tensor, Tensor | None]:
    """The gradient, and so many times the decay if it is decoupled (else it is in the gradient)."""
    if group.get("decoupled_weight_decay") and group["weight_decay"]:
        return -grad if group["maximize"] else grad, times * group["weight_decay"] * param
    return _l2(group, grad, param), None


def _over(times: float, grad: Tensor, square: Tensor, unit: float, eps: float, decay: Tensor | None = None) -> Tensor:
    """times·g / (√(unit·square) + ε) + decay, in the place of the square, in as few passes as there can be."""
    if not unit:
        return (times / eps * grad) if decay is None else decay.add_(grad, alpha=times / eps)
    root = math.sqrt(unit)
    start = grad.new_zeros(()) if decay is None else decay
    denominator = square.sqrt_().add_(eps / root)
    return torch.addcdiv(start, grad, denominator, value=times / root, out=denominator)


def _square(state: dict[str, Any], key: str, beta: float, grad: Tensor) -> tuple[Tensor, float]:
    """The running average of g² after the step over a number, and that; before the first step there is no state."""
    if not state:
        return grad.square(), 1.0 - beta
    if beta < LEAST:
        return (beta * state[key].to(grad.dtype)).addcmul_(grad, grad, value=1.0 - beta), 1.0
    return torch.addcmul(state[key].to(grad.dtype), grad, grad, value=(1.0 - beta) / beta), beta


def _count(state: dict[str, Any]) -> float:
    """The number of steps after the step."""
    return float(state["step"]) + 1.0 if state else 1.0


def _correction(group: Group, state: dict[str, Any]) -> float:
    """What v lacks for having started at zero, 1 − βᵗ."""
    return float(1.0 - group["betas"][1] ** _count(state))


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
    """What v ← μv + (1 − τ)g tends to, over g, with Nesterov's look ahead or without: (1 − τ) / (1 − μ)."""
    mu, share = momentum(group), 1.0 - float(group.get("dampening", 0.0))
    return share / (1.0 - mu) if mu < 1.0 and share > 0.0 else 1.0
