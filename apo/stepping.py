"""One step of all base optimizers as one displacement: the live weights go along it and come back exactly."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial

import torch
from torch import Tensor

from apo.bases.base import Base, Slopes, Terms, Trial, Values
from apo.pieces import Cut, rows, some
from apo.processes import Processes
from apo.shards import local
from apo.trees import add_part, inner, total
from apo.types import Judged, Params


class Step:
    """A step under judgement: the live weights are θ + Δ, until `commit` leaves them where the base optimizers lead.

    Beside the live weights there is one copy of them, θ. Gradients at θ + Δ are taken in one by one, and not kept.

    Attributes:
        moved: Whether any weight is displaced, in any process.
        start: Slopes of what g is the gradient of, at the beginning of the step.
        wsd: The weight-space discrepancy, ½‖Δ‖², if it is wanted.
        wsd_slopes: Its slopes at the end of the step.
        scale: The scale of the step that stays, against the one taken.
    """

    def __init__(
        self,
        bases: Sequence[Base],
        values: Values,
        judged: Judged,
        processes: Processes,
        *,
        wsd: bool = False,
        undo: bool = False,
    ) -> None:
        """Put the live weights at the end of the step to be judged.

        Args:
            bases: The base optimizers.
            values: Effective hyperparameters.
            judged: Whether momentum is left out of the judgement.
            processes: Those that train together.
            wsd: Whether the weight-space discrepancy and its slopes are wanted.
            undo: Whether `abandon` is to be possible also where a base can only be judged by taking its step.
        """
        self._bases, self._processes = bases, processes
        moving = {name: param for base in bases for _, _, name, param in base.moving()}
        for name, param in moving.items():
            if param.is_complex():
                raise ValueError(f"{name} is complex, which cannot be judged; train it with an optimizer of its own")
        self._live = {name: local(param) for name, param in moving.items()}
        self._trials: list[Trial] = []
        self._undo: list[Callable[[], None]] = []
        try:
            for base in bases:
                if base.takes(judged) and (undo or len(bases) > 1):
                    self._undo.append(base.backup())
                self._trials.append(base.trial(values, judged))
            self._pieces = [(trial, cut) for trial in self._trials for cut in trial.cuts]
            self._places: dict[str, list[int]] = {}
            for place, (_, cut) in enumerate(self._pieces):
                for name in cut:
                    self._places.setdefault(name, []).append(place)
            self._go(wsd)
        except BaseException:
            self.abandon()
            raise
        self.scale = 1.0
        self._end: Terms = {where: [] for where in self.start}  # the same in all processes
        self._waiting: dict[int, Params] = {}

    @property
    def gradient(self) -> Params:
        """The gradient g of everything that moves."""
        return {name: tensor for trial in self._trials for name, tensor in trial.gradient.items()}

    @property
    def eps(self) -> float:
        """The relative error of the weights, the largest where their dtypes differ."""
        return max((torch.finfo(param.dtype).eps for param in self._live.values()), default=0.0)

    def change(self) -> float:
        """The change of the loss to first order, gᵀΔ."""
        terms: list[Tensor] = []
        for trial, cut in self._pieces:
            slopes = some(trial.gradient, cut)
            terms.extend(inner(slopes[name], delta) for name, delta in trial.look(cut).delta.items())
        return self._processes.whole([total(terms)])[0]

    def slopes(self, cotangents: Params) -> Slopes:
        """From a gradient at θ + Δ to derivatives with respect to offsets."""
        terms: Terms = {where: [] for where in self.start}
        for trial, cut in self._pieces:
            _add(terms, trial.look(cut).pullback(some(cotangents, cut)))
        return self._whole(terms)

    def take_in(self, name: str, gradient: Tensor) -> None:
        """Take in a part of the gradient at θ + Δ: of one parameter, or a term of it."""
        for place in self._places.get(name, ()):
            cut = self._pieces[place][1]
            waiting = self._waiting.setdefault(place, {})
            add_part(waiting, name, rows(gradient, cut[name]))
            if len(waiting) == len(cut):
                self._pull(place)

    def end(self) -> Slopes:
        """Slopes at the end of the step, of what all that has been taken in is the gradient of."""
        for place in list(self._waiting):
            self._pull(place)
        return self._whole(self._end)

    @contextmanager
    def at(self, scale: float) -> Iterator[None]:
        """Put the live weights at θ + scale·Δ; at the end, exactly back to θ + Δ."""
        if scale == 1.0:
            yield
            return
        kept = {name: param.detach().clone() for name, param in self._live.items()}
        try:
            for trial, cut in self._pieces if scale else ():
                self._put(trial, cut, trial.look(cut).delta, scale)
            if not scale:
                self._back(self._trials)
            yield
        finally:
            with torch.no_grad():
                for name, param in self._live.items():
                    param.copy_(kept[name])

    def commit(self) -> None:
        """Take the steps that have only been looked at; if one fails, none is taken."""
        self._back(trial for trial in self._trials if trial.commit)
        commits = [(base, trial.commit) for base, trial in zip(self._bases, self._trials, strict=True) if trial.commit]
        try:
            all_or_none(commits)
        except BaseException:
            self.abandon()
            raise
        self._undo = []

    def abandon(self) -> None:
        """Take no step: everything is as it was, as far as it can be undone."""
        self._back(trial for trial in self._trials if trial.commit)
        for undo in self._undo:
            undo()

    def rescale(self, factor: float) -> None:
        """Make the step that stays longer or shorter: θ + factor·(θ' − θ)."""
        if factor != 1.0:
            self.scale *= factor
            with torch.no_grad():
                for trial in self._trials:
                    for name, before in trial.before.items():
                        param = self._live[name]
                        param.copy_(before + factor * (param - before))

    def _go(self, wsd: bool) -> None:
        """Put the live weights at θ + Δ, and learn on the way what there is to know of it."""
        starts, ends = Terms(), Terms()
        halves: list[Tensor] = []
        moved = False
        for trial, cut in self._pieces:
            piece = trial.look(cut)
            _add(starts, piece.pullback(some(trial.gradient, cut)))
            if wsd:
                halves.extend(0.5 * inner(delta, delta) for delta in piece.delta.values())
                _add(ends, piece.pullback(piece.delta))
            moved = moved or any(map(_nonzero, piece.delta.values()))
            if trial.commit is not None:
                self._put(trial, cut, piece.delta, 1.0)
            del piece  # before the next one is there
        self.start, self.wsd_slopes = self._whole(starts), self._whole(ends)
        self.moved = self._processes.any(moved)
        (self.wsd,) = self._processes.whole([total(halves)])

    def _put(self, trial: Trial, cut: Cut, displaced: Params, scale: float) -> None:
        with torch.no_grad():
            for name, delta in displaced.items():
                start, end = (rows(whole[name], cut[name]) for whole in (trial.before, self._live))
                torch.add(start, delta, alpha=scale, out=end)

    def _back(self, trials: Iterable[Trial]) -> None:
        """Put the weights of some trials to θ."""
        with torch.no_grad():
            for trial in trials:
                for name, before in trial.before.items():
                    self._live[name].copy_(before)

    def _pull(self, place: int) -> None:
        trial, cut = self._pieces[place]
        _add(self._end, trial.look(cut).pullback(self._waiting.pop(place)))

    def _whole(self, terms: Terms) -> Slopes:
        """The sums of derivatives, over all processes too."""
        slopes = [total(parts) for parts in terms.values()]
        return dict(zip(terms, self._processes.whole(slopes), strict=True))


def step_all(bases: Sequence[Base], values: Values) -> None:
    """Take the step of every base, or of none."""
    all_or_none([(base, partial(base.step, values)) for base in bases])


def all_or_none(steps: Sequence[tuple[Base, Callable[[], None]]]) -> None:
    """Take steps of bases; if a later one raises, those before it are put back.

    What they may change is copied before; the last one's, which is all there is where there is but one, is not.
    """
    backups: list[Callable[[], None]] = []
    try:
        for place, (base, take) in enumerate(steps, 1):
            if place < len(steps):
                backups.append(base.backup())
            take()
    except BaseException:
        for restore in backups:
            restore()
        raise


def _nonzero(delta: Tensor) -> bool:
    """Whether any entry is not zero; the first row mostly tells."""
    return bool(rows(delta, slice(1)).any()) or bool(delta.any())


def _add(terms: Terms, more: Terms) -> None:
    for where, parts in more.items():
        terms.setdefault(where, []).extend(parts)
