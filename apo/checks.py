"""Checks of arguments: what was given, what is allowed."""

import math
from collections.abc import Sequence
from typing import Any


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
    try:
        wrong = isinstance(value, bool | type) or not hasattr(value, "__float__")
        number = math.nan if wrong else float(value)
    except OverflowError:
        number = math.inf
    except Exception:  # an array of several numbers, say
        wrong = True
    if wrong:
        raise TypeError(f"{name} must be a float, not {value!r} of type {type(value).__name__}")
    above = number >= low if ends[0] == "[" else number > low
    below = number <= high if ends[1] == "]" else number < high
    if not (above and below):
        top = "∞" if high == math.inf else f"{high:g}"
        raise ValueError(f"{name}={value!r} is not in {ends[0]}{low:g}, {top}{ends[1]}")
    return number


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


def function(**arguments: Any) -> None:
    """Raise if an argument is neither a function nor None; a class is none, its instances may be.

    Raises:
        TypeError: If one is not.
    """
    for name, value in arguments.items():
        if value is not None and (isinstance(value, type) or not callable(value)):
            raise TypeError(f"{name}={value!r} must be a function (an instance, not a class) or None")


def instance(name: str, value: Any, kind: type, wanted: str) -> None:
    """Raise if a value is not of a type, saying what is wanted.

    Raises:
        TypeError: If it is not.
    """
    if not isinstance(value, kind):
        raise TypeError(f"{name}={value!r} must be {wanted}")
