"""Hyperparameters by any torch optimizer on the hypergradient, in unconstrained coordinates.

The paper's is ``Gradient(torch.optim.RMSprop, lr=0.1, every=10)``. Source: the paper, Alg. 1 and §5.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from apo.checkpoint import number
from apo.checks import real, whole


class Gradient:
    """Hyperparameters by a torch optimizer on their unconstrained coordinates (log for positive ones).

    Attributes:
        factory: A torch optimizer class, or a function from a list of tensors to an optimizer.
        every: Calls of ``step`` from one meta-step to the next.
        clip: The largest absolute value of a meta-gradient, each coordinate apart; None for no limit.
        options: Options of the factory, such as ``lr`` (in log units per meta-step, for most optimizers).
    """

    def __init__(
        self,
        factory: Callable[..., torch.optim.Optimizer],
        *,
        every: int = 10,
        clip: float | None = None,
        **options: Any,
    ) -> None:
        """Take the factory, when to use it, and its options.

        Raises:
            TypeError: If a value is of the wrong type, or the factory does not take the options.
            ValueError: If a value is outside its set.
        """
        if not callable(factory):
            raise TypeError(f"factory={factory!r} must be a torch optimizer class, such as torch.optim.RMSprop")
        whole("every", every)
        clip = None if clip is None else real("clip", clip, ends="()")
        self.factory, self.every, self.clip, self.options = factory, every, clip, options
        try:
            GradientState(self, [""]).move([0.0], [0.0])
        except Exception as error:
            raise TypeError(f"{self!r} cannot be built and stepped as an optimizer: {error}") from error

    def __repr__(self) -> str:
        """As it was called."""
        options = {"every": self.every, "clip": self.clip, **self.options}
        name = getattr(self.factory, "__name__", repr(self.factory))
        return f"Gradient({name}, {', '.join(f'{key}={value!r}' for key, value in options.items())})"


class GradientState:
    """The free coordinates of `Gradient` as one vector, and the optimizer that moves them.

    Attributes:
        labels: The name of each coordinate.
        free: The coordinates, [n] in float64.
        optimizer: Moves them.
    """

    def __init__(self, gradient: Gradient, labels: Sequence[str]) -> None:
        """Build the optimizer for some coordinates."""
        self.gradient, self.labels = gradient, list(labels)
        self.free = torch.zeros(len(self.labels), dtype=torch.float64, device="cpu", requires_grad=True)
        self.optimizer = gradient.factory([self.free], **gradient.options)

    def move(self, offsets: Sequence[float], slopes: Sequence[float]) -> list[float]:
        """The offsets after one step of the optimizer.

        Args:
            offsets: Where the coordinates are.
            slopes: The derivative of the objective with respect to each.

        Returns:
            Where they want to be.
        """
        with torch.no_grad():
            self.free.copy_(torch.tensor(offsets, dtype=torch.float64, device="cpu"))
        slope = torch.tensor(slopes, dtype=torch.float64, device="cpu")
        self.free.grad = slope if self.gradient.clip is None else slope.clamp(-self.gradient.clip, self.gradient.clip)
        self.optimizer.step()
        moved: list[float] = self.free.detach().tolist()
        return moved

    def numbers(self) -> dict[str, float | int]:
        """The optimizer's state in plain numbers: "exp_avg/lr/0" for a vector's entry, "step" for what all share."""
        numbers: dict[str, float | int] = {}
        for name, value in self.optimizer.state[self.free].items():
            if isinstance(value, torch.Tensor) and value.ndim:
                numbers |= {f"{name}/{label}": x for label, x in zip(self.labels, value.tolist(), strict=True)}
            elif value is not None:
                numbers[name] = value.item() if isinstance(value, torch.Tensor) else value
        return numbers

    def restore(self, numbers: Mapping[str, float | int]) -> bool:
        """Take back what `numbers` gave; coordinates that are not there start at zero.

        Returns:
            Whether they are of such an optimizer. If not, the state stays as it is.

        Raises:
            ValueError: If a number is missing, or of the wrong kind.
        """
        if not numbers:
            return True
        like = GradientState(self.gradient, self.labels)
        like.move([0.0] * len(self.labels), [1.0] * len(self.labels))
        template = {name: value for name, value in like.optimizer.state[like.free].items() if value is not None}
        if template.keys() != {name.partition("/")[0] for name in numbers}:
            return False
        state = self.optimizer.state[self.free]
        for name, value in template.items():
            if isinstance(value, torch.Tensor) and value.ndim:
                column = [numbers.get(f"{name}/{label}", 0.0) for label in self.labels]
                state[name] = torch.tensor(column, dtype=value.dtype, device="cpu")
            elif isinstance(value, torch.Tensor):
                state[name] = torch.tensor(number(numbers, name, 0.0), dtype=value.dtype, device="cpu")
            else:
                state[name] = number(numbers, name, value)
        return True
