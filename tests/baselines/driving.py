"""Plans without training."""

from collections.abc import Callable
from typing import Any

from baselines.cells import Cell
from baselines.config import Config
from baselines.plans import Plan


def drive(plan: Plan[Any], cell: Callable[[Config], Cell]) -> tuple[Any, list[Config]]:
    """What a plan returns if runs end in the cells that a function gives, and what it asked for, in order."""
    asked = []
    try:
        wanted = next(plan)
        while True:
            asked += wanted
            wanted = plan.send([cell(config) for config in wanted])
    except StopIteration as stop:
        return stop.value, asked
