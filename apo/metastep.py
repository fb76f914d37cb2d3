"""A meta-step: look where the step leads, judge it, take it, move the hyperparameters.

An error before the judgement leaves everything as it was; after one in the judgement, exactly the base optimizer's step
is done.
"""

import math
from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor

from apo.bases.base import Base
from apo.batches import Fed, head
from apo.evaluation import Evaluation
from apo.newton import Newton, search, shorten
from apo.proximal import Proximal
from apo.record import Row
from apo.stepping import Step
from apo.trees import add_part, inner, total
from apo.tuning import Tuning
from apo.types import Params
from apo.verdict import Verdict, along

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


class MetaStep:
    """One meta-step: `look`, then `judge` or `guard`, then `commit`, then `settle`.

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
        self._by_losses = tuning.by_losses(self._fsd)
        part = objective.other_fraction or (0.5 if self._by_losses else 1.0)
        self._others = [fed._replace(batch=head(fed.batch, part)) for fed in others if self._fsd]
        self._ratios = tuning.ratios(steps)
        self._origin: float | None = None
        self._offsets = dict(tuning.offsets)
        self._searched = False
        self._verdict: Verdict | None = None
        self._watched: float | None = None
        self._shorter: float | None = None
        self.skipped, self.evaluations, self.scale = False, 0, 1.0

    def look(self, guarding: bool = False) -> bool:
        """Put the live weights where the step leads; search its scale first, if that is to be.

        Args:
            guarding: Whether it is to be guarded only.

        Returns:
            Whether any weight moved.
        """
        tuning, exact = self._tuning, self._objective.loss_model == "exact"
        searching = tuning.searches and bool(self._feeds) and any(any(base.moving()) for base in self._bases)
        gradient: Params = {}
        if exact and self._start_matters and not (searching or guarding):
            self._origin = self._evaluation.known(self._feeds)
        self._old = self._evaluation.outputs(self._objective, self._others) if self._fsd else []
        if searching:
            self._origin = self._judge(self._feeds, [], partial(add_part, gradient))[0]
        elif self._by_losses and tuning.trust.due and exact and not guarding:
            self._check()
        self._look(undo=searching)
        try:
            slope = along(self._step.slopes(gradient)) if searching else math.nan
            if math.isfinite(slope) and math.isfinite(self._start()) and self._step.moved:
                self._search(slope)
                # Looked at anew, not rescaled: a step too small for the weights' precision would keep its rounding.
                self._step.abandon()
                self._look(undo=True)
        except BaseException:
            self._step.abandon()
            tuning.offsets = self._offsets
            raise
        return self._step.moved

    def commit(self) -> None:
        """Leave the live weights where the base optimizers lead: once that is done, a step has been taken."""
        try:
            self._step.commit()
        except BaseException:
            self._tuning.offsets = self._offsets
            raise
        self._tuning.searched = self._tuning.searched or self._searched

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
        """Find out whether the step makes its own batch clearly worse, and judge it no further."""
        self._watch(self._loss())

    def judge(self) -> None:
        """Judge the step."""
        self._verdict = verdict = self._judged()
        # Not where the step itself is not finite; and the linear model's loss is a change, which is none to watch.
        if all(map(math.isfinite, verdict.start.values())) and self._objective.loss_model == "exact":
            self._watch(verdict.loss)

    def settle(self) -> Row | None:
        """Shorten the step that has been taken, or move the hyperparameters, as it was judged.

        Returns:
            A row for the record, if it was more than guarded; its ``hypergradient_norm`` is NaN where the
            hyperparameters did not move by the hypergradient.
        """
        if self._shorter is not None:
            self._step.rescale(self._tuning.rescale(self._shorter))
        elif self._watched is not None:
            self._tuning.watch.add(self._watched, self._start)
        if self._verdict is None:
            return None
        self._tuning.trust.count()
        verdict, shortened = self._verdict, self._shorter is not None
        endless = self._objective.loss_model == "linear" and not (self._others or self._wsd)
        self.skipped = not shortened and not verdict.finite
        moving = not shortened and not self.skipped and not endless
        found = verdict.start, verdict.end, self._ratios, self._objective.lookahead
        norm = self._tuning.move(*found) if moving else math.nan
        return {
            "step": float(self._steps),
            "objective": verdict.objective,
            "loss": verdict.loss,
            "fsd": verdict.fsd,
            "wsd": verdict.wsd,
            "slope": along(verdict.start),
            "curvature": along(verdict.end) - along(verdict.start),
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
            return self._loss() + self._wsd * scale**2 * self._step.wsd

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

    def _check(self) -> None:
        """Find out whether the gradients that the optimizer is given are those of the loss on the fed batches."""
        given = {name: grad for base in self._bases for name, grad in base.gradients().items()}
        products: list[Tensor] = []

        def take_in(name: str, gradient: Tensor) -> None:
            if name in given:
                products.append(inner(gradient, given[name]))

        self._origin = self._judge(self._feeds, [], take_in)[0]
        square = total(inner(grad, grad) for grad in given.values())
        self._tuning.trust.check(*self._processes.whole([total(products), square]))

    def _start(self) -> float:
        """L_B(θ), evaluated if it is not known."""
        if self._origin is None:
            self._origin = self._loss_at(0.0)
        return self._origin

    def _look(self, undo: bool = False) -> None:
        """Put the live weights where the step at the learning rates as they are tuned now leads."""
        self._values = self._tuning.values(self._steps)
        self._step = Step(
            self._bases,
            self._values,
            self._objective.lookahead,
            self._processes,
            wsd=self._wsd != 0.0,
            undo=undo,
        )

    def _search(self, slope: float) -> None:
        """Search the scale of the first step, allowing for schedules and for momentum that has not built up."""
        scale = search(self._loss_at, self._start(), slope, self._rounding())
        build_up = max(base.build_up(self._objective.lookahead) for base in self._bases)
        self.scale = self._tuning.rescale(scale * (max(self._ratios) or 1.0) / build_up)
        self._searched = True

    def _watch(self, loss: float) -> None:
        """Find how much shorter a step must be that makes its own batch clearly worse, and was not searched."""
        watch = self._tuning.watch
        if self._searched or not isinstance(self._tuning.meta, Newton):
            return
        self._watched = loss
        if self._tuning.backtracks and self._feeds and watch.outlier(loss):
            start = self._start()
            if math.isfinite(start) and not loss <= start + watch.spread:
                self._shorter = shorten(self._loss_at, start)

    def _judge(
        self, feeds: Sequence[Fed], others: Sequence[Fed], take_in: Callable[[str, Tensor], None] | None
    ) -> tuple[float, float]:
        return self._evaluation.judge(self._objective, feeds, others, self._old if others else [], self._fsd, take_in)

    def _judged(self) -> Verdict:
        """Q and its slopes along the step."""
        step, linear = self._step, self._objective.loss_model == "linear"
        by_losses = self._by_losses and self._losses_tell(linear)
        loss, fsd = self._judge([] if linear else self._feeds, self._others, None if by_losses else step.take_in)
        end = {} if by_losses else step.end()
        for weight, slopes in ((float(linear), step.start), (self._wsd, step.wsd_slopes)):
            for where in end if weight else ():
                end[where] += weight * slopes[where]
        verdict = Verdict(step.change() if linear else loss, fsd, self._wsd * step.wsd, dict(step.start), end)
        if by_losses:
            self._end_by_losses(verdict, 0.0 if linear else self._start())
        elif self._start_matters and not linear:
            self._correct_start(verdict)
        return verdict

    @property
    def _start_matters(self) -> bool:
        """Whether the slope at the start of the step moves anything."""
        return isinstance(self._tuning.meta, Newton) or any(ratio != 1.0 for ratio in self._ratios)

    def _losses_tell(self, linear: bool) -> bool:
        """Whether the curvature along the step can be had from losses."""
        if len({ratio for ratio in self._ratios if ratio}) > 1 or not self._step.moved:
            return False  # groups that are scheduled apart need a curvature each
        a = along(self._step.start)
        if linear:
            return a != 0.0
        return self._tuning.trust.own and self._tells(a)

    def _tells(self, change: float) -> bool:
        """Whether a change of the loss stands out from its rounding and that of the weights."""
        return abs(change) > DIGITS * max(self._step.eps, self._rounding()) * abs(self._start())

    def _end_by_losses(self, verdict: Verdict, start: float) -> None:
        """Slopes at the end from losses, b = a + c with c = 2(Q(1) − Q(0) − a)."""
        ratio = 2.0 * (verdict.objective - start) / along(verdict.start) - 1.0
        verdict.end = {where: ratio * slope for where, slope in verdict.start.items()}

    def _correct_start(self, verdict: Verdict) -> None:
        """Slopes at the start from losses, a = 2(Q(1) − Q(0)) − b: the gradient may have been clipped or scaled."""
        change = verdict.objective - self._start()
        a, b = along(verdict.start), along(verdict.end)
        scaled = (2.0 * change - b) / a if a else 0.0
        # Clipping keeps the sign: where it differs, the loss bends too much along the step for the losses to tell.
        if scaled > 0.0 and self._tells(change):
            verdict.start = {where: slope * scaled for where, slope in verdict.start.items()}
