"""What an evaluation would leave behind in modules, kept to be put back: buffers and training flags.

The models of other optimizers that an evaluation runs (a generator is judged through its discriminator) are kept too:
every model under an `apo.APO` has a hook on its forward, which reports the model to all evaluations under way.
"""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.optimizer import register_optimizer_step_pre_hook


class Traces:
    """Buffers and training flags of modules, as they were when these were first seen."""

    def __init__(self) -> None:
        """Start empty."""
        self._flags: dict[nn.Module, bool] = {}
        self._buffers: list[tuple[nn.Module, str, Tensor, Tensor]] = []

    def keep(self, model: nn.Module) -> None:
        """Keep what a model and the modules in it have, if that has not been done yet."""
        for module in model.modules() if model not in self._flags else ():
            if module not in self._flags:
                self._flags[module] = module.training
                self._buffers += [(module, n, b, b.clone()) for n, b in module.named_buffers(recurse=False)]

    def put_back(self) -> None:
        """Put everything back."""
        for module, flag in self._flags.items():
            module.training = flag
        with torch.no_grad():
            for module, name, buffer, content in self._buffers:
                setattr(module, name, buffer)
                if not torch.equal(buffer, content):
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
