"""The tuned numbers: where they are, the hyperparameters they give, and how a meta-step moves them."""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from apo.bases import Base, Slopes, Values
from apo.domains import shift
from apo.hypers import Coordinate, Tune, free
from apo.meta import Gradient, GradientState, Newton, NewtonState, paper
from apo.types import Domain

LR = Coordinate("lr", "")


class Place(NamedTuple):
    """Where a coordinate acts: a hyperparameter of a group, or of one parameter in it ("" for the whole group)."""

    coordinate: Coordinate
    domain: Domain
    group: int
    name: str
    start: float


class Tuning:
    """Offsets of every tuned hyperparameter, and the state of what moves them.

    Attributes:
        tune: How each hyperparameter is tuned.
        meta: The meta-optimizer.
        relative: A schedule on top of the tuned learning rate, or None.
        offsets: The offset of every coordinate, in the unconstrained coordinate of its domain.
        newton: Averages of slope and curvature, and the watch on the losses.
        searched: Whether the scale of the first step has been searched.
    """

    def __init__(
        self, tune: Mapping[str, Tune], meta: Newton | Gradient, relative: Callable[[int], float] | None
    ) -> None:
        """Hold the configuration; `link` finds the coordinates."""
        self.tune, self.meta, self.relative = dict(tune), meta, relative
        self.offsets: dict[Coordinate, float] = {}
        self.newton = NewtonState()
        self.searched = False
        self._gradient: GradientState | None = None
        self._bases: Sequence[Base] = ()

    @property
    def searches(self) -> bool:
        """Whether the scale of the next step to be judged is to be searched."""
        return isinstance(self.meta, Newton) and self.meta.search and "lr" in self.tune and not self.searched

    @property
    def backtracks(self) -> bool:
        """Whether a step that made its own batch clearly worse is to be shortened."""
        return isinstance(self.meta, Newton) and self.meta.backtrack and "lr" in self.tune

    def link(self, bases: Sequence[Base]) -> None:
        """Find the coordinates of the bases' groups; those known before keep their offsets.

        Raises:
            ValueError: If a hyperparameter cannot be tuned.
        """
        check(self.tune, bases)
        self._bases = bases
        numbers = self.numbers()
        self.offsets = {c: self.offsets.get(c, 0.0) for c in dict.fromkeys(p.coordinate for p in self._places())}
        moved = self._by_gradient()
        self._gradient = GradientState(self._gradient_of(moved), len(moved)) if moved else None
        self._restore_gradient(numbers)

    def values(self, steps: int) -> list[Values]:
        """The effective hyperparameters for the next step: for each base, one dict a group.

        Raises:
            ValueError: If a learning rate, or the relative schedule, is negative or not finite.
        """
        groups = [group for base in self._bases for group in base.optimizer.param_groups]
        flat: Values = [{} for _ in groups]
        schedule = self._schedule(steps)
        for group, settings in zip(groups, flat, strict=True):
            if not 0.0 <= float(group.get("lr", 0.0)) < math.inf:
                raise ValueError(f"lr={group['lr']!r} is not in [0, ∞); a tuned learning rate is lr × lr_factor")
            if self.relative is not None:
                settings["lr"] = float(group["lr"]) * schedule
        for place in self._places():
            hyper, settings = place.coordinate.hyper, flat[place.group]
            number = float(groups[place.group][hyper]) * (schedule if hyper == "lr" else 1.0)
            value = self._moved(place, number)
            if not place.name:
                settings[hyper] = value
                continue
            apart = settings.get(hyper)
            settings[hyper] = {**(apart if isinstance(apart, dict) else {}), place.name: value}
        rest = iter(flat)
        return [[next(rest) for _ in base.optimizer.param_groups] for base in self._bases]

    def ratios(self, steps: int) -> list[float]:
        """What the schedules make of the tuned learning rate: one number a group."""
        schedule = self._schedule(steps)
        groups = [group for base in self._bases for group in base.optimizer.param_groups]
        starts = [float(group.get("initial_lr", group.get("lr", 0.0))) for group in groups]
        return [schedule * (float(g["lr"]) / start if start else 1.0) for g, start in zip(groups, starts, strict=True)]

    def hypers(self) -> dict[str, float]:
        """The tuned hyperparameters and learning rates for the next step, schedules apart, by label."""
        found: dict[str, dict[str, float]] = {}
        for place in self._places():
            apart = f"{place.coordinate.label}/{place.group}" if not place.coordinate.key else place.coordinate.label
            found.setdefault(place.coordinate.label, {}).setdefault(apart, self._moved(place, place.start))
        merged: dict[str, float] = {}
        for label, values in found.items():
            merged |= {label: next(iter(values.values()))} if len(set(values.values())) == 1 else values
        return merged

    def factor(self, group: int) -> float:
        """The factor on a group's learning rate; its geometric mean where parameters differ."""
        offsets = [
            self.offsets[p.coordinate] for p in self._places() if p.group == group and p.coordinate.hyper == "lr"
        ]
        return math.exp(sum(offsets) / len(offsets)) if offsets else 1.0

    def rescale(self, factor: float) -> float:
        """Multiply every tuned learning rate by a factor, within its bounds.

        Returns:
            The factor that the bounds leave, the least where coordinates differ.
        """
        kept = []
        for coordinate, old in self.offsets.items():
            if coordinate.hyper == "lr":
                self._set(coordinate, old + math.log(factor), at_once=True)
                kept.append(math.exp(self.offsets[coordinate] - old))
        return min(kept)

    def move(self, a: Slopes, b: Slopes, ratios: Sequence[float]) -> float:
        """Move every offset by one meta-step.

        Args:
            a: Slopes of the objective at the start of the step, for learning rates.
            b: Slopes at its end.
            ratios: What the schedules make of the tuned learning rate, one number a group.

        Returns:
            The norm of the hypergradient in unconstrained coordinates, at the tuned learning rate.
        """
        slopes = dict.fromkeys(self.offsets, 0.0)
        starts = dict.fromkeys(self.offsets, 0.0)
        bends = dict.fromkeys(self.offsets, 0.0)
        for (coordinate, group), end in b.items():
            ratio = ratios[group] if coordinate.hyper == "lr" else 1.0
            if ratio == 0.0:
                continue
            start = a.get((coordinate, group), end)
            starts[coordinate] += start / ratio
            bends[coordinate] += (end - start) / ratio**2
            slopes[coordinate] += end if ratio == 1.0 else start / ratio + (end - start) / ratio**2
        moved = self._by_gradient()
        if self._gradient is not None:
            wanted = self._gradient.move([self.offsets[c] for c in moved], [slopes[c] for c in moved])
            for coordinate, offset in zip(moved, wanted, strict=True):
                self._set(coordinate, offset)
        if isinstance(self.meta, Newton) and LR not in moved and LR in self.offsets:
            unit = math.exp(self.offsets[LR])
            change = self.newton.move(self.meta, unit, starts[LR], bends[LR])
            self._set(LR, self.offsets[LR] + math.log(change))
        return math.hypot(*slopes.values())

    def numbers(self) -> dict[str, Any]:
        """Everything that moves, as plain numbers and lists of them."""
        numbers: dict[str, Any] = {f"offset/{c.label}": offset for c, offset in self.offsets.items()}
        numbers |= {f"newton/{name}": value for name, value in vars(self.newton).items()}
        numbers["searched"] = int(self.searched)
        if self._gradient is not None:
            numbers |= {f"gradient/{name}": value for name, value in self._gradient.numbers().items()}
        return numbers

    def restore(self, numbers: Mapping[str, Any], offsets: bool = True) -> None:
        """Take back what `numbers` gave; unknown entries are left aside.

        Args:
            numbers: Plain numbers.
            offsets: Whether to take the offsets too.
        """
        if offsets:
            self.offsets = {c: float(numbers.get(f"offset/{c.label}", old)) for c, old in self.offsets.items()}
        for name, value in vars(self.newton).items():
            setattr(self.newton, name, type(value)(numbers.get(f"newton/{name}", value)))
        self.searched = bool(numbers.get("searched", self.searched))
        self._restore_gradient(numbers)

    def _restore_gradient(self, numbers: Mapping[str, Any]) -> None:
        prefix = "gradient/"
        if self._gradient is not None:
            kept = {name.removeprefix(prefix): v for name, v in numbers.items() if name.startswith(prefix)}
            self._gradient.restore(kept)

    def _places(self) -> Iterator[Place]:
        for base in self._bases:
            for index, group in enumerate(base.optimizer.param_groups, base.first):
                for hyper in sorted(self.tune.keys() & base.domains.keys()):
                    how, domain = self.tune[hyper], base.domains[hyper]
                    start = float(group.get("initial_lr", group["lr"]) if hyper == "lr" else group[hyper])
                    names = [base.names[param] for param in group["params"]] if how.by_parameter else [""]
                    for name in names:
                        yield Place(Coordinate(hyper, how.key(index, name)), domain, index, name, start)

    def _moved(self, place: Place, number: float) -> float:
        offset = self.offsets[place.coordinate]
        if place.coordinate.hyper == "lr":
            return number * math.exp(offset)
        return shift(place.domain, number, offset)[0]

    def _by_gradient(self) -> list[Coordinate]:
        newton = isinstance(self.meta, Newton) and "lr" in self.tune and self.tune["lr"].by == "global"
        return [c for c in self.offsets if not (newton and c == LR)]

    def _gradient_of(self, moved: Sequence[Coordinate]) -> Gradient:
        if isinstance(self.meta, Gradient):
            return self.meta
        return paper(any(self.tune[coordinate.hyper].by_parameter for coordinate in moved), self.meta.every)

    def _set(self, coordinate: Coordinate, offset: float, at_once: bool = False) -> None:
        places = [p for p in self._places() if p.coordinate == coordinate and p.domain.contains(p.start)]
        if places:
            how, old = self.tune[coordinate.hyper], self.offsets[coordinate]
            starts = {place.start for place in places}
            self.offsets[coordinate] = how.limit(offset, places[0].domain, starts, None if at_once else old)

    def _schedule(self, steps: int) -> float:
        ratio = 1.0 if self.relative is None else float(self.relative(steps))
        if not 0.0 <= ratio < math.inf:
            raise ValueError(f"relative({steps}) returned {ratio!r}, which is not in [0, ∞)")
        return ratio


