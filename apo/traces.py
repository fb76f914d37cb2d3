"""What an evaluation would leave behind in modules, kept to be put back: buffers, training flags, attributes.

What lies deeper is not known here: the insides of an object that an attribute refers to, a list within a list. Of a
tensor that is an attribute itself, the content is kept.

The models of other optimizers that an evaluation runs (a generator is judged through its discriminator) are kept too:
every model under an `apo.APO` has a hook on its forward, which reports the model to all evaluations under way.
"""

from collections import Counter, defaultdict, deque
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from operator import is_
from threading import get_ident
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.optimizer import register_optimizer_step_pre_hook

Container = dict[Any, Any] | list[Any] | set[Any] | deque[Any]
CONTAINERS = (dict, list, set, deque, defaultdict, Counter)
OF_TORCH = vars(nn.Module()).keys() - {"_buffers", "_non_persistent_buffers_set"}
"""What every module has, and no forward changes: hooks, parameters, the modules below."""


class Traces:
    """Buffers, training flags and attributes of modules, as they were when these were first seen."""

    def __init__(self) -> None:
        """Start empty; what other threads run is not part of it."""
        self.thread = get_ident()
        self._flags: dict[nn.Module, bool] = {}
        self._buffers: list[tuple[nn.Module, str, Tensor, Tensor]] = []
        self._tensors: list[tuple[Tensor, Tensor]] = []
        self._containers: list[tuple[Container, Container]] = []

    def keep(self, model: nn.Module) -> None:
        """Keep what a model and the modules in it have, if that has not been done yet."""
        for module in model.modules() if model not in self._flags else ():
            if module not in self._flags:
                self._flags[module] = module.training
                buffers = module.named_buffers(recurse=False)
                self._buffers += [(module, name, buffer, buffer.clone()) for name, buffer in buffers]
                own = vars(module)
                values = [value for name, value in own.items() if name not in OF_TORCH]
                self._tensors += [(value, value.clone()) for value in values if _is_written(value)]
                self._containers += [(held, held.copy()) for held in (own, *filter(_is_container, values))]

    def put_back(self) -> None:
        """Put everything back."""
        for container, items in self._containers:
            _refill(container, items)
        for module, flag in self._flags.items():
            module.training = flag
        for module, name, buffer, content in self._buffers:
            if getattr(module, name) is not buffer:  # a scripted module keeps its own elsewhere
                setattr(module, name, buffer)
            _rewrite(buffer, content)
        for tensor, content in self._tensors:
            _rewrite(tensor, content)


def _is_written(value: Any) -> bool:
    """Whether an attribute is a tensor that a forward may write into, as metrics and running means do."""
    return type(value) is Tensor and value.grad_fn is None and not (value.is_meta or value.is_nested)


def _is_container(value: Any) -> bool:
    """Whether an attribute holds things that a forward may change.

    What holds parameters or modules is what the model is made of, and belongs to whoever made it so.
    """
    return type(value) in CONTAINERS and not any(map(_is_part, _values(value)))


def _values(container: Container) -> Any:
    return container.values() if isinstance(container, dict) else container


def _is_part(value: Any) -> bool:
    return isinstance(value, nn.Parameter | nn.Module)


def _refill(container: Any, items: Any) -> None:
    """Give a container the items that it had, in their order; one that has them all is not touched."""
    whole = len(container) == len(items) and all(map(is_, container, items))
    if isinstance(container, dict):
        whole = whole and all(map(is_, container.values(), items.values()))
    if not whole:
        container.clear()
        container.extend(items) if isinstance(container, list | deque) else container.update(items)


def _rewrite(buffer: Tensor, content: Tensor) -> None:
    """Give a buffer the content that it had; a write that changes nothing would spoil graphs that still need it."""
    if buffer.layout != torch.strided or buffer.shape != content.shape:
        buffer.data = content
    elif not torch.equal(buffer, content):
        with torch.no_grad():
            buffer.copy_(content)


@contextmanager
def weights_stay(params: Iterable[Tensor]) -> Iterator[None]:
    """Refuse steps of any optimizer that would move parameters that are being judged.

    Raises:
        RuntimeError: From such a step.
    """
    judged = set(params)

    def refuse(optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
        if any(param in judged for group in optimizer.param_groups for param in group["params"]):
            raise RuntimeError(
                f"{type(optimizer).__name__}.step() was called inside an evaluation, on the parameters that are being "
                "judged: an inner loop must train a copy of the model, or another one"
            )

    hook = register_optimizer_step_pre_hook(refuse)
    try:
        yield
    finally:
        hook.remove()
