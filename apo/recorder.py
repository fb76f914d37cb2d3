"""Which forwards the training makes: the conditions of each, and whether its gradient is made."""

import weakref
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from threading import get_ident
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from apo.batches import tensors
from apo.conditions import Conditions, now
from apo.traces import Traces

MOST = 256
"""No more forwards than this are noted between two steps."""
Keeps = Callable[[Any], Any]
"""What is to be kept of outputs: a tensor, or anything else for nothing."""
LITTLE = 2**20
"""Bytes of outputs that are kept until the step."""


@dataclass(eq=False)
class Forward:
    """A training forward.

    Attributes:
        conditions: Under which it ran.
        made: Whether a backward has reached its outputs, so that its gradient is made; None where that cannot be told.
        hooks: Those that wait for the backward.
        given: What the model was given, by place and by name; tensors may be gone.
        outputs: What came out, as far as `Recorder.keeps` says so, if it is a small tensor.
        versions: Of these tensors and of the model's weights, to notice if one is changed,
        before: as they were.
    """

    conditions: Conditions
    made: bool | None = False
    hooks: Sequence[torch.utils.hooks.RemovableHandle] = ()
    given: Mapping[int | str, Callable[[], Any]] = field(default_factory=dict)
    outputs: Tensor | None = None
    versions: Callable[[], list[int]] = list
    before: Sequence[int] = ()

    def make(self, gradient: Tensor) -> None:
        """Take note of the backward."""
        self.made = True

    @torch.compiler.disable  # type: ignore[untyped-decorator]  # there is nothing to compile
    def note(
        self, model: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any], outputs: Any, keeps: Keeps
    ) -> None:
        """Keep what came out, and remember what went in."""
        found = keeps(outputs)
        if isinstance(found, Tensor) and found.layout == torch.strided and found.nbytes <= LITTLE:
            self.outputs = kept = found.detach()
            given: Any = {**dict(enumerate(args)), **kwargs}
            self.given = {place: _held(value) for place, value in given.items()}
            seen = [_held(tensor) for tensor in (*tensors([args, kwargs]), *model.parameters())]
            self.versions = lambda: [_version(tensor()) for tensor in seen] + [_version(kept)]
            self.before = self.versions()

    def of(self, batch: Any) -> Tensor | None:
        """What came out, if it is known, and the model was given just this batch, as `Evaluation` does by default.

        Neither may have changed since, nor the weights.
        """
        wanted: Mapping[Any, Any] = {}
        if isinstance(batch, Mapping):
            wanted = batch
        elif isinstance(batch, Sequence):
            wanted = dict(enumerate(batch[:1]))
        same = bool(wanted) and self.given.keys() == wanted.keys()
        same = same and all(self.given[place]() is value for place, value in wanted.items())
        return self.outputs if same and self.versions() == self.before else None


def _held(value: Any) -> Callable[[], Any]:
    """A value without keeping it alive, if it is a tensor."""
    return weakref.ref(value) if isinstance(value, Tensor) else lambda: value


def _version(tensor: Any) -> int:
    return -1 if tensor is None or tensor.is_inference() else int(tensor._version)


def _nothing(outputs: Any) -> None:
    """Of what comes out, nothing is kept."""


class Recorder:
    """Two forward hooks that note the conditions of training forwards while it is armed, and their backwards.

    A copy of the model carries copies of the hooks: these note nothing, and at its first forward they remove themselves
    unless an optimizer that has been copied along has made them its own.
    """

    evaluations: ClassVar[list[Traces]] = []
    """What is kept by the evaluations under way, the outermost first: what they run is no training forward, unless it
    is that of an inner loop."""

    def __init__(self) -> None:
        """Start idle, for the CPU."""
        self.devices = {torch.device("cpu")}
        self.armed, self._depth, self.owned = False, 0, True
        self.seen: list[Forward] = []
        self._hooks: list[torch.utils.hooks.RemovableHandle] = []
        self.keeps: Keeps = _nothing

    @classmethod
    @torch.compiler.disable  # type: ignore[untyped-decorator]  # it cannot trace which thread runs
    def under_way(cls) -> list[Traces]:
        """The evaluations of this thread: another one may train another model."""
        return [traces for traces in cls.evaluations if traces.thread == get_ident()]

    def watch(self, model: nn.Module) -> None:
        """Hook a model's forwards."""
        self._hooks = [
            model.register_forward_pre_hook(self.before),
            model.register_forward_hook(self.after, with_kwargs=True),
        ]

    def stop(self) -> None:
        """Leave nothing on the model."""
        for hook in self._hooks:
            hook.remove()

    def before(self, module: nn.Module, args: Any) -> None:
        """Note the conditions of a forward that records a graph; let the evaluations it is part of keep the module."""
        for traces in self.under_way():
            traces.keep(module)
        if not (self.owned or torch.compiler.is_compiling()):
            self.stop()
        if self._noting:
            self._starting()
            if len(self.seen) < MOST:
                self.seen.append(Forward(now(self.devices)))

    def after(self, module: nn.Module, args: Any, kwargs: Any, outputs: Any) -> None:
        """Wait for the backward of a forward that has been noted."""
        if self._noting and self.seen and self.seen[-1].made is False:
            if not torch.compiler.is_compiling():
                self.seen[-1].note(module, args, kwargs, outputs, self.keeps)
            found = [] if torch.compiler.is_compiling() else list(tensors(outputs))
            waiting = [x for x in found if x.requires_grad]
            if found and not waiting:  # of parameters that are toggled off, say: no gradient can come of it
                self.seen.pop()
                return
            self.seen[-1].hooks = [x.register_hook(self.seen[-1].make) for x in waiting]  # type: ignore[no-untyped-call]
            self.seen[-1].made = False if waiting else None

    @property
    def _noting(self) -> bool:
        return self.armed and torch.is_grad_enabled() and self._depth == len(self.under_way())

    def __getstate__(self) -> dict[str, Any]:
        """A copy starts idle, and is no one's."""
        idle = {"armed": False, "_depth": 0, "owned": False, "seen": []}
        return {"devices": self.devices, "_hooks": self._hooks, "keeps": self.keeps, **idle}

    def arm(self, due: bool, devices: Iterable[torch.device], starting: Callable[[], None]) -> None:
        """Forget what was seen; note the forwards to come, if their batches are due.

        Args:
            due: Whether they are.
            devices: Those whose random numbers are noted, beside the CPU.
            starting: Called before a forward is noted.
        """
        self.armed, self._depth, self._starting = due, len(self.under_way()), starting
        self.keep([])
        if due:
            self.devices = {torch.device("cpu"), *devices}

    def keep(self, forwards: list[Forward]) -> None:
        """Forget all but some of the forwards."""
        for forward in self.seen:
            for hook in forward.hooks if forward not in forwards else ():
                hook.remove()
        self.seen = forwards
