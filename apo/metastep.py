"""A meta-step: take the step, judge it, move the hyperparameters.

Up to the commit, an error leaves everything as it was; after it, exactly the base optimizer's step is done.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from apo.bases.base import Base, Slopes
from apo.batches import head
from apo.evaluation import Evaluation, Fed
from apo.newton import Newton, search, shorten
from apo.proximal import Proximal
from apo.record import Row
from apo.stepping import Step
from apo.tuning import Tuning

NOTHING_FED = (
    "lr is not being tuned: pass batch= to step(), or feed() a batch, whenever opt.due is true; under Lightning and "
    "Transformers their APOCallback does"
)
SKIPPED = "the objective or its gradient is not finite: the meta-step is skipped"
NO_GRADIENT = (
    "no parameter has a gradient, so there is no step to judge: call backward() on a loss of this model before step(), "
    "and zero_grad() not in between"
)
TOO_SMALL = "the step is too small to change any weight in its dtype, so it cannot be judged: raise lr"
DIGITS = 128.0
"""A difference of two losses is made of at least so many units of their rounding, or it says nothing."""
REPEATS = 6
"""A loss that does not come out the same twice is taken so often, to see how far apart it comes out."""


@dataclass
class Verdict:
    """What the objective says of a step.

    Attributes:
        loss: L_B(θ'), or gᵀΔ where the loss is linearised.
        fsd: λ_FSD times the mean discrepancy.
        wsd: λ_WSD times ½‖θ' − θ‖².
        start: Slopes at the beginning of the step.
        end: Slopes at its end.
    """

    loss: float
    fsd: float
    wsd: float
    start: Slopes
    end: Slopes

    @property
    def objective(self) -> float:
        """Q."""
        return self.loss + self.fsd + self.wsd

    @property
    def finite(self) -> bool:
        """Whether every number is finite."""
        return all(map(math.isfinite, (self.objective, *self.start.values(), *self.end.values())))


class MetaStep:
    """One meta-step: `take`, then `judge`.

    Attributes:
        without_other: Whether the function-space term is missing for want of another batch.
        skipped: Whether numbers that are not finite kept the hyperparameters where they were.
        evaluations: Forwards on B beyond the judgement itself, and those that try once whether a loss repeats itself.
    """

    def __init__(
        self,
        bases: Sequence[Base],
        evaluation: Evaluation,
        objective: Proximal,
        tuning: Tuning,
        feeds: Sequence[Fed],
        others: Sequence[Fed],
        steps: int,
    ) -> None:
        """Prepare a meta-step after a number of steps taken, on the batches B and B'."""
        self._bases, self._evaluation, self._objective, self._tuning = bases, evaluation, objective, tuning
        self._processes, self._feeds, self._steps = evaluation.processes, feeds, steps
        self._fsd, self._wsd = objective.weights(steps)
        self.without_other = bool(self._fsd and not others)
        self._others = [fed._replace(batch=head(fed.batch, objective.other_fraction)) for fed in others if self._fsd]
        self._ratios = tuning.ratios(steps)
        self._origin: float | None = None
        self._searched = False
        self.skipped = False
        self.evaluations, self.scale = 0, 1.0

    def take(self) -> bool:
        """Take the step; the first one at a learning rate that is searched.

        Returns:
            Whether any weight moved.
        """
        self._old = self._evaluation.outputs(self._objective, self._others) if self._fsd else []
        searching = self._tuning.searches and bool(self._feeds) and any(any(base.moving()) for base in self._bases)
        if searching:
            here = self._evaluation.judge(self._objective, self._feeds, [], [], 0.0)
            self._origin = here.loss
        backups = [base.backup() for base in self._bases] if searching else []
        offsets = dict(self._tuning.offsets)
        try:
            self._take()
            slope = _along(self._step.pullback(here.gradient)) if searching else math.nan
            if math.isfinite(slope) and math.isfinite(self._start()) and self._step.moved:
                self._search(slope)
                # Taken anew, not rescaled: a step too small for the weights' precision would keep its rounding.
                for restore in backups:
                    restore()
                backups = [base.backup() for base in self._bases]
                self._take()
        except BaseException:
            self._tuning.offsets = offsets
            for restore in backups:
                restore()
            raise
        self._tuning.searched = self._tuning.searched or self._searched
        return self._step.moved

    @property
    def too_small(self) -> str | None:
        """What to say if nothing moved although there are gradients and learning rates."""
        if not self._step.gradient:
            return NO_GRADIENT
        pushed = self._processes.any(any(bool(torch.any(grad != 0)) for grad in self._step.gradient.values()))
        return TOO_SMALL if pushed and any(self.rates) else None

    @property
    def rates(self) -> list[float]:
        """The effective learning rate of each group in the step that stays."""
        return [rate * self._step.scale for rate in self._tuning.rates(self._values)]

    def guard(self) -> None:
        """Shorten the step that has been taken if it made its own batch clearly worse, and judge it no further."""
        self._backtrack(self._loss())

    def judge(self) -> Row:
        """Judge the step that has been taken, and move the hyperparameters.

        Returns:
            A row for the record; its ``hypergradient_norm`` is NaN where they did not move by the hypergradient.
        """
        verdict = self._verdict()
        whole = all(map(math.isfinite, verdict.start.values()))  # else the step itself is not finite
        shortened = whole and self._backtrack(verdict.loss)
        endless = self._objective.loss_model == "linear" and not (self._others or self._wsd)
        self.skipped = not shortened and not verdict.finite
        moving = not shortened and not self.skipped and not endless
        norm = self._tuning.move(verdict.start, verdict.end, self._ratios) if moving else math.nan
        return {
            "step": float(self._steps),
            "objective": verdict.objective,
            "loss": verdict.loss,
            "fsd": verdict.fsd,
            "wsd": verdict.wsd,
            "slope": _along(verdict.start),
            "curvature": _along(verdict.end) - _along(verdict.start),
            "hypergradient_norm": norm,
            "scale": self.scale * self._step.scale,
            "evaluations": float(self.evaluations),
        }

    def _loss(self) -> float:
        """L_B at the live weights."""
        self.evaluations += 1
        return self._evaluation.value(self._feeds)

    def _loss_at(self, scale: float) -> float:
        """L_B and the weight-space term at a scale of the step."""
        with self._step.at(scale):
            return self._loss() + self._weight_space(scale)

    def _weight_space(self, scale: float) -> float:
        """The weight-space term at a scale of the step."""
        return self._wsd * self._step.wsd(scale) if self._wsd else 0.0

    def _rounding(self) -> float:
        """The relative error of a loss, the same in all processes; how well one repeats itself is tried once."""
        start, found = self._start(), self._evaluation
        if found.noise is None and math.isfinite(start):
            losses = [start]
            with self._step.at(0.0):
                while len(losses) < 2 or (len(losses) < REPEATS and losses[1] != start):
                    losses.append(found.value(self._feeds))
            found.noise = (max(losses) - min(losses)) / (abs(start) or 1.0)
        return self._processes.largest(max(found.rounding, found.noise or 0.0))

    def _start(self) -> float:
        """L_B(θ), evaluated if it is not known."""
        if self._origin is None:
            self._origin = self._loss_at(0.0)
        return self._origin

    def _take(self) -> None:
        """Take the step at the learning rates as they are tuned now."""
        self._values = self._tuning.values(self._steps)
        self._step = Step(self._bases, self._values, self._objective.lookahead, self._processes)

    def _search(self, slope: float) -> None:
        """Search the scale of the first step, allowing for schedules and for momentum that has not built up."""
        scale = search(self._loss_at, self._start(), slope, self._rounding())
        build_up = max(base.build_up() for base in self._bases)
        self.scale = self._tuning.rescale(scale * (max(self._ratios) or 1.0) / build_up)
        self._searched = True

    def _backtrack(self, loss: float) -> bool:
        """Shorten a step that made its own batch clearly worse, and has not just been searched."""
        watch = self._tuning.watch
        if self._searched:
            return False
        if self._tuning.backtracks and self._feeds and watch.outlier(loss):
            start = self._start()
            if math.isfinite(start) and not loss <= start + watch.spread:
                self._step.rescale(self._tuning.rescale(shorten(self._loss_at, start)))
                return True
        watch.add(loss)
        return False

    def _verdict(self) -> Verdict:
        """Q and its slopes along the step."""
        step, linear = self._step, self._objective.loss_model == "linear"
        with step.at(step.scale):
            feeds = [] if linear else self._feeds
            found = self._evaluation.judge(self._objective, feeds, self._others, self._old, self._fsd)
        gradient = dict(found.gradient)
        for name, delta in step.delta.items():
            if linear:
                gradient[name] = gradient.get(name, 0.0) + step.gradient[name]
            if self._wsd:
                gradient[name] = gradient.get(name, 0.0) + self._wsd * step.scale * delta
        start, end = step.pullback(step.gradient), step.pullback(gradient)
        loss = step.linear_change() if linear else found.loss
        verdict = Verdict(loss, found.fsd, self._weight_space(step.scale), start, end)
        matters = isinstance(self._tuning.meta, Newton) or any(ratio != 1.0 for ratio in self._ratios)
        if matters and not linear:
            self._correct_start(verdict)
        return verdict

    def _correct_start(self, verdict: Verdict) -> None:
        """Slopes at the start from losses, a = 2(Q(1) − Q(0)) − b: the gradient may have been clipped or scaled."""
        change = verdict.objective - self._start()
        a, b = _along(verdict.start), _along(verdict.end)
        weights = max((torch.finfo(before.dtype).eps for before in self._step.before.values()), default=0.0)
        scaled = (2.0 * change - b) / a if a else 0.0
        # Clipping keeps the sign: where it differs, the loss bends too much along the step for the losses to tell.
        if scaled > 0.0 and abs(change) > DIGITS * max(weights, self._rounding()) * abs(self._start()):
            verdict.start = {where: slope * scaled for where, slope in verdict.start.items()}


def _along(slopes: Slopes) -> float:
    """The slope along the step: the sum over all learning rates."""
    return sum(slope for (coordinate, _), slope in slopes.items() if coordinate.hyper == "lr")
