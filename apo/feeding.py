"""The batches that the shell is given: those of the next step's gradient, and those of the call before."""

from collections.abc import Iterable, Sequence
from typing import Any

from torch import Tensor

from apo.batches import detached
from apo.conditions import Recorder
from apo.evaluation import Fed


class Feeding:
    """What has been fed since the last step, and B', kept for one call.

    Attributes:
        fed: Batches and weights that the gradient of the next step is of.
    """

    def __init__(self, recorder: Recorder) -> None:
        """Start empty; the recorder notes the conditions of the forwards that batches are paired with."""
        self._recorder = recorder
        self.fed: list[tuple[Any, float]] = []
        self._kept: Sequence[Fed] = ()

    def add(self, batch: Any, weight: float) -> None:
        """Take a batch that the gradient of the next step is of."""
        self.fed.append((batch, weight))

    def paired(self, last: Any = None) -> list[Fed]:
        """B, with a last batch if there is one: each with the conditions of its forward, if there was one for each."""
        fed = [*self.fed, *([(last, 1.0)] if last is not None else [])]
        seen = self._recorder.seen
        conditions = seen if len(seen) == len(fed) else [None] * len(fed)
        return [Fed(detached(batch), weight, c) for (batch, weight), c in zip(fed, conditions, strict=True)]

    def others(self, other: Any = None) -> Sequence[Fed]:
        """B': the given batch, or what was kept of the call before."""
        return self._kept if other is None else [Fed(detached(other), 1.0, None)]

    def clear(self, keep: Sequence[Fed] = ()) -> None:
        """Forget the batches of a step that is done; keep some as B' for the next call."""
        self.fed, self._kept = [], keep

    def arm(self, due: bool, params: Iterable[Tensor]) -> None:
        """Note the conditions of the forwards to come, on the devices of the parameters, if batches are due."""
        self._recorder.arm(due, (param.device for param in params))
