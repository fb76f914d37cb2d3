"""The models of the training tasks, built for the shape of their inputs.

PyTorch's default initialisation, from the global generator: seed it first.
"""

from collections.abc import Callable, Sequence
from itertools import pairwise
from math import prod
from typing import Final

from torch import nn

Shape = tuple[int, int, int]  # channels, height, width


def mlp(shape: Shape, classes: int, hidden: Sequence[int] | None = None) -> nn.Sequential:
    """A multilayer perceptron with ReLU: pixels - hidden - ... - classes, [B, C, H, W] -> logits [B, classes].

    Args:
        shape: of one input, (C, H, W).
        classes: number of outputs.
        hidden: widths of the hidden layers. By default 1000-1000 (the MLP of the APO paper), and 100-100 where an
            input has at most 64 pixels (digits).

    Raises:
        ValueError: a width below 1.
    """
    pixels = prod(shape)
    widths = list(hidden) if hidden is not None else [100, 100] if pixels <= 64 else [1000, 1000]
    if any(width < 1 for width in widths):
        raise ValueError(f"hidden widths {widths} must all be at least 1")
    layers: list[nn.Module] = [nn.Flatten()]
    for inputs, outputs in pairwise([pixels, *widths]):
        layers += [nn.Linear(inputs, outputs), nn.ReLU()]
    return nn.Sequential(*layers, nn.Linear([pixels, *widths][-1], classes))


def cnn(shape: Shape, classes: int, hidden: Sequence[int] | None = None) -> nn.Sequential:
    """The CNN of the APO paper (App. C): 5x5 convolutions of 16 and 32 filters, one linear layer.

    The paper gives the filters and the kernel size; padding 2 (which keeps height and width), ReLU and 2x2 max pooling
    after each convolution are this library's choice. [B, C, H, W] -> logits [B, classes]; sides of at least 4.

    Args:
        shape: of one input, (C, H, W).
        classes: number of outputs.
        hidden: not an option of this model.

    Raises:
        ValueError: `hidden` given, or an image side below 4.
    """
    if hidden is not None:
        raise ValueError(f"the cnn has no hidden widths to set, got {list(hidden)}; use --model mlp or drop --hidden")
    channels, height, width = shape
    if min(height, width) < 4:
        raise ValueError(f"images of {height}x{width} are too small for two poolings; both sides must be at least 4")
    return nn.Sequential(
        nn.Conv2d(channels, 16, kernel_size=5, padding=2),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Conv2d(16, 32, kernel_size=5, padding=2),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Linear(32 * (height // 4) * (width // 4), classes),
    )


MODELS: Final[dict[str, Callable[[Shape, int, Sequence[int] | None], nn.Module]]] = {"mlp": mlp, "cnn": cnn}
