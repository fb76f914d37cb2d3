"""How hyperparameters move: meta-optimizers.

`Newton` looks along the step that was taken. As a function of the step's scale s, the objective has the slope a = gᵀΔ
at s = 0 and b = GᵀΔ at s = 1, hence the curvature c = b − a and the minimiser s* = −a/c. Both are averaged over
meta-steps, per unit of the learning rate (a/η and c/η²), so that what is minimised is the expected objective.

`Gradient` hands the hypergradient to any torch optimizer, in the unconstrained coordinates. The paper's is
``Gradient(torch.optim.RMSprop, lr=0.1, every=10)``. Source: *Amortized Proximal Optimization*, Alg. 1 and §5.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

FACTOR = 4.0
"""The factor between the scales that a search tries."""
ARMIJO = 0.9
"""The part of the decrease promised by the slope that the first step must keep: a fifth of the way to the minimum of a
quadratic. The best step on one batch, taken again and again on others, diverges: measured with SGD on the digits."""


@dataclass(frozen=True)
class Newton:
    """One global learning rate by averaged slope and curvature along the step.

    Anything else in ``tune`` moves at the same meta-steps by the paper's `Gradient`.

    Attributes:
        every: Calls of ``step`` from one meta-step to the next.
        average: The decay of the averages, per meta-step, in [0, 1).
        growth: The largest factor by which a meta-step may lengthen the learning rate.
        shrink: The largest factor by which it may shorten it.
        search: Whether the first step's scale is searched by forwards on its own batch before it stays committed.
        backtrack: Whether a step that made its own batch clearly worse is shortened.

    Raises:
        ValueError: If a value is outside its set.
    """

    every: int = 10
    average: float = 0.98
    growth: float = 1.1
    shrink: float = 4.0
    search: bool = True
    backtrack: bool = True

    def __post_init__(self) -> None:
        """Check every field."""
        _check_every(self.every)
        if not 0.0 <= self.average < 1.0:
            raise ValueError(f"average={self.average!r} is not in [0, 1)")
        for name in ("growth", "shrink"):
            if not getattr(self, name) > 1.0:
                raise ValueError(f"{name}={getattr(self, name)!r} is not in (1, ∞)")


@dataclass
class NewtonState:
    """Averages of `Newton`, as plain floats.

    Attributes:
        slope: Average of a/η.
        curvature: Average of max(c, 0)/η².
        weight: The sum of the averages' weights, which corrects their start.
        loss: Running mean of the losses on the batches of meta-steps.
        spread: Running mean of the absolute deviation from it.
        losses: How many losses are in.
    """

    slope: float = 0.0
    curvature: float = 0.0
    weight: float = 0.0
    loss: float = 0.0
    spread: float = 0.0
    losses: int = 0

    def move(self, newton: Newton, unit: float, a: float, c: float) -> float:
        """Take in a slope and a curvature, and return the factor by which to change the unit.

        Args:
            newton: The configuration.
            unit: The learning rate, or its factor, at which the step was taken; η above.
            a: Slope of the objective along the step at its start.
            c: Curvature of the objective along the step.

        Returns:
            The factor, within [1/shrink, growth].
        """
        keep = newton.average
        self.weight = keep * self.weight + (1.0 - keep)
        self.slope = keep * self.slope + (1.0 - keep) * a / unit
        self.curvature = keep * self.curvature + (1.0 - keep) * max(c, 0.0) / unit**2
        if self.slope >= 0.0:
            return 1.0 / newton.shrink
        best = -self.slope / self.curvature if self.curvature > 0.0 else math.inf
        return min(max(best / unit, 1.0 / newton.shrink), newton.growth)

    def suspicious(self, loss: float) -> bool:
        """Whether a loss stands out above those of earlier batches."""
        return not math.isfinite(loss) or (self.losses >= 3 and loss > self.loss + 4.0 * self.spread + 1e-3)

    def watch(self, loss: float) -> None:
        """Take a loss into the running mean and spread."""
        keep = min(0.9, self.losses / (self.losses + 1.0))
        if self.losses:
            self.spread = keep * self.spread + (1.0 - keep) * abs(loss - self.loss)
        self.loss = keep * self.loss + (1.0 - keep) * loss
        self.losses += 1


def search(loss_at: Callable[[float], float], start: float, slope: float) -> float:
    """The scale of a step, among powers of 4, that lowers the loss on its own batch the most.

    Args:
        loss_at: The loss at a scale of the step.
        start: The loss at scale 0.
        slope: Its derivative with respect to the scale, at 0.

    Returns:
        The scale, from at most 21 losses. A change too small to measure counts as a reason to grow; if no scale lowers
        the loss, the smallest one tried.
    """
    noise = 8.0 * torch.finfo(torch.float32).eps * abs(start)

    def judged(scale: float) -> tuple[float, bool]:
        loss = loss_at(scale)
        silent = abs(loss - start) <= noise
        return (start if silent else loss), silent or loss <= start + ARMIJO * scale * min(slope, 0.0)

    scale = 1.0
    loss, good = judged(scale)
    for _ in range(20):
        if good:
            further, still = judged(FACTOR * scale)
            if not still or further > loss:
                break
            scale, loss = FACTOR * scale, further
        else:
            scale /= FACTOR
            loss, good = judged(scale)
            if good:
                break
    return scale


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


@dataclass(frozen=True, init=False)
class Gradient:
    """Hyperparameters by a torch optimizer on their unconstrained coordinates (log for positive ones).

    Attributes:
        factory: A torch optimizer class, or a function from a list of tensors to an optimizer.
        every: Calls of ``step`` from one meta-step to the next.
        clip: The largest absolute value of a meta-gradient, each coordinate apart; None for no limit.
        options: Options of the factory, such as ``lr`` (in log units per meta-step, for most optimizers).

    Raises:
        TypeError: If the factory cannot be called.
        ValueError: If a value is outside its set.
    """

    factory: Callable[..., torch.optim.Optimizer]
    every: int = 10
    clip: float | None = None
    options: dict[str, Any] = field(default_factory=dict)

    def __init__(
        self,
        factory: Callable[..., torch.optim.Optimizer],
        *,
        every: int = 10,
        clip: float | None = None,
        **options: Any,
    ) -> None:
        """Take the factory, when to use it, and its options."""
        if not callable(factory):
            raise TypeError(f"factory={factory!r} must be a torch optimizer class, such as torch.optim.RMSprop")
        _check_every(every)
        if clip is not None and not clip > 0.0:
            raise ValueError(f"clip={clip!r} is not in (0, ∞)")
        for name, value in {"factory": factory, "every": every, "clip": clip, "options": options}.items():
            object.__setattr__(self, name, value)


class GradientState:
    """The free coordinates of `Gradient` as one vector, and the optimizer that moves them."""

    def __init__(self, gradient: Gradient, size: int) -> None:
        """Build the optimizer for a number of coordinates."""
        self.gradient = gradient
        self.free = torch.zeros(size, dtype=torch.float64, requires_grad=True)
        self.optimizer = gradient.factory([self.free], **gradient.options)

    def move(self, offsets: Sequence[float], slopes: Sequence[float]) -> list[float]:
        """The offsets after one step of the optimizer.

        Args:
            offsets: Where the coordinates are.
            slopes: The derivative of the objective with respect to each.

        Returns:
            Where they want to be.
        """
        with torch.no_grad():
            self.free.copy_(torch.tensor(offsets, dtype=torch.float64))
        slope = torch.tensor(slopes, dtype=torch.float64)
        self.free.grad = slope if self.gradient.clip is None else slope.clamp(-self.gradient.clip, self.gradient.clip)
        self.optimizer.step()
        moved: list[float] = self.free.detach().tolist()
        return moved

    def numbers(self) -> dict[str, float | int | list[float]]:
        """The optimizer's state in plain numbers: vectors as lists, other tensors as floats."""
        state = self.optimizer.state[self.free]
        return {name: value.tolist() if isinstance(value, torch.Tensor) else value for name, value in state.items()}

    def restore(self, numbers: dict[str, Any]) -> None:
        """Take back what `numbers` gave; coordinates that have been added since start afresh at zero."""
        state = self.optimizer.state[self.free]
        for name, value in numbers.items():
            if isinstance(value, list):
                padded = [*value, *[0.0] * (len(self.free) - len(value))]
                state[name] = torch.tensor(padded, dtype=torch.float64)
            else:
                state[name] = torch.tensor(value) if isinstance(value, float) else value


