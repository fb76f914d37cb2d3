"""Checkpoints: the base optimizers' own, with what the tuning knows as plain numbers in the groups.

Distributed checkpointing keeps what is in the groups and drops what stands beside them; so every group carries a copy,
under names that begin with "apo/". Format 1.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

FORMAT = 1
PREFIX = "apo/"

State = dict[str, Any]


@dataclass
class Counts:
    """What the shell counts.

    Attributes:
        steps: Steps taken.
        counted: Those that moved something; meta-steps are numbers 1, 1 + every, ... of these.
        skipped: Steps and meta-steps skipped because of numbers that are not finite.
        without_other: Meta-steps that lacked another batch for the function-space term.
    """

    steps: int = 0
    counted: int = 0
    skipped: int = 0
    without_other: int = 0

    def restore(self, numbers: Mapping[str, Any]) -> None:
        """Take back counts by their names; those that are missing start afresh."""
        for name in vars(self):
            setattr(self, name, int(numbers.get(name, 0)))


def pack(state_dict: State, numbers: dict[str, Any]) -> State:
    """Put the tuning's numbers into every group of a state dict."""
    extra = {PREFIX + name: value for name, value in {"format": FORMAT, **numbers}.items()}
    return {**state_dict, "param_groups": [{**group, **extra} for group in state_dict["param_groups"]]}


def unpack(state_dict: State) -> tuple[State, dict[str, Any]]:
    """Take the tuning's numbers out of a state dict; there are none in a bare optimizer's.

    Raises:
        ValueError: If they are of a newer format.
    """
    groups: list[State] = []
    numbers: dict[str, Any] = {}
    for group in state_dict["param_groups"]:
        groups.append({name: value for name, value in group.items() if not name.startswith(PREFIX)})
        numbers |= {name.removeprefix(PREFIX): v for name, v in group.items() if name.startswith(PREFIX)}
    if numbers.get("format", FORMAT) > FORMAT:
        raise ValueError(f"the checkpoint is of format {numbers['format']}, newer than {FORMAT}: update apo to load it")
    return {**state_dict, "param_groups": groups}, numbers


def split(state_dict: State, optimizers: Sequence[torch.optim.Optimizer]) -> list[State]:
    """One state dict for each optimizer, with positions counted from its own first parameter.

    Raises:
        ValueError: If the number of groups, or of parameters in one, differs, or a group lacks an option of a rule.
    """
    theirs = [len(group["params"]) for group in state_dict["param_groups"]]
    ours = [len(group["params"]) for optimizer in optimizers for group in optimizer.param_groups]
    if theirs != ours:
        raise ValueError(f"the checkpoint has groups of {theirs} parameters, this optimizer has groups of {ours}")
    parts, groups, first = [], list(state_dict["param_groups"]), 0
    for optimizer in optimizers:
        own, groups = groups[: len(optimizer.param_groups)], groups[len(optimizer.param_groups) :]
        lacking = sorted({name for group in own for name in getattr(optimizer, "required", ()) if name not in group})
        if lacking:
            names = ", ".join(map(repr, lacking))
            raise ValueError(f"the checkpoint's groups lack {names}: it is of another optimizer")
        count = sum(len(group["params"]) for group in own)
        positions = range(first, first + count)
        state = {i - first: entry for i, entry in state_dict["state"].items() if i in positions}
        moved = [{**group, "params": [i - first for i in group["params"]]} for group in own]
        parts.append({**state_dict, "state": state, "param_groups": moved})
        first += count
    return parts
