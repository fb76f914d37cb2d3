"""The models whose training is timed, with batches of random numbers: what is learnt does not matter here."""

from collections.abc import Callable
from typing import Final, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from baselines.language_models import Transformer, sequence_cross_entropy
from baselines.models import cnn, mlp, resnet

Batch = tuple[Tensor, Tensor]
CLASSES: Final = 10


class Many(nn.Module):
    """Many small tensors and hardly any arithmetic: a linear model whose weights are all of them, one below the other.

    Args:
        tensors: how many.
        width: inputs of each.
    """

    def __init__(self, tensors: int, width: int) -> None:
        super().__init__()
        self.parts = nn.ParameterList(torch.randn(width, CLASSES) / (tensors * width) ** 0.5 for _ in range(tensors))

    def forward(self, x: Tensor) -> Tensor:
        """[B, tensors * width] -> logits [B, classes]."""
        return x @ torch.cat(list(self.parts))


class Task(NamedTuple):
    """A model and its batches.

    Attributes:
        build: The model; its weights are drawn from the global generator.
        inputs: A batch of inputs, from a generator.
        targets: The targets that go with them.
        loss: Of outputs and targets, a mean.
        about: In words.
    """

    build: Callable[[], nn.Module]
    inputs: Callable[[torch.Generator], Tensor]
    targets: Callable[[torch.Generator], Tensor]
    loss: Callable[[Tensor, Tensor], Tensor]
    about: str

    def batches(self, count: int, seed: int, device: torch.device) -> list[Batch]:
        """Some batches, the same for a seed."""
        generator = torch.Generator().manual_seed(seed)
        return [(self.inputs(generator).to(device), self.targets(generator).to(device)) for _ in range(count)]


def classifier(build: Callable[[], nn.Module], about: str, *shape: int) -> Task:
    """A classifier of inputs of a shape, the batch first."""
    return Task(
        build,
        lambda generator: torch.randn(shape, generator=generator),
        lambda generator: torch.randint(CLASSES, shape[:1], generator=generator),
        F.cross_entropy,
        about,
    )


def language_model(build: Callable[[], nn.Module], classes: int, about: str, *shape: int) -> Task:
    """A language model on sequences of a shape, the batch first."""

    def draw(generator: torch.Generator) -> Tensor:
        return torch.randint(classes, shape, generator=generator)

    return Task(build, draw, draw, sequence_cross_entropy, about)


IMAGE: Final = (1, 28, 28)
TASKS: Final[dict[str, Task]] = {
    "mlp": classifier(lambda: mlp(IMAGE, CLASSES), "MLP 784-1000-1000-10, batch 100", 100, *IMAGE),
    "cnn": classifier(lambda: cnn(IMAGE, CLASSES), "CNN of 16 and 32 filters of 5x5, batch 100", 100, *IMAGE),
    "transformer": language_model(
        lambda: Transformer(64, 98, width=128, layers=4, heads=4),
        98,
        "Transformer of 4 layers, width 128, sequences of 64, batch 32",
        *(32, 64),
    ),
    "tensors": classifier(lambda: Many(500, 20), "500 tensors of 200 numbers, batch 100", 100, 500 * 20),
}


def _wide(width: int) -> Task:
    return classifier(lambda: mlp(IMAGE, CLASSES, hidden=(width, width)), f"MLP 784-{width}-{width}-10", 100, *IMAGE)


def _many(count: int) -> Task:
    about = f"{count} tensors of {100_000 // count} numbers, batch 100"
    return classifier(lambda: Many(count, 10_000 // count), about, 100, 10_000)


# How the cost grows: with the weights, where they are most of the arithmetic, and with the tensors.
GROWTH: Final[dict[str, Task]] = {
    "weights-1e5": _wide(110),
    "weights-1e6": _wide(690),
    "weights-1e7": _wide(2790),
    "weights-1e8": _wide(9620),
    "tensors-10": _many(10),
    "tensors-100": _many(100),
    "tensors-1000": _many(1000),
}
# For a GPU: the sizes that people train.
LARGE: Final[dict[str, Task]] = {
    "resnet18": classifier(
        lambda: resnet((3, 32, 32), CLASSES, blocks=(2, 2, 2, 2), width=64), "ResNet-18, batch 128", 128, 3, 32, 32
    ),
    "gpt": language_model(
        lambda: Transformer(512, 16_384, width=768, layers=12, heads=12),
        16_384,
        "Transformer of 12 layers, width 768, 16,384 tokens (110 million parameters), sequences of 512, batch 8",
        *(8, 512),
    ),
}
