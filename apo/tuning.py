"""The tuned numbers: where they are, the hyperparameters they give, and how a meta-step moves them."""

import math
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from apo.bases.base import NUMBER, Base, Slopes, Values
from apo.bases.build import check_tunable
from apo.checkpoint import number, restored
from apo.checks import real
from apo.domains import shift
from apo.gradient import Gradient, GradientState
from apo.hypers import Coordinate, Tune
from apo.meta import paper
from apo.newton import LossWatch, Newton, NewtonState, Trust
from apo.places import FARTHEST, START, Place, offset_of, places_of, rate_of, start_of
from apo.types import Judged

LR = Coordinate("lr", "")


class Tuning:
    """Offsets of every tuned hyperparameter, and the state of what moves them.

    Attributes:
        tune: How each hyperparameter is tuned.
        meta: The meta-optimizer.
        relative: A schedule on top of the tuned learning rate, or None.
        offsets: The offset of every coordinate, in the unconstrained coordinate of its domain.
        newton: Averages of slope and curvature.
        watch: The losses of earlier meta-steps.
        trust: Whether gradients are the loss's own.
        searched: Whether the scale of the first step has been searched.
    """

    def __init__(
        self, tune: Mapping[str, Tune], meta: Newton | Gradient, relative: Callable[[int], float] | None
    ) -> None:
        """Hold the configuration; `link` finds the coordinates.

        Raises:
            ValueError: If losses are to judge more than the one global learning rate.
        """
        finer = [f"tune={{{name!r}: {how.by!r}}}" for name, how in tune.items() if (name, how.by) != ("lr", "global")]
        if finer and isinstance(meta, Newton) and meta.curvature == "losses":
            raise ValueError(f"curvature='losses' judges one global lr alone: drop {finer[0]}, or that option")
        self._one_rate = bool(tune) and not finer
        self.tune, self.meta, self.relative = dict(tune), meta, relative
        self.offsets: dict[Coordinate, float] = {}
        self.newton, self.watch, self.trust = NewtonState(), LossWatch(), Trust()
        self.searched = False
        self._gradient: GradientState | None = None
        self._bases: Sequence[Base] = ()
        self._places: list[Place] = []
        self._at: dict[Coordinate, list[Place]] = {}

    @property
    def searches(self) -> bool:
        """Whether the scale of the next step to be judged is to be searched."""
        return isinstance(self.meta, Newton) and self.meta.search and "lr" in self.tune and not self.searched

    @property
    def backtracks(self) -> bool:
        """Whether a step that made its own batch clearly worse is to be shortened."""
        return isinstance(self.meta, Newton) and self.meta.backtrack and "lr" in self.tune

    def by_losses(self, fsd: float) -> bool:
        """Whether losses are to judge a step wherever they can, with this λ_FSD."""
        if not isinstance(self.meta, Newton) or not self._one_rate:
            return False
        return self.meta.curvature == "losses" or (self.meta.curvature == "auto" and fsd > 0.0)

    def link(self, bases: Sequence[Base]) -> None:
        """Find the coordinates of the bases' groups; those known before keep where they are.

        Raises:
            ValueError: If a hyperparameter cannot be tuned.
        """
        check_tunable(self.tune, bases)
        numbers = self.numbers()
        self._bases, self._places = bases, places_of(self.tune, bases)
        self._at = {}
        for place in self._places:
            self._at.setdefault(place.coordinate, []).append(place)
        for group in self._groups():
            if "lr" in group:
                group.setdefault(START, real("lr", group["lr"]))
        self.offsets = {coordinate: self.offsets.get(coordinate, 0.0) for coordinate in self._at}
        for coordinate, offset in self.offsets.items():
            self._set(coordinate, offset, at_once=True)
        self._gradient = self._fresh_gradient()
        self._restore_gradient(numbers)

    def values(self, steps: int) -> Values:
        """The effective hyperparameters for the next step.

        Raises:
            TypeError: If a learning rate, or the relative schedule, is no number.
            ValueError: If it is negative or not finite.
        """
        groups, schedule = self._groups(), self._schedule(steps)
        values: Values = [{} for _ in groups]
        for group, settings in zip(groups, values, strict=True):
            rate = rate_of(group)
            if rate and not group.get(START):  # a schedule that starts at 0 is counted from its first number
                group[START] = rate
            if self.relative is not None:
                settings["lr"] = rate * schedule
        moved: dict[tuple[Coordinate, int], float] = {}
        for place in self._places:
            hyper, settings = place.coordinate.hyper, values[place.group]
            group = groups[place.group]
            number = rate_of(group) * schedule if hyper == "lr" else float(group[hyper])
            where = place.coordinate, place.group
            if where not in moved:
                moved[where] = self._moved(place, number)
            if not place.name:
                settings[hyper] = moved[where]
                continue
            apart = settings.get(hyper)
            if not isinstance(apart, dict):
                apart = settings[hyper] = {}
            apart[place.name] = moved[where]
        return values

    def rates(self, values: Values) -> list[float]:
        """The effective learning rate of each group; the geometric mean where parameters differ."""
        found = []
        for group, settings in zip(self._groups(), values, strict=True):
            rate = settings.get("lr", group.get("lr", 0.0))
            if isinstance(rate, dict) and len(set(rate.values())) == 1:
                rate = next(iter(rate.values()))
            if isinstance(rate, dict):
                positive = bool(rate) and min(rate.values()) > 0.0
                rate = math.exp(sum(map(math.log, rate.values())) / len(rate)) if positive else 0.0
            found.append(float(rate))
        return found

    def whole(self, rates: Sequence[float]) -> list[float]:
        """The same, with NaN for a group whose parameters are tuned apart: no learning rate is that of all."""
        found: list[set[Coordinate]] = [set() for _ in rates]
        for place in self._places:
            if place.coordinate.hyper == "lr":
                found[place.group].add(place.coordinate)
        return [math.nan if len(own) > 1 else rate for own, rate in zip(found, rates, strict=True)]

    def ratios(self, steps: int) -> list[float]:
        """What the schedules make of the tuned learning rate: one number a group."""
        schedule = self._schedule(steps)
        starts = [start_of(group, "lr") if "lr" in group else 0.0 for group in self._groups()]
        return [schedule * (rate_of(g) / lr if lr else 1.0) for g, lr in zip(self._groups(), starts, strict=True)]

    def hypers(self) -> dict[str, float]:
        """The tuned hyperparameters for the next step, schedules apart, by label."""
        groups, found = self._groups(), dict[str, float]()
        for coordinate, places in self._at.items():
            values = {p.group: self._moved(p, start_of(groups[p.group], coordinate.hyper)) for p in places}
            if len(set(values.values())) == 1 or coordinate.key:
                found[coordinate.label] = next(iter(values.values()))
            else:
                found |= {f"{coordinate.label}/{groups[group][NUMBER]}": value for group, value in values.items()}
        return found

    def factors(self) -> list[float]:
        """The factor on each group's learning rate; its geometric mean where parameters differ."""
        logs: list[list[float]] = [[] for _ in self._groups()]
        for place in self._places:
            if place.coordinate.hyper == "lr":
                logs[place.group].append(self.offsets[place.coordinate])
        return [math.exp(sum(log) / len(log)) if log else 1.0 for log in logs]

    def rescale(self, factor: float) -> float:
        """Multiply every tuned learning rate by a factor, within its bounds.

        Returns:
            The factor that the bounds leave, the least where coordinates differ.
        """
        kept = []
        for coordinate, old in self.offsets.items():
            if coordinate.hyper == "lr" and self._starts(coordinate):
                self._set(coordinate, old + math.log(factor), at_once=True)
                kept.append(math.exp(self.offsets[coordinate] - old))
        return min(kept, default=factor)

    def move(self, start: Slopes, end: Slopes, ratios: Sequence[float], judged: Judged) -> float:
        """Move every offset by one meta-step.

        Args:
            start: Slopes of the objective at the start of the step, for learning rates.
            end: Slopes at its end.
            ratios: What the schedules make of the tuned learning rate, one number a group.
            judged: Which step was judged.

        Returns:
            The norm of the hypergradient in unconstrained coordinates, at the tuned learning rate.
        """
        slopes = dict.fromkeys(self.offsets, 0.0)
        a = c = 0.0
        for (coordinate, group), b in end.items():
            if coordinate.hyper != "lr":
                slopes[coordinate] += b
                continue
            ratio = ratios[group]
            if ratio != 0.0:
                first = start[coordinate, group]
                a += first / ratio
                bend = (b - first) / ratio / ratio
                c += bend
                slopes[coordinate] += b if ratio == 1.0 else first / ratio + bend
        moved = self._by_gradient()
        if self._gradient is not None:
            wanted = self._gradient.move([self.offsets[x] for x in moved], [slopes[x] for x in moved])
            for coordinate, offset in zip(moved, wanted, strict=True):
                self._set(coordinate, offset)
        if isinstance(self.meta, Newton) and LR in self.offsets:
            aim = self.meta.aim(min(base.left_out(judged) for base in self._bases), self.watch.risen)
            change = self.newton.move(self.meta, math.exp(self.offsets[LR]), a, c, aim)
            self._set(LR, self.offsets[LR] + math.log(change))
        return math.hypot(*slopes.values())

    def numbers(self) -> dict[str, Any]:
        """Everything that moves, as plain numbers."""
        numbers: dict[str, Any] = {f"offset/{coordinate.label}": u for coordinate, u in self.offsets.items()}
        numbers |= {f"newton/{name}": value for name, value in vars(self.newton).items()}
        numbers |= {f"watch/{name}": value for name, value in vars(self.watch).items()}
        numbers |= {f"trust/{name}": int(value) for name, value in vars(self.trust).items()}
        numbers["searched"] = int(self.searched)
        if self._gradient is not None:
            numbers |= {f"gradient/{name}": value for name, value in self._gradient.numbers().items()}
        return numbers

    def restore(self, numbers: Mapping[str, Any], offsets: bool = True, searched: bool = True) -> None:
        """Take back what `numbers` gave; what is missing starts afresh, and unknown entries are left aside.

        A hyperparameter that was tuned more or less finely there starts from the mean of its offsets.

        Args:
            numbers: Plain numbers.
            offsets: Whether to take the offsets too, and Newton's averages, which are in their units.
            searched: Whether the search is over and done with where the numbers do not say.

        Raises:
            ValueError: If a number is missing, or of the wrong kind.
        """
        self.newton, self.watch = NewtonState(), restored(LossWatch(), numbers, "watch/")
        self.trust = restored(Trust(), {n: x for n, x in numbers.items() if n.startswith("trust/")}, "trust/")
        if offsets:
            self.newton = restored(self.newton, numbers, "newton/")
            found = {coordinate: offset_of(numbers, coordinate) for coordinate in self.offsets}
            self.offsets = dict.fromkeys(found, 0.0)
            for coordinate, offset in found.items():
                self._set(coordinate, offset, at_once=True)
        self.searched = bool(number(numbers, "searched", int(searched)))
        self._gradient = self._fresh_gradient()
        if not self._restore_gradient(numbers):
            warnings.warn("the checkpoint is of another meta-optimizer, whose state starts afresh", stacklevel=4)

    def _restore_gradient(self, numbers: Mapping[str, Any]) -> bool:
        own = {name.removeprefix("gradient/"): x for name, x in numbers.items() if name.startswith("gradient/")}
        return self._gradient is None or self._gradient.restore(own)

    def _fresh_gradient(self) -> GradientState | None:
        moved = self._by_gradient()
        if not moved:
            return None
        by_parameter = any(self.tune[coordinate.hyper].by_parameter for coordinate in moved)
        gradient = self.meta if isinstance(self.meta, Gradient) else paper(by_parameter, self.meta.every)
        return GradientState(gradient, [coordinate.label for coordinate in moved])

    def _groups(self) -> list[dict[str, Any]]:
        return [group for base in self._bases for group in base.optimizer.param_groups]

    def _moved(self, place: Place, number: float) -> float:
        """A hyperparameter moved by its offset; a learning rate of 0 stays 0."""
        offset = self.offsets[place.coordinate]
        return number * math.exp(offset) if place.coordinate.hyper == "lr" else shift(place.domain, number, offset)

    def _by_gradient(self) -> list[Coordinate]:
        """The coordinates that `Gradient` moves."""
        return [c for c in self.offsets if not (isinstance(self.meta, Newton) and c == LR)]

    def _starts(self, coordinate: Coordinate) -> list[float]:
        """The numbers at offset 0 of all that share a coordinate; a learning rate of 0 cannot be moved."""
        groups, places = self._groups(), self._at[coordinate]
        starts = {start_of(groups[place.group], coordinate.hyper) for place in places}
        return [start for start in starts if places[0].domain.contains(start)]

    def _set(self, coordinate: Coordinate, offset: float, at_once: bool = False) -> None:
        """Set an offset within its bounds, ``max_change`` included unless it is to happen at once.

        An offset too far for floating-point numbers, or to the very end of a domain, is not taken.
        """
        domain, starts, old = self._at[coordinate][0].domain, self._starts(coordinate), self.offsets[coordinate]
        new = self.tune[coordinate.hyper].limit(offset, domain, starts, None if at_once else old)
        if abs(new) < FARTHEST and all(domain.contains(shift(domain, start, new)) for start in starts):
            self.offsets[coordinate] = new

    def _schedule(self, steps: int) -> float:
        return 1.0 if self.relative is None else real(f"relative({steps})", self.relative(steps))
