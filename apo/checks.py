"""Checks of arguments: what was given, what is allowed."""

import math
from collections.abc import Sequence
from typing import Any

from torch import Tensor

from apo.types import Rule


def short(value: Any) -> str:
    """What a value looks like, on one line and not at length."""
    text = " ".join(repr(value).split())
    return text if len(text) < 60 else f"{text[:60]}..."


def number(name: str, value: Any) -> float:
    """A real number as a float; one too large for floats is infinite.

    Raises:
        TypeError: If it is not a real number.
    """
    try:
        if not isinstance(value, bool | type) and hasattr(value, "__float__"):
            return float(value)
    except OverflowError:
        return math.inf if value > 0 else -math.inf
    except Exception as error:  # an array of several numbers, say
        raise TypeError(f"{name} must be a float, not {short(value)} of type {type(value).__name__}") from error
    raise TypeError(f"{name} must be a float, not {short(value)} of type {type(value).__name__}")


def real(name: str, value: Any, low: float = 0.0, high: float = math.inf, ends: str = "[)") -> float:
    """A real number in an interval, as a float.

    Args:
        name: What it is called.
        value: What was given.
        low: The lower end.
        high: The upper end.
        ends: Which ends belong to the interval, as in "[)".

    Returns:
        The number.

    Raises:
        TypeError: If it is not a real number.
        ValueError: If it is outside the interval.
    """
    given = number(name, value)
    above = given >= low if ends[0] == "[" else given > low
    below = given <= high if ends[1] == "]" else given < high
    if not (above and below):
        top = "∞" if high == math.inf else f"{high:g}"
        raise ValueError(f"{name}={value!r} is not in {ends[0]}{low:g}, {top}{ends[1]}")
    return given


def settle(holder: object, name: str, low: float = 0.0, high: float = math.inf, ends: str = "[)") -> None:
    """Check a field of a frozen dataclass as `real` does, and make it a float."""
    object.__setattr__(holder, name, real(name, getattr(holder, name), low, high, ends))


def choice(name: str, value: Any, allowed: Sequence[str]) -> None:
    """Raise if a value is not one of the allowed.

    Raises:
        ValueError: If it is not.
    """
    if not isinstance(value, str) or value not in allowed:
        raise ValueError(f"{name}={value!r} is not one of {', '.join(map(repr, allowed))}")


def flag(**arguments: Any) -> None:
    """Raise if an argument is not a bool.

    Raises:
        TypeError: If one is not.
    """
    for name, value in arguments.items():
        if not isinstance(value, bool):
            raise TypeError(f"{name}={value!r} must be True or False")


def whole(name: str, value: Any) -> None:
    """Raise if a value is not a positive int.

    Raises:
        TypeError: If it is not an int.
        ValueError: If it is below 1.
    """
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name}={value!r} must be an int")
    if value < 1:
        raise ValueError(f"{name}={value!r} is not at least 1")


def function(*, optional: bool = True, **arguments: Any) -> None:
    """Raise if an argument is neither a function nor, where it is optional, None; a class is no function here.

    Raises:
        TypeError: If one is not.
    """
    for name, value in arguments.items():
        if isinstance(value, type) or not (callable(value) or (optional and value is None)):
            wanted = f"a function (an instance, not a class){' or None' * optional}"
            raise TypeError(f"{name}={short(value)} must be {wanted}")


def instance(name: str, value: Any, kind: type, wanted: str) -> None:
    """Raise if a value is not of a type, saying what is wanted.

    Raises:
        TypeError: If it is not.
    """
    if not isinstance(value, kind):
        raise TypeError(f"{name}={short(value)} must be {wanted}")


def check_step(rule: Any, params: Any, grads: Any, state: Any, hypers: Any) -> None:
    """Raise if these are not a rule, parameters, gradients of them, and the rule's own state and hyperparameters.

    Raises:
        TypeError: If one is of the wrong type.
        ValueError: If a gradient is of no parameter, or of another shape.
    """
    instance("rule", rule, Rule, "an update rule, such as apo.sgd()")
    for name, value in (("params", params), ("grads", grads)):
        if not isinstance(value, dict) or not all(isinstance(tensor, Tensor) for tensor in value.values()):
            raise TypeError(f"{name}={value!r} must be a dict of tensors, keyed as model.named_parameters()")
    for key, grad in grads.items():
        if key not in params or grad.shape != params[key].shape:
            own = f"of shape {list(params[key].shape)}" if key in params else "not there"
            raise ValueError(f"grads[{key!r}] is of shape {list(grad.shape)}, but params[{key!r}] is {own}")
    if not isinstance(state, tuple) or not hasattr(state, "_fields"):
        raise TypeError(f"state={state!r} must be what rule.init(params) returned")
    if getattr(hypers, "_fields", None) != rule.hypers._fields:
        raise TypeError(f"hypers={hypers!r} must be like rule.hypers, with the fields {', '.join(rule.hypers._fields)}")
