"""Where tuned numbers act: on which hyperparameter of which group or parameter."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from apo.bases.base import Base
from apo.checkpoint import number
from apo.checks import real
from apo.hypers import Coordinate, Tune
from apo.types import Domain

START = "start_lr"
"""The key under which a group keeps the learning rate that it was given first; a scheduler's own comes before it."""

FARTHEST = 500.0
"""Offsets stay below this, so that factors stay finite."""
BELOW, ABOVE = 1e-6, 1e-12
"""A learning rate this near to zero, against its start, is rounding; below zero it may be that of a float32 tensor."""


class Place(NamedTuple):
    """Where a coordinate acts: on a hyperparameter of a group, or of one parameter in it ("" for the whole group)."""

    coordinate: Coordinate
    domain: Domain
    group: int
    name: str


def places_of(tune: Mapping[str, Tune], bases: Sequence[Base]) -> list[Place]:
    """Every place where a coordinate acts, in the order of ``tune``, groups and parameters."""
    places = []
    for hyper, how in tune.items():
        for base in bases:
            if hyper not in base.domains:
                continue
            for index, group in enumerate(base.optimizer.param_groups, base.first):
                names = [base.names[param] for param in group["params"]] if how.by_parameter else [""]
                domain = base.domains[hyper]
                places += [Place(base.coordinate(hyper, group, name), domain, index, name) for name in names]
    return places


def start_of(group: Mapping[str, Any], hyper: str) -> float:
    """A group's own number, at offset 0: for a learning rate, the unit of its schedule.

    That is where the schedule started, or the peak that OneCycleLR rises to and leaves in the group.

    Raises:
        TypeError: If it is no number.
        ValueError: If it is negative or not finite.
    """
    if hyper != "lr":
        return real(hyper, group[hyper])
    return real("lr", group.get("max_lr") or group.get("initial_lr") or group.get(START) or group["lr"])


def rate_of(group: Mapping[str, Any]) -> float:
    """A group's learning rate; what rounding leaves of it where a schedule ends at 0, as LinearLR does, is 0.

    Raises:
        TypeError: If it is no number.
        ValueError: If it is negative or not finite.
    """
    rate = group.get("lr", 0.0)
    if hasattr(rate, "__float__") and rate and -BELOW < float(rate) / (start_of(group, "lr") or 1.0) < ABOVE:
        return 0.0
    return real("lr", rate)


def offset_of(numbers: Mapping[str, Any], coordinate: Coordinate) -> float:
    """The offset of a coordinate in a checkpoint; if it is not there, the mean over its hyperparameter's."""
    label = f"offset/{coordinate.label}"
    names = [name for name in numbers if name.split("/")[:2] == ["offset", coordinate.hyper]]
    found = [number(numbers, name, 0.0) for name in ([label] if label in names else names)]
    offset = sum(found) / len(found) if found else 0.0
    if abs(offset) >= FARTHEST:
        raise ValueError(f"the checkpoint's {label}={offset!r} is not within (-{FARTHEST:g}, {FARTHEST:g})")
    return offset
