"""Domains of hyperparameters: smooth bijections from the reals, so that a gradient step never leaves the set.

`POSITIVE` is (0, ∞), by exp: learning rates, epsilons, decay strengths. `EXPONENT` and `DAMPING` are the same set for
what must move slowly: powers change a step by orders of magnitude, and so does what is added to curvature.
`UNIT_INTERVAL` is (0, 1), by the logistic function.
`AVERAGING` is that set for momentum and betas, which no one-step objective can judge.
"""

import math
from typing import Any

import torch
from torch import Tensor

from apo.checks import number, real
from apo.trees import scalar
from apo.types import Domain


def _is_positive(value: float) -> bool:
    return 0.0 < value < math.inf


def _is_fraction(value: float) -> bool:
    return 0.0 < value < 1.0


POSITIVE = Domain("(0, ∞)", _is_positive, torch.exp, torch.log)
UNIT_INTERVAL = Domain("(0, 1)", _is_fraction, torch.sigmoid, torch.logit)
AVERAGING = UNIT_INTERVAL._replace(one_step=False)
EXPONENT = POSITIVE._replace(pace=1.02)
DAMPING = POSITIVE._replace(pace=1.05)


def hyper(name: str, value: Any, *, below: float = math.inf) -> Tensor:
    """A hyperparameter as a 0-d float64 tensor, checked. Zero is legal: it cannot be adapted, but it can be used.

    Args:
        name: What the hyperparameter is called, for the message.
        value: A real number, at least 0.
        below: The value must be below this.

    Returns:
        The value, [] in float64 on the CPU.

    Raises:
        TypeError: If the value is not a real number.
        ValueError: If it is outside the set.
    """
    if isinstance(value, Tensor):
        raise TypeError(f"{name} must be a float, not {value!r} of type Tensor")
    return scalar(real(name, value, high=below))


def free(domain: Domain, value: float) -> float:
    """The unconstrained coordinate of a value.

    Raises:
        TypeError: If the value is not a real number.
        ValueError: If it is outside the domain.
    """
    value = number("value", value)
    if not domain.contains(value):
        raise ValueError(f"{value!r} is not in {domain.name}, so it cannot be adapted; drop it from tune=")
    return domain.unconstrain(scalar(value)).item()


def shift(domain: Domain, value: float, offset: float) -> float:
    """Move a value by an offset along the unconstrained coordinate of its domain.

    Args:
        domain: The domain of the value.
        value: A number in the domain.
        offset: The displacement u in the unconstrained coordinate.

    Returns:
        The moved value, exactly ``value`` at offset 0.

    Raises:
        TypeError: If the value or the offset is not a real number.
        ValueError: If the value is outside the domain.
    """
    coordinate, offset = free(domain, value), number("offset", offset)
    if offset == 0.0:
        return value
    return domain.constrain(scalar(coordinate + offset)).item()


def derivative(domain: Domain, value: float) -> float:
    """How fast a value moves with its unconstrained coordinate.

    Raises:
        ValueError: If the value is outside the domain.
    """
    coordinate = scalar(free(domain, value)).requires_grad_()
    with torch.enable_grad():
        moved = domain.constrain(coordinate)
    return torch.autograd.grad(moved, coordinate)[0].item()
