"""When the rules that use the model's curvature observe it, and on what.

"mc" and "exact" Fisher information is measured by an evaluation of the fed batch, just before the step; "empirical"
takes the gradients of the training backward itself, so its layers are watched from the forward on.
"""

import weakref
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

from apo.bases.base import Base
from apo.bases.rule import RuleBase
from apo.batches import Fed
from apo.evaluation import Evaluation
from apo.fisher import Collector, cotangents
from apo.layers import check_layers, uncompiled
from apo.types import Factors, Fisher, Statistics

NOT_FED = "the curvature is not being measured: pass batch= to step(), or feed() a batch, whenever opt.due is true"
NOT_SEEN = (
    "the curvature is not being measured: fisher='empirical' watches the model's own forward and backward, "
    "and its outputs must be a tensor or have logits"
)
SCALED = (
    "fisher='empirical' takes the gradients of the training backward, and those in float16 are a GradScaler's, scaled: "
    "use fisher='mc' or 'exact', or bfloat16 without a scaler"
)
NOT_FINITE = "a Fisher factor is not finite: the observation of its layer is skipped"


class Observing:
    """The observations of all bases that use the curvature."""

    def __init__(self, bases: Sequence[Base], evaluation: Evaluation) -> None:
        """Find the bases that do.

        Raises:
            ValueError: If a rule was made for another model.
        """
        self._evaluation = evaluation
        self._watched = [
            (base, base.optimizer.rule.fisher, Collector(base.optimizer.rule.fisher))
            for base in bases
            if isinstance(base, RuleBase) and base.optimizer.rule.fisher is not None
        ]
        self._undo: list[Callable[[], None]] = []
        for _, fisher, _ in self._watched:
            check_layers(evaluation.model, fisher.layers)
        self._finally()

    def __setstate__(self, state: dict[str, Any]) -> None:
        """A copy owns the copied hooks on the copied model."""
        vars(self).update(state)
        self._finally()

    def due(self, steps: int) -> bool:
        """Whether the step after a number of steps is preceded by an observation."""
        return bool(self._due(steps))

    def wants_batch(self, steps: int) -> bool:
        """Whether the step after a number of steps needs a batch to measure the curvature on."""
        return any(fisher.kind != "empirical" for _, fisher, _ in self._due(steps))

    def arm(self, steps: int) -> None:
        """Watch the training forward and backward to come, where they are the measurement."""
        self._undo = []
        for _, _, collector in self._watched:
            collector.stop()
        for _, fisher, collector in self._due(steps):
            if fisher.kind == "empirical":
                collector.start(uncompiled(self._evaluation.model))

    def forget(self) -> None:
        """Forget the training backwards since `arm`: their gradients have been discarded."""
        for _, _, collector in self._watched:
            collector.clear()

    def observe(self, feeds: Sequence[Fed], steps: int) -> str | None:
        """Let every base observe what is due; return what the user should be told.

        Raises:
            ValueError: If the gradients that "empirical" has seen are scaled.
        """
        message = None
        for base, fisher, collector in self._due(steps):
            if fisher.kind == "empirical":
                collector.stop()
                if collector.float16:
                    raise ValueError(SCALED)
                found = collector.statistics(float(collector.examples)) if collector.examples else {}
                message = message or (None if found else NOT_SEEN)
            else:
                with self._evaluation.processes.together():
                    found = self._measured(fisher, collector, feeds, steps)
                message = message or (None if found else NOT_FED)
            found = self._shared(fisher, found)
            finite = {name: factors for name, factors in found.items() if all(f.isfinite().all() for f in factors)}
            message = message or (None if len(finite) == len(found) else NOT_FINITE)
            self._undo.append(base.observe(finite))
        return message

    def undo(self) -> None:
        """Take back the last observations: the step that they were for has not been taken."""
        while self._undo:
            self._undo.pop()()

    def _shared(self, fisher: Fisher, found: Statistics) -> Statistics:
        """The means over all processes, of the layers that all of them have seen used."""
        processes = self._evaluation.processes
        used = processes.mean([float(name in found) for name in fisher.layers])
        found = {name: found[name] for name, share in zip(fisher.layers, used, strict=True) if share == 1.0}
        processes.average([factor for factors in found.values() for factor in factors])
        return found

    def _finally(self) -> None:
        """Leave nothing on the model when this is gone."""
        for _, _, collector in self._watched:
            weakref.finalize(self, collector.stop).atexit = False

    def _due(self, steps: int) -> list[tuple[RuleBase, Fisher, Collector]]:
        """The bases to be observed before the step after so many: often at first, when the curvature changes most."""
        early = 1 << max(0, steps.bit_length() - 4)  # a sixteenth to an eighth of the steps taken
        return [watched for watched in self._watched if steps % min(early, watched[1].every) == 0]

    def _measured(self, fisher: Fisher, collector: Collector, feeds: Sequence[Fed], steps: int) -> Statistics:
        """The weighted mean of the factors over the fed batches."""
        whole, rank = sum(fed.weight for fed in feeds), self._evaluation.processes.rank
        mean: Statistics = {}
        for number, fed in enumerate(feeds):
            pulled = partial(cotangents, fisher, loss=self._evaluation.loss)
            self._evaluation.pull(fed, collector.watching, pulled, seed=(rank << 48) + (steps << 16) + number)
            for name, factors in collector.statistics(1.0).items():
                so_far = mean.get(name, Factors(*(0.0 * f for f in factors)))
                mean[name] = Factors(*(m + fed.weight / whole * f for m, f in zip(so_far, factors, strict=True)))
        return mean
