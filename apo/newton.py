"""The global learning rate by averaged slope and curvature along the step, and the search of the first step.

As a function of the step's scale s, the objective has the slope a = gᵀΔ at s = 0 and b = GᵀΔ at s = 1, hence the
curvature c = b − a and the minimiser s* = −a/c. Both are averaged over meta-steps, per unit of the learning rate (a/η
and c/η²), so that what is minimised is the expected objective. Ours; the paper follows the gradient alone.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from apo.checks import choice, flag, settle, whole

SHORT_OF_TWO = 0.8
"""How far `Newton.relaxation` stays below 2, where a quadratic is climbed, without momentum: see docs/tuning.md."""
FACTOR = 4.0
"""The factor between the scales that a search tries."""
ARMIJO = 0.9
"""The part of the decrease promised by the slope that the first step must keep: a fifth of the way to the minimum of a
quadratic. The best step on one batch, taken again and again on others, diverges: measured with SGD on the digits."""
MOST = 20
"""How often a search grows or shrinks the scale."""


@dataclass(frozen=True)
class Newton:
    """One global learning rate by averaged slope and curvature along the step.

    Anything else in ``tune`` moves at the same meta-steps by the paper's `Gradient`.

    Attributes:
        every: Calls of ``step`` from one meta-step to the next.
        curvature: "gradients" judges a step by the objective's gradient at its end, a forward and a backward. "losses"
            takes the curvature from the objective's values at both ends, a forward: as exact to second order, and for
            the one global learning rate alone. Where values cannot tell, gradients do: for a step whose change of the
            loss drowns in rounding, and while the optimizer is given other gradients than the batch's own (clipped,
            say), which one meta-step in twenty finds out. "auto" is "losses" with a function-space discrepancy (fsd >
            0), where they cost half as much, if there is one global learning rate alone; else "gradients".
        relaxation: The learning rate aimed at, over the one that minimises the averaged objective, positive; beyond 2 a
            quadratic is climbed. None: 1.2, and 2 − 0.8 (1 − μ) where momentum μ is left out of the judgement. At
            most 1 while the loss is above its lowest.
        average: The decay of the averages, per meta-step, in [0, 1).
        growth: The largest factor by which a meta-step may lengthen the learning rate.
        shrink: The largest factor by which it may shorten it.
        search: Whether the first step's scale is searched by forwards on its own batch before it stays committed.
        backtrack: Whether a step that made its own batch clearly worse is shortened.

    Raises:
        TypeError: If a value is of the wrong type.
        ValueError: If a value is outside its set.
    """

    every: int = 10
    curvature: Literal["auto", "gradients", "losses"] = "auto"
    relaxation: float | None = None
    average: float = 0.98
    growth: float = 1.1
    shrink: float = 4.0
    search: bool = True
    backtrack: bool = True

    def aim(self, momentum: float, risen: bool) -> float:
        """The relaxation, given the momentum that is left out of the judgement, and whether the loss has risen."""
        relaxation = self.relaxation or 2.0 - SHORT_OF_TWO * (1.0 - momentum)
        return min(relaxation, 1.0) if risen else relaxation

    def __post_init__(self) -> None:
        """Check every field."""
        whole("every", self.every)
        choice("curvature", self.curvature, ("auto", "gradients", "losses"))
        if self.relaxation is not None:
            settle(self, "relaxation", ends="()")
        settle(self, "average", high=1.0)
        settle(self, "growth", low=1.0, ends="()")
        settle(self, "shrink", low=1.0, ends="()")
        flag(search=self.search, backtrack=self.backtrack)


@dataclass
class NewtonState:
    """Averages of `Newton`, as plain floats.

    Attributes:
        slope: Average of a/η, not corrected for its start.
        curvature: Average of max(c, 0)/η², likewise; so that the quotient of the two needs no correction.
    """

    slope: float = 0.0
    curvature: float = 0.0

    def move(self, newton: Newton, unit: float, a: float, c: float, relaxation: float) -> float:
        """Take in a slope and a curvature, and return the factor by which to change the unit.

        Args:
            newton: The configuration.
            unit: The learning rate, or its factor, at which the step was taken; η above.
            a: Slope of the objective along the step at its start.
            c: Curvature of the objective along the step.
            relaxation: The unit aimed at, over the one that minimises the averaged objective.

        Returns:
            The factor, within [1/shrink, growth].
        """
        keep = newton.average
        slope = keep * self.slope + (1.0 - keep) * a / unit
        curvature = keep * self.curvature + (1.0 - keep) * max(c, 0.0) / unit / unit
        if not (math.isfinite(slope) and math.isfinite(curvature)):
            return 1.0  # taken in, a number beyond the floating-point range would stay in the averages for good
        self.slope, self.curvature = slope, curvature
        if self.slope >= 0.0:
            return 1.0 / newton.shrink
        best = -relaxation * self.slope / self.curvature if self.curvature > 0.0 else math.inf
        return min(max(best / unit, 1.0 / newton.shrink), newton.growth)


CHECK = 20
"""Meta-steps from one check of the gradients to the next."""
OWN = 0.01
"""How far, relatively, gradients may be from those of the loss and still count as its own."""


@dataclass
class Trust:
    """Whether the gradients that the optimizer is given are those of the loss it is judged by, as far as is known.

    Attributes:
        own: Whether they were at the last check.
        until: Meta-steps until the next.
    """

    own: bool = False
    until: int = 0

    @property
    def due(self) -> bool:
        """Whether it is to be checked."""
        return self.until == 0

    def check(self, along: float, square: float) -> None:
        """Take in the inner product of both gradients, and the square of the given one."""
        self.own = abs(along - square) <= OWN * square
        self.until = CHECK

    def count(self) -> None:
        """A meta-step is done."""
        self.until = max(0, self.until - 1)


OUTLIER = 4.0
"""A loss this many mean deviations above the running mean stands out."""
MEMORY = 10
"""The number of losses that the running mean is over, about."""
FORGET = 0.003
"""How fast the lowest running mean is forgotten: noise makes some of them low, and a loss may rise for good."""


@dataclass
class LossWatch:
    """A running mean of the losses on the batches of meta-steps, to notice one that stands out.

    Attributes:
        mean: Their running mean.
        spread: The running mean of their absolute deviation from it.
        seen: How many there were.
        lowest: The lowest that their running mean has been of late, or the loss before all of them.
    """

    mean: float = 0.0
    spread: float = 0.0
    seen: int = 0
    lowest: float = 0.0

    @property
    def risen(self) -> bool:
        """Whether the running mean is clearly above its lowest."""
        return self.seen > 2 and self.mean > self.lowest + self.spread

    def outlier(self, loss: float) -> bool:
        """Whether a loss stands out above those before; one that is not finite always does."""
        return not math.isfinite(loss) or (self.seen > 2 and loss > self.mean + OUTLIER * self.spread)

    def add(self, loss: float, start: Callable[[], float]) -> None:
        """Take a loss in, if it is finite; the loss before it is wanted for the first of all."""
        if not math.isfinite(loss):
            return
        if not self.seen:
            before = start()
            self.lowest = before if math.isfinite(before) else loss
        self.seen += 1
        new = 1.0 / min(self.seen, MEMORY)
        if self.seen > 1:
            self.spread += new * (abs(loss - self.mean) - self.spread)
        self.mean += new * (loss - self.mean)
        if self.seen >= MEMORY:
            self.lowest = min(self.lowest + FORGET * (self.mean - self.lowest), self.mean)


def search(loss_at: Callable[[float], float], start: float, slope: float, rounding: float) -> float:
    """The largest scale of a step, among powers of 4, that keeps what the slope promises on the step's own batch.

    Args:
        loss_at: The loss at a scale of the step.
        start: The loss at scale 0.
        slope: Its derivative with respect to the scale, at 0.
        rounding: The relative error of a loss.

    Returns:
        The scale, from at most 21 losses. A change too small to measure counts as a reason to grow. Where the loss
        falls without end there is nothing to find, and the scale is 1; where no scale will do, the smallest one tried.
    """
    noise = rounding * abs(start)

    def judged(scale: float) -> tuple[float, bool]:
        loss = loss_at(scale)
        silent = abs(loss - start) <= noise
        kept = silent or loss <= start + noise + ARMIJO * scale * min(slope, 0.0)
        return (start if silent else loss), kept and math.isfinite(loss)

    scale = 1.0
    loss, good = judged(scale)
    if not good:
        for _ in range(MOST):
            scale /= FACTOR
            if judged(scale)[1]:
                break
        return scale
    for _ in range(MOST):
        further, good = judged(FACTOR * scale)
        if not good or further > loss + noise:
            return scale
        scale, loss = FACTOR * scale, further
    return 1.0


def shorten(loss_at: Callable[[float], float], start: float) -> float:
    """The largest scale among 1/4, 1/16, ... at which a step does not make its own batch worse.

    Args:
        loss_at: The loss at a scale of the step.
        start: The loss at scale 0.

    Returns:
        The scale; 4⁻⁶ if none is good enough.
    """
    scale = 1.0
    for _ in range(6):
        scale /= FACTOR
        if loss_at(scale) <= start:
            break
    return scale
