"""How results are compared: the loss on the whole training set at the end, by its logarithm, over seeds.

A loss below `cells.FLOOR` counts as it: differences between such losses are noise.
"""

import math
from collections.abc import Sequence
from statistics import fmean, variance
from typing import NamedTuple

from baselines.cells import FLOOR, Cell


def score(cell: Cell) -> float:
    """The logarithm of the loss at the end, floored; infinite for a run that did not get there."""
    return math.log(max(cell.loss, FLOOR))


def rank(cell: Cell) -> tuple[float, float]:
    """What a search makes small: the score, and among equal ones (below the floor) the area of the log-loss curve."""
    return score(cell), cell.area


def mean_loss(cells: Sequence[Cell]) -> float:
    """The geometric mean over seeds of the loss at the end, floored; infinite if one of them did not get there."""
    return math.exp(fmean(score(cell) for cell in cells))


class Comparison(NamedTuple):
    """How one method stands to another.

    Attributes:
        ratio: Its loss over the other's, of geometric means over seeds.
        error: The standard error of the ratio's logarithm; NaN where a side has one seed.
    """

    ratio: float
    error: float

    @property
    def verdict(self) -> str:
        """Better or worse, beyond two standard errors; else equal, or open where no error is known."""
        if self.ratio in (0.0, math.inf):
            return "worse" if self.ratio else "better"
        if math.isnan(self.ratio) or math.isnan(self.error):
            return "open"
        if abs(math.log(self.ratio)) <= 2.0 * self.error:
            return "equal"
        return "better" if self.ratio < 1.0 else "worse"


def compare(cells: Sequence[Cell], others: Sequence[Cell]) -> Comparison:
    """Compare the runs of one method, over seeds, with those of another."""
    ours, theirs = [score(cell) for cell in cells], [score(cell) for cell in others]
    if math.inf in ours or math.inf in theirs:
        both = math.inf in ours and math.inf in theirs
        return Comparison(math.nan if both else math.inf if math.inf in ours else 0.0, math.nan)
    known = len(ours) > 1 and len(theirs) > 1
    error = math.sqrt(variance(ours) / len(ours) + variance(theirs) / len(theirs)) if known else math.nan
    return Comparison(math.exp(fmean(ours) - fmean(theirs)), error)