def check(tune: Mapping[str, Tune], bases: Sequence[Base]) -> None:
    """Raise if a hyperparameter cannot be tuned on these bases.

    Raises:
        ValueError: If no base has it, a one-step objective cannot judge it, or a value or bound is outside its domain.
    """
    for hyper, how in tune.items():
        owners = [base for base in bases if hyper in base.domains]
        if not owners:
            choice = ", ".join(sorted({repr(name) for base in bases for name in base.domains}))
            hint = _HINT if any(hyper in base.optimizer.defaults for base in bases) else ""
            raise ValueError(f"tune={{{hyper!r}: ...}}: the base optimizer can adapt {choice}{hint}")
        for base in owners:
            domain = base.domains[hyper]
            if not domain.one_step and not how.force:
                raise ValueError(
                    f"{hyper} shows its effect over many steps, so a one-step objective misjudges it; drop it from "
                    f"tune=, or insist with apo.Tune(force=True)"
                )
            for bound in (how.low, how.high):
                if bound is not None:
                    free(domain, bound)
            for group in base.optimizer.param_groups:
                if hyper != "lr" and not domain.contains(float(group[hyper])):
                    raise ValueError(
                        f"{hyper}={group[hyper]!r} is not in {domain.name}, so it cannot be adapted; drop it from tune="
                    )


_HINT = "; a torch optimizer's other options are closed to us, but our rules (apo.adam, apo.rmsprop, ...) are open"
