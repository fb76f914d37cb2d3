"""Checkpoints: the base optimizers' own, with what the tuning knows in the groups.

Distributed checkpointing keeps what is in the groups and drops what stands beside them; so every group carries a copy.
It also wants the keys of a new optimizer to be those of the checkpoint; so the numbers, of which there are more or
fewer as the training goes, are one text: a JSON object. Format 1.
"""

import json
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

import torch

from apo.checks import short

FORMAT = 1
FORMAT_KEY, NUMBERS_KEY = "apo/format", "apo/numbers"
MOST = 2**53
"""No count is above this."""
BLANK = {FORMAT_KEY: FORMAT, NUMBERS_KEY: ""}
"""What live groups hold under these keys: distributed checkpointing looks there for the names of what to load."""

State = dict[str, Any]
Numbers = Mapping[str, float]
Number = TypeVar("Number", int, float)
Fields = TypeVar("Fields")


@dataclass
class Counts:
    """What the shell counts.

    Attributes:
        steps: Steps taken.
        counted: Those that moved something; meta-steps are numbers 1, 1 + every, ... of these.
        skipped: Steps and meta-steps skipped because of numbers that are not finite.
        without_other: Meta-steps that lacked another batch for the function-space term.
        frozen: 1 while nothing is tuned by the user's wish, else 0.
    """

    steps: int = 0
    counted: int = 0
    skipped: int = 0
    without_other: int = 0
    frozen: int = 0


def restored(fields: Fields, numbers: Numbers, prefix: str = "") -> Fields:
    """A fresh dataclass, set to the numbers of a checkpoint; one without any, a bare optimizer's, leaves it as it is.

    Raises:
        ValueError: If a number is missing, or of the wrong kind.
    """
    for name, value in vars(fields).items():
        setattr(fields, name, number(numbers, prefix + name, value))
    return fields


def number(numbers: Numbers, name: str, default: Number) -> Number:
    """A number of a checkpoint, of the type of its default; the default if there are none at all.

    Raises:
        ValueError: If it is missing, not finite, or of another type.
    """
    if not numbers:
        return default
    if name not in numbers:
        raise ValueError(f"the checkpoint's tuning lacks {name!r}: it is damaged, and nothing of it has been loaded")
    value = numbers[name]
    counts = type(default) is int
    if not math.isfinite(value) or (counts and (type(value) is not int or value < 0)):
        kind = "a count" if counts else "finite"
        raise ValueError(f"the checkpoint's {name}={value!r} is not {kind}: it is damaged, and nothing has been loaded")
    return type(default)(value)


@contextmanager
def packed(groups: Iterable[State], numbers: Numbers) -> Iterator[None]:
    """Have the tuning's numbers in live groups for a while."""
    text = json.dumps(numbers)
    for group in groups:
        group |= {FORMAT_KEY: FORMAT, NUMBERS_KEY: text}
    try:
        yield
    finally:
        for group in groups:
            group |= BLANK


def unpack(state_dict: Any) -> tuple[State, Numbers]:
    """Take the tuning's numbers out of a state dict; there are none in a bare optimizer's.

    Raises:
        ValueError: If it is not the state dict of an optimizer, of a newer format, or damaged.
    """
    parts = {"state": Mapping, "param_groups": Sequence}
    for part, kind in parts.items():
        if not isinstance(state_dict, Mapping) or not isinstance(state_dict.get(part), kind):
            raise ValueError(f"{short(state_dict)} is no optimizer's state dict: it has no {part!r}")
    groups: list[State] = []
    numbers: Numbers = {}
    for group in state_dict["param_groups"]:
        if not isinstance(group, Mapping) or not isinstance(group.get("params"), list):
            raise ValueError(f"the checkpoint's group {short(group)} has no list of 'params': it is damaged")
        version = group.get(FORMAT_KEY, FORMAT)
        if type(version) is not int or version > FORMAT:
            newer = f"newer than {FORMAT}: update apo to load it" if type(version) is int else "which is no number"
            raise ValueError(f"the checkpoint is of format {version!r}, {newer}")
        numbers = numbers or _parsed(group.get(NUMBERS_KEY, ""))
        groups.append({**group, **BLANK})
    return {**state_dict, "param_groups": groups}, numbers


def split(state_dict: State, optimizers: Sequence[torch.optim.Optimizer]) -> list[State]:
    """One state dict for each optimizer, with positions counted from its own first parameter.

    Parameters may go by position or, as distributed checkpointing has it, by name: what counts is their order.

    Raises:
        ValueError: If the number of groups, or of parameters in one, differs, a group lacks an option of a rule, or
            the state of a parameter is no dict.
    """
    theirs = [len(group["params"]) for group in state_dict["param_groups"]]
    ours = [len(group["params"]) for optimizer in optimizers for group in optimizer.param_groups]
    if theirs != ours:
        raise ValueError(f"the checkpoint has groups of {theirs} parameters, this optimizer has groups of {ours}")
    for key, entry in state_dict["state"].items():
        if not isinstance(entry, Mapping):
            raise ValueError(f"the checkpoint's state of parameter {key!r} is {short(entry)}, not a dict")
    parts, groups = [], list(state_dict["param_groups"])
    for optimizer in optimizers:
        own, groups = groups[: len(optimizer.param_groups)], groups[len(optimizer.param_groups) :]
        check_complete(own, getattr(optimizer, "required", ()))
        place = {key: i for i, key in enumerate(key for group in own for key in group["params"])}
        state = {place[key]: entry for key, entry in state_dict["state"].items() if key in place}
        moved = [{**group, "params": [place[key] for key in group["params"]]} for group in own]
        parts.append({**state_dict, "state": state, "param_groups": moved})
    return parts


def check_complete(groups: Iterable[State], options: Iterable[str]) -> None:
    """Raise if a group that has been loaded lacks an option.

    Raises:
        ValueError: If one does.
    """
    lacking = sorted({name for name in options for group in groups if name not in group})
    if lacking:
        names = ", ".join(map(repr, lacking))
        raise ValueError(f"the checkpoint's groups lack {names}: it is of another optimizer")


def makes_states(groups: Iterable[State]) -> bool:
    """Whether a step at these groups is distributed checkpointing's: all learning rates and all gradients are zero.

    It takes such a step so that the state of every parameter is there for it to load into.
    """
    if any(group.get("lr", 0.0) != 0.0 for group in groups):
        return False
    grads = [param.grad for group in groups for param in group["params"] if param.grad is not None]
    return bool(grads) and not any(bool(torch.any(grad != 0)) for grad in grads)


def _parsed(text: Any) -> Numbers:
    if text == "":
        return {}
    try:
        numbers = json.loads(text)
    except (TypeError, ValueError) as error:
        raise ValueError(f"the checkpoint's {NUMBERS_KEY} cannot be read ({error}): it is damaged") from None
    if not isinstance(numbers, dict) or not numbers:
        raise ValueError(f"the checkpoint's {NUMBERS_KEY} is {short(numbers)}, not numbers by name: it is damaged")
    for name, value in numbers.items():
        if type(value) not in (int, float) or (type(value) is int and abs(value) > MOST):
            raise ValueError(f"the checkpoint's {name}={short(value)} is not a number: it is damaged")
    return numbers
