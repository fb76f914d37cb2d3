"""Domains of hyperparameters: smooth bijections from the reals, so that a gradient step never leaves the set.

`POSITIVE` is (0, ∞), by exp: learning rates, epsilons, damping, exponents, decay strengths. `UNIT_INTERVAL` is (0, 1),
by the logistic function. `AVERAGING` is the same set for momentum and betas, which no one-step objective can judge.
"""

import math

import torch
from torch import Tensor

from apo.types import Domain


def _is_positive(value: float) -> bool:
    return 0.0 < value < math.inf


def _is_fraction(value: float) -> bool:
    return 0.0 < value < 1.0


POSITIVE = Domain("(0, ∞)", _is_positive, torch.exp, torch.log)
UNIT_INTERVAL = Domain("(0, 1)", _is_fraction, torch.sigmoid, torch.logit)
AVERAGING = UNIT_INTERVAL._replace(one_step=False)


def hyper(name: str, value: float, *, below: float = math.inf, zero: bool = True) -> Tensor:
    """A hyperparameter as a 0-d float64 tensor, checked.

    Args:
        name: What the hyperparameter is called, for the message.
        value: A real number.
        below: The value must be below this.
        zero: Whether 0 is legal (it cannot be adapted, but it can be used).

    Returns:
        The value, [] in float64 on the CPU.

    Raises:
        TypeError: If the value is not a real number.
        ValueError: If it is outside the set.
    """
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise TypeError(f"{name} must be a float, not {value!r} of type {type(value).__name__}")
    if not (0.0 <= value < below) or (value == 0.0 and not zero):
        upper = "∞" if below == math.inf else f"{below:g}"
        raise ValueError(f"{name}={value!r} is not in {'[' if zero else '('}0, {upper})")
    return torch.tensor(float(value), dtype=torch.float64)


def shift(domain: Domain, value: float, offset: float) -> tuple[float, float]:
    """Move a value by an offset along the unconstrained coordinate of its domain.

    Args:
        domain: The domain of the value.
        value: A number in the domain.
        offset: The displacement u in the unconstrained coordinate.

    Returns:
        The moved value, exactly ``value`` at offset 0, and its derivative with respect to the offset.

    Raises:
        ValueError: If the value is outside the domain.
    """
    if not domain.contains(value):
        raise ValueError(f"{value!r} is not in {domain.name}, so it cannot be adapted")
    free = (domain.unconstrain(torch.tensor(value, dtype=torch.float64)) + offset).requires_grad_()
    with torch.enable_grad():
        moved = domain.constrain(free)
    (derivative,) = torch.autograd.grad(moved, free)
    return (value if offset == 0.0 else moved.item()), derivative.item()
