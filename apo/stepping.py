"""One step of all base optimizers, taken and judged: the live weights go along it and come back exactly."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

from apo.bases import Base, Slopes, Values
from apo.evaluation import Conditions, Evaluation, Fed
from apo.proximal import Proximal, half_square
from apo.types import Params

CANCELLED = 1e3 * torch.finfo(torch.float32).eps
"""A relative difference of two losses below this is rounding."""


class Step:
    """A step that has been taken, as one displacement of the live weights.

    Attributes:
        before: θ, copies.
        delta: The displacement that is judged, at scale 1.
        scale: The scale of the step that stays, against the one taken.
    """

    def __init__(self, bases: Sequence[Base], values: Sequence[Values], judged: str) -> None:
        """Take the step: the live weights are θ' afterwards."""
        self._live = {name: param for base in bases for _, _, name, param in base.moving()}
        self.gradient = {name: param.grad for name, param in self._live.items() if param.grad is not None}
        taken = [base.take(settings, judged) for base, settings in zip(bases, values, strict=True)]
        self.before: Params = {name: tensor for t in taken for name, tensor in t.before.items()}
        self.delta: Params = {name: tensor for t in taken for name, tensor in t.delta.items()}
        self.scale = 1.0
        self._distinct = any(t.committed is not None for t in taken)
        self._pullbacks = [t.pullback for t in taken]

    @property
    def moved(self) -> bool:
        """Whether any weight is displaced."""
        return any(bool(torch.any(delta != 0)) for delta in self.delta.values())

    def pullback(self, cotangents: Params) -> Slopes:
        """From a gradient at θ' to derivatives with respect to offsets, at the scale that stays."""
        slopes: Slopes = {}
        for pull in self._pullbacks:
            slopes |= {where: self.scale * slope for where, slope in pull(cotangents).items()}
        return slopes

    def wsd(self, scale: float) -> float:
        """The weight-space discrepancy of the judged step at a scale, ½‖sΔ‖²."""
        return scale**2 * half_square(self.delta).item()

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
            self._write(kept)

    def rescale(self, factor: float) -> None:
        """Make the step that stays longer or shorter: θ + factor·(θ' − θ)."""
        if factor != 1.0:
            self.scale *= factor
            with torch.no_grad():
                for name, param in self._live.items():
                    param.copy_(self.before[name] + factor * (param - self.before[name]))

    def undo(self) -> None:
        """Put the live weights back to θ."""
        self._write(self.before)

    def _write(self, weights: Mapping[str, Tensor]) -> None:
        with torch.no_grad():
            for name, param in self._live.items():
                param.copy_(weights[name])


@dataclass
class Verdict:
    """What the objective says of a step.

    Attributes:
        loss: L_B(θ').
        fsd: λ_FSD times the mean discrepancy.
        wsd: λ_WSD times ½‖θ' − θ‖².
        start: Slopes at the beginning of the step, for learning rates.
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


@dataclass
class Judge:
    """How steps are judged on the batches of one meta-step.

    Attributes:
        evaluation: Takes losses and gradients at the live weights.
        objective: What is judged.
        feeds: B.
        other: B'.
        old: Outputs on B' at θ.
        fsd: λ_FSD.
        wsd: λ_WSD.
        origin: L_B(θ), once it is known.
        evaluations: Forwards on B beyond the judgement itself.
    """

    evaluation: Evaluation
    objective: Proximal
    feeds: Sequence[Fed]
    other: Sequence[Fed]
    old: Sequence[tuple[Tensor, Conditions]]
    fsd: float
    wsd: float
    origin: float | None = None
    evaluations: int = 0

    def loss(self) -> float:
        """The loss on B at the live weights."""
        self.evaluations += 1
        return self.evaluation.value(self.feeds)

    def along(self, step: Step) -> Callable[[float], float]:
        """The loss on B, and the weight-space term, as a function of the scale of a step."""

        def loss_at(scale: float) -> float:
            with step.at(scale):
                return self.loss() + self.wsd * step.wsd(scale)

        return loss_at

    def loss_before(self, step: Step) -> float:
        """L_B(θ), evaluated if it is not known."""
        if self.origin is None:
            with step.at(0.0):
                self.origin = self.loss()
        return self.origin

    def judge(self, step: Step, exact_start: bool) -> Verdict:
        """Q and its slopes along a step.

        Args:
            step: The step.
            exact_start: Whether the slopes at its start matter.

        Returns:
            The verdict.
        """
        linear = self.objective.loss_model == "linear"
        with step.at(step.scale):
            found = self.evaluation.judge(self.objective, [] if linear else self.feeds, self.other, self.old, self.fsd)
        gradient = dict(found.gradient)
        start = step.pullback(step.gradient)
        for name, delta in step.delta.items():
            parts = [gradient.get(name), step.gradient[name] if linear else None]
            parts.append(self.wsd * step.scale * delta if self.wsd else None)
            terms = [part for part in parts if part is not None]
            if terms:
                gradient[name] = torch.stack(terms).sum(0) if len(terms) > 1 else terms[0]
        end = step.pullback(gradient)
        loss = sum(v for (c, _), v in start.items() if c.hyper == "lr") if linear else found.loss
        verdict = Verdict(loss, found.fsd, self.wsd * step.wsd(step.scale), start, end)
        known = linear or all(fed.conditions is not None for fed in self.feeds)
        if exact_start and not known:
            self._correct_start(step, verdict)
        return verdict

    def _correct_start(self, step: Step, verdict: Verdict) -> None:
        """Slopes at the start from losses, a = 2(Q(1) − Q(0)) − b, where the gradient may be of another loss."""
        origin = self.loss_before(step)
        change = verdict.objective - origin
        if abs(change) <= CANCELLED * abs(origin):
            return
        a = sum(v for (c, _), v in verdict.start.items() if c.hyper == "lr")
        b = sum(v for (c, _), v in verdict.end.items() if c.hyper == "lr")
        if a:
            verdict.start = {where: v * (2.0 * change - b) / a for where, v in verdict.start.items()}