Meta = Newton | Gradient


def parse(meta: object, by_parameter: bool) -> Meta:
    """The ``meta=`` argument as a configuration.

    Args:
        meta: "newton", "paper", or a configuration.
        by_parameter: Whether anything is tuned more finely than a group: the paper then takes a meta learning rate of
            1e-3 (004 App. C); at every step is our choice.

    Returns:
        The configuration.

    Raises:
        TypeError: If it is neither.
        ValueError: If the name is unknown.
    """
    if isinstance(meta, Newton | Gradient):
        return meta
    if not isinstance(meta, str):
        raise TypeError(f"meta={meta!r} must be 'newton', 'paper', apo.Newton(...) or apo.Gradient(...)")
    if meta not in ("newton", "paper"):
        raise ValueError(f"meta={meta!r} is neither 'newton' nor 'paper'")
    return Newton() if meta == "newton" else paper(by_parameter)


def paper(by_parameter: bool, every: int | None = None) -> Gradient:
    """The paper's meta-optimizer."""
    if by_parameter:
        return Gradient(torch.optim.RMSprop, lr=1e-3, every=every or 1)
    return Gradient(torch.optim.RMSprop, lr=0.1, every=every or 10)


def _check_every(every: object) -> None:
    if isinstance(every, bool) or not isinstance(every, int):
        raise TypeError(f"every={every!r} must be an int, the number of calls between meta-steps")
    if every < 1:
        raise ValueError(f"every={every!r} is not at least 1")
