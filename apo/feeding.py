"""The batches that the shell is given: those of the next step's gradient, and those of the call before."""

from collections.abc import Collection, Sequence
from typing import Any

from torch import Tensor

from apo.batches import Fed, detached
from apo.recorder import Forward, Recorder


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
        """B, with a last batch if there is one: each with the conditions of its forward, if there was one for each.

        A batch whose forward has been noted, but not its backward, has no part in the gradient.
        """
        fed = [*self.fed, *([(last, 1.0)] if last is not None else [])]
        forwards: Sequence[Forward | None] = self._recorder.seen
        made = [forward for forward in self._recorder.seen if forward.made is not False]
        if len(forwards) != len(fed):
            forwards = made if len(made) == len(fed) else [None] * len(fed)
        return [
            Fed(detached(batch), weight, *((forward.conditions, forward.of(batch)) if forward else (None, None)))
            for (batch, weight), forward in zip(fed, forwards, strict=True)
            if forward is None or forward in made or not made
        ]

    def __getstate__(self) -> dict[str, Any]:
        """A copy of the model has no gradients, so the batches whose gradients have been made stay behind."""
        return {**vars(self), "fed": self._not_made()}

    def forget(self) -> None:
        """Forget the batches and the forwards whose gradients have been made, and now are discarded."""
        self.fed = self._not_made()
        self._recorder.keep([forward for forward in self._recorder.seen if forward.made is not True])

    def _not_made(self) -> list[tuple[Any, float]]:
        """The batches whose gradients have not been made."""
        seen = self._recorder.seen
        gone = [forward.made is True for forward in seen]
        if len(self.fed) != len(seen):  # not every forward has been fed, or not yet: feeds are those of the first
            gone = [True] * sum(gone)
        rest = [False] * (len(self.fed) - len(gone))
        return [fed for fed, discarded in zip(self.fed, gone + rest, strict=False) if not discarded]

    def others(self, other: Any = None) -> Sequence[Fed]:
        """B': the given batch, or what was kept of the call before."""
        return self._kept if other is None else [Fed(detached(other), 1.0, None, None)]

    def clear(self, keep: Sequence[Fed] = ()) -> None:
        """Forget the batches of a step that is done; keep some as B' for the next call."""
        self.fed, self._kept = [], [fed._replace(outputs=None) for fed in keep]

    def arm(self, due: bool, params: Collection[Tensor]) -> None:
        """Note the conditions of the forwards to come, on the devices of the parameters, if batches are due."""

        def starting() -> None:
            # Not every loop clears gradients through the optimizer. A shard's may wait for its reduction elsewhere.
            if all(param.grad is None and not hasattr(param, "device_mesh") for param in params):
                self.forget()

        self._recorder.arm(due, (param.device for param in params), starting)
