"""One step of all base optimizers as one displacement: the live weights go along it and come back exactly."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TypeVar

import torch

from apo.bases.base import Base, Slopes, Values
from apo.processes import Processes
from apo.shards import local
from apo.trees import half_square, inner, total
from apo.types import Judged, Params

Result = TypeVar("Result")


class Step:
    """A step that has been taken, as one displacement of the live weights.

    Attributes:
        gradient: g.
        before: θ, copies.
        delta: The displacement that is judged, at scale 1.
        moved: Whether any weight is displaced, in any process.
        scale: The scale of the step that stays, against the one taken.
    """

    def __init__(self, bases: Sequence[Base], values: Values, judged: Judged, processes: Processes) -> None:
        """Take the step: the live weights are θ' afterwards."""
        self._processes = processes
        moving = {name: param for base in bases for _, _, name, param in base.moving()}
        for name, param in moving.items():
            if param.is_complex():
                raise ValueError(f"{name} is complex, which cannot be judged; train it with an optimizer of its own")
        self._live = {name: local(param) for name, param in moving.items()}
        taken = all_or_none(bases, lambda base: base.take(values, judged))
        self.gradient: Params = {name: tensor for t in taken for name, tensor in t.gradient.items()}
        self.before: Params = {name: tensor for t in taken for name, tensor in t.before.items()}
        self.delta: Params = {name: tensor for t in taken for name, tensor in t.delta.items()}
        self.scale = 1.0
        self._distinct = any(t.distinct for t in taken)
        self._pullbacks = [t.pullback for t in taken]
        self.moved = processes.any(any(bool(torch.any(delta != 0)) for delta in self.delta.values()))

    def pullback(self, cotangents: Params) -> Slopes:
        """From a gradient at θ' to derivatives with respect to offsets, at the scale that stays."""
        slopes: Slopes = {}
        for pull in self._pullbacks:
            slopes |= {where: self.scale * slope for where, slope in pull(cotangents).items()}
        return dict(zip(slopes, self._processes.whole(list(slopes.values())), strict=True))

    def linear_change(self) -> float:
        """The change of the loss to first order, gᵀΔ, at the scale that stays."""
        change = total(inner(self.gradient[name], delta) for name, delta in self.delta.items())
        return self.scale * self._processes.whole([change])[0]

    def wsd(self, scale: float) -> float:
        """The weight-space discrepancy of the judged step at a scale, ½‖sΔ‖²."""
        return scale**2 * self._processes.whole([half_square(self.delta).item()])[0]

    @contextmanager
    def at(self, scale: float) -> Iterator[None]:
        """Put the live weights at θ + scale·Δ; at the end, exactly back to where they were."""
        if scale == self.scale and not self._distinct:
            yield
            return
        kept = {name: param.detach().clone() for name, param in self._live.items()}
        try:
            with torch.no_grad():
                for name, param in self._live.items():
                    param.copy_(self.before[name] + scale * self.delta[name])
            yield
        finally:
            with torch.no_grad():
                for name, param in self._live.items():
                    param.copy_(kept[name])

    def rescale(self, factor: float) -> None:
        """Make the step that stays longer or shorter: θ + factor·(θ' − θ)."""
        if factor != 1.0:
            self.scale *= factor
            with torch.no_grad():
                for name, param in self._live.items():
                    param.copy_(self.before[name] + factor * (param - self.before[name]))


def step_all(bases: Sequence[Base], values: Values) -> None:
    """Take the step of every base, or of none."""
    all_or_none(bases, lambda base: base.step(values))


def all_or_none(bases: Sequence[Base], take: Callable[[Base], Result]) -> list[Result]:
    """Take the step of every base; if a later one raises, those before it are put back.

    What they may change is copied before; the last one's, which is all there is where there is but one, is not.
    """
    backups: list[Callable[[], None]] = []
    results = []
    try:
        for base in bases:
            if base is not bases[-1]:
                backups.append(base.backup())
            results.append(take(base))
    except BaseException:
        for restore in backups:
            restore()
        raise
    return results
