"""The models of the training tasks, built for the shape of their inputs.

PyTorch's default initialisation, from the global generator: seed it first.
"""

from collections.abc import Callable, Sequence
from functools import partial
from itertools import pairwise
from math import prod
from typing import Final, Literal, NamedTuple

import torch.nn.functional as F
from torch import Tensor, nn

from baselines.language_models import LSTM, Transformer, sequence_cross_entropy

Shape = tuple[int, ...]  # of one input: channels, height, width; of text, its length


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
    _no_widths("cnn", hidden)
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


def lenet(shape: Shape, classes: int, hidden: Sequence[int] | None = None, *, padding: int = 2) -> nn.Sequential:
    """The image classifier of the Quasi-Adam paper (§VI.B), with the widths of LeNet-5.

    The paper gives two convolutions, each followed by max pooling and ReLU, and three fully connected layers, but no
    widths: 6 and 16 filters of 5x5 and 120-84-classes are LeNet-5's, as is the padding of the first convolution (an
    image of 28x28 becomes 32x32). Without that padding it is the toy CNN of the Apollo paper (App. E), which takes it
    from PyTorch's tutorial on CIFAR-10. [B, C, H, W] -> logits [B, classes]; sides of at least 12, without padding 16.

    Args:
        shape: of one input, (C, H, W).
        classes: number of outputs.
        hidden: not an option of this model.
        padding: of the first convolution, in pixels.

    Raises:
        ValueError: `hidden` given, or an image that is too small.
    """
    _no_widths("lenet", hidden)
    channels, height, width = shape
    height, width = height + 2 * padding, width + 2 * padding
    if min(height, width) < 16:
        raise ValueError(
            f"images of {shape[1]}x{shape[2]} are too small for the lenet, whose sides must be at least "
            f"{16 - 2 * padding}; use --model cnn or another --data"
        )
    return nn.Sequential(
        nn.Conv2d(channels, 6, kernel_size=5, padding=padding),
        nn.MaxPool2d(2),
        nn.ReLU(),
        nn.Conv2d(6, 16, kernel_size=5),
        nn.MaxPool2d(2),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(16 * (((height - 4) // 2 - 4) // 2) * (((width - 4) // 2 - 4) // 2), 120),
        nn.ReLU(),
        nn.Linear(120, 84),
        nn.ReLU(),
        nn.Linear(84, classes),
    )


def autoencoder(shape: Shape, classes: int, hidden: Sequence[int] | None = None) -> nn.Sequential:
    """The autoencoder of the Quasi-Adam paper (§VI.B), as its number of parameters identifies it.

    The paper gives three convolutions, three transposed ones and 87,125 parameters. This common architecture with a
    code of 4 numbers has exactly that many; the paper itself does not print it. [B, 1, 28, 28] -> the same, in (0, 1).

    Args:
        shape: of one input; (1, 28, 28).
        classes: not used: the targets are the inputs.
        hidden: not an option of this model.

    Raises:
        ValueError: `hidden` given, or images of another shape.
    """
    _no_widths("autoencoder", hidden)
    if tuple(shape) != (1, 28, 28):
        size = "x".join(map(str, shape))
        raise ValueError(f"the autoencoder takes images of 1x28x28, not {size}; use --data fashion-mnist or mnist")
    encoder = (
        nn.Conv2d(1, 8, kernel_size=3, stride=2, padding=1),
        nn.ReLU(),
        nn.Conv2d(8, 16, kernel_size=3, stride=2, padding=1),
        nn.BatchNorm2d(16),
        nn.ReLU(),
        nn.Conv2d(16, 32, kernel_size=3, stride=2),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(288, 128),
        nn.ReLU(),
        nn.Linear(128, 4),
    )
    decoder = (
        nn.Linear(4, 128),
        nn.ReLU(),
        nn.Linear(128, 288),
        nn.ReLU(),
        nn.Unflatten(1, (32, 3, 3)),
        nn.ConvTranspose2d(32, 16, kernel_size=3, stride=2),
        nn.BatchNorm2d(16),
        nn.ReLU(),
        nn.ConvTranspose2d(16, 8, kernel_size=3, stride=2, padding=1, output_padding=1),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.ConvTranspose2d(8, 1, kernel_size=3, stride=2, padding=1, output_padding=1),
        nn.Sigmoid(),
    )
    return nn.Sequential(*encoder, *decoder)


class Block(nn.Module):
    """ReLU of the sum of two 3x3 convolutions with batch normalisation and of the input, projected where sizes differ.

    Args:
        inputs: channels in.
        outputs: channels out.
        stride: of the first convolution.
    """

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.residual = nn.Sequential(
            nn.Conv2d(inputs, outputs, kernel_size=3, stride=stride, padding=1, bias=False),
            nn.BatchNorm2d(outputs),
            nn.ReLU(),
            nn.Conv2d(outputs, outputs, kernel_size=3, padding=1, bias=False),
            nn.BatchNorm2d(outputs),
        )
        projection = (nn.Conv2d(inputs, outputs, kernel_size=1, stride=stride, bias=False), nn.BatchNorm2d(outputs))
        self.shortcut = nn.Sequential(*(projection if stride > 1 or inputs != outputs else ()))

    def forward(self, x: Tensor) -> Tensor:
        """[B, inputs, H, W] -> [B, outputs, ⌈H / stride⌉, ⌈W / stride⌉]."""
        return F.relu(self.residual(x) + self.shortcut(x))


def resnet(
    shape: Shape, classes: int, hidden: Sequence[int] | None = None, *, blocks: Sequence[int], width: int
) -> nn.Sequential:
    """A residual network for small images: a 3x3 convolution, stages of blocks, the mean over pixels, a linear layer.

    With 2-2-2-2 or 3-4-6-3 blocks of width 64 it is the ResNet-18 or ResNet-34 that is common for CIFAR, with three
    stages of n blocks of width 16 the ResNet-(6n + 2) of He et al. 2016 (§4.2), but for shortcuts that are projections
    where sizes differ. [B, C, H, W] -> logits [B, classes].

    Args:
        shape: of one input, (C, H, W).
        classes: number of outputs.
        hidden: not an option of this model.
        blocks: how many blocks each stage has; every stage but the first halves the sides and doubles the channels.
        width: channels of the first stage.

    Raises:
        ValueError: `hidden` given.
    """
    _no_widths("resnet", hidden)
    layers: list[nn.Module] = [
        nn.Conv2d(shape[0], width, kernel_size=3, padding=1, bias=False),
        nn.BatchNorm2d(width),
        nn.ReLU(),
    ]
    channels = width
    for stage, depth in enumerate(blocks):
        for place in range(depth):
            layers.append(Block(channels, width * 2**stage, 2 if stage > 0 and place == 0 else 1))
            channels = width * 2**stage
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels, classes))


def lstm(shape: Shape, classes: int, hidden: Sequence[int] | None = None, *, embedding: int, width: int) -> nn.Module:
    """A language model of two LSTM layers. Classes [B, T] -> logits of the next ones [B, T, classes].

    Args:
        shape: of one input, (T,).
        classes: number of characters.
        hidden: not an option of this model.
        embedding: width of the characters' embedding.
        width: of each layer.

    Raises:
        ValueError: `hidden` given.
    """
    _no_widths("lstm", hidden)
    return LSTM(classes, embedding, width)


def transformer(
    shape: Shape, classes: int, hidden: Sequence[int] | None = None, *, width: int, layers: int, heads: int
) -> nn.Module:
    """A Transformer as language model. Classes [B, T] -> logits of the next ones [B, T, classes].

    Args:
        shape: of one input, (T,).
        classes: number of characters.
        hidden: not an option of this model.
        width: of the embedding and the layers; four times it inside a layer.
        layers: how many.
        heads: of each layer's attention.

    Raises:
        ValueError: `hidden` given.
    """
    _no_widths("transformer", hidden)
    return Transformer(shape[0], classes, width, layers, heads)


def _no_widths(name: str, hidden: Sequence[int] | None) -> None:
    if hidden is not None:
        raise ValueError(
            f"the {name} has no hidden widths to set, got {list(hidden)}; use --model mlp or drop --hidden"
        )


class Model(NamedTuple):
    """A model and what it is trained for.

    Attributes:
        build: from the shape of an input, the number of classes and the hidden widths (None: the default).
        loss: of outputs and targets, as in `torch.nn.functional`: a mean over all targets, or their sum.
        reconstructs: whether the targets are the inputs, as pixels in [0, 1], instead of classes.
        reads: what its inputs are.
    """

    build: Callable[[Shape, int, Sequence[int] | None], nn.Module]
    loss: Callable[..., Tensor] = F.cross_entropy
    reconstructs: bool = False
    reads: Literal["images", "text"] = "images"


_LANGUAGE: Final = partial(Model, loss=sequence_cross_entropy, reads="text")

MODELS: Final[dict[str, Model]] = {
    "mlp": Model(mlp),
    "cnn": Model(cnn),
    "lenet": Model(lenet),
    "toy-cnn": Model(partial(lenet, padding=0)),
    "resnet8": Model(partial(resnet, blocks=(1, 1, 1), width=16)),
    "resnet110": Model(partial(resnet, blocks=(18, 18, 18), width=16)),
    "resnet18": Model(partial(resnet, blocks=(2, 2, 2, 2), width=64)),
    "resnet34": Model(partial(resnet, blocks=(3, 4, 6, 3), width=64)),
    "autoencoder": Model(autoencoder, F.mse_loss, reconstructs=True),
    "lstm": _LANGUAGE(partial(lstm, embedding=64, width=128)),
    "lstm-2048": _LANGUAGE(partial(lstm, embedding=300, width=2048)),
    "transformer": _LANGUAGE(partial(transformer, width=64, layers=2, heads=4)),
    "transformer-base": _LANGUAGE(partial(transformer, width=512, layers=6, heads=8)),
}
