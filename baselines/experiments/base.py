"""What an experiment is: curves in panels, each the best of a search, and a report in the layout of its source."""

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any, Final, Literal, NamedTuple

from baselines.cells import Cell
from baselines.config import Config
from baselines.display import setting
from baselines.plans import Plan, best_of, search, walk

ROWS: Final = {"loss": "loss of the batches", "test_accuracy": "test accuracy (%)", "lr": "learning rate"}
Budget = Literal["smoke", "short", "full"]
BUDGETS: Final[tuple[Budget, ...]] = ("smoke", "short", "full")


def seeds_of(budget: Budget) -> int:
    """How many seeds the winners get."""
    return 1 if budget == "smoke" else 3


@dataclass(frozen=True)
class Curve:
    """One line of a figure and one row of its table: a configuration, and what is searched for it.

    Attributes:
        label: What it is called.
        config: The configuration, or where the search starts.
        walk: The field that is walked along the 1-3-10 grid, if one is.
        options: The values that are tried instead, as fields and values.
        against: The label of the curve of the same panel that it is compared with, if there is one.
        time_of: The curve whose winner's time the winner gets: it is run again with as many steps as fit.
        seeds: How many the winner is run with.
    """

    label: str
    config: Config
    walk: str | None = None
    options: tuple[Mapping[str, Any], ...] = ()
    against: str | None = None
    time_of: "Curve | None" = None
    seeds: int = 3

    def plan(self) -> Plan["Found"]:
        """The search, and the winner's seeds."""
        if self.walk is not None:
            plan = walk(self.config, name=self.walk)
        else:
            plan = search([dataclasses.replace(self.config, **option) for option in self.options or ({},)])
        winners, tried = yield from best_of(plan, self.seeds)
        if self.time_of is not None:
            reference = yield from self.time_of.plan()
            ratio = pace(reference.cells) / pace(winners)
            steps = winners[0].steps
            if math.isfinite(ratio):  # in an estimate nobody knows the pace
                # Two significant digits: small differences in pace make no other run.
                steps = max(1, int(float(f"{steps * ratio:.1e}")))
            winners = yield [dataclasses.replace(cell.config, steps=steps) for cell in winners]
        return Found(self, winners, tried)


class Found(NamedTuple):
    """What came of a curve.

    Attributes:
        curve: Which.
        cells: The winner's, one a seed.
        tried: All that the search tried with one seed, the best first.
    """

    curve: Curve
    cells: list[Cell]
    tried: list[Cell]

    @property
    def setting(self) -> str:
        """The searched value that won, as field and value; empty where nothing was searched."""
        return self.tried_setting(self.cells[0])

    def tried_setting(self, cell: Cell) -> str:
        """The searched value of a cell, as field and value."""
        names = [self.curve.walk] if self.curve.walk else sorted({name for o in self.curve.options for name in o})
        return setting(cell.config, names)

    @property
    def seconds(self) -> float:
        """Of training steps, of one run of the winner."""
        return fmean(cell.outcome["seconds"] or math.nan for cell in self.cells)

    @property
    def search_seconds(self) -> float:
        """Of training steps, of all runs that one seed's search took."""
        return sum(cell.outcome["seconds"] or math.nan for cell in self.tried)


Panels = dict[str, list[Curve]]


class Experiment(NamedTuple):
    """A table or figure that can be run again.

    Attributes:
        source: Where it is from: the paper, and the figure or table.
        title: What it shows.
        panels: The curves of each panel at a budget.
        departs: What is different here at each budget: the data set, the length, the sizes.
        rows: What the figure shows of a run, from top to bottom: the name of a curve, and its label.
        along: What the curves of the figure are drawn over.
        test: What the table gives of the test set; the perplexity is the exponential of its loss.
    """

    source: str
    title: str
    panels: Callable[[Budget], Panels]
    departs: Mapping[Budget, str]
    rows: Mapping[str, str] = ROWS
    along: Literal["step", "seconds"] = "step"
    test: Literal["accuracy", "loss", "perplexity"] = "accuracy"

    def plans(self, budget: Budget) -> dict[tuple[str, str], Plan[Found]]:
        """The plan of every curve, by panel and label."""
        return {(panel, curve.label): curve.plan() for panel, curves in self.panels(budget).items() for curve in curves}


def pace(cells: Sequence[Cell]) -> float:
    """Seconds a step, the mean over seeds."""
    return fmean((cell.outcome["seconds"] or math.nan) / cell.steps for cell in cells)
