"""The hypergradient is the derivative of the loss after the step: against central differences, in float64."""

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.utils.parametrizations import weight_norm

from tests.shell.helpers import batches
from tests.training.models import LENGTH, TASKS, WIDTH, WORDS, Batch, Checkpointing, images, loss, made, sentences
from tests.training.peer import Peer
from tests.training.situations.registry import situation

RESNET, TRANSFORMER, LSTM = TASKS
LR, H = 0.05, 1e-4
Build = Callable[[], nn.Module]


def differences(model: Build, data: tuple[Batch, ...], clip: float | None = None) -> float:
    """How the loss after a step of gradient descent changes with the logarithm of its learning rate."""

    def judged(scale: float) -> float:
        twin = model()

        def total() -> Tensor:
            return torch.stack([loss(twin(x), y) for x, y in data]).mean()

        total().backward()
        used = [p for p in twin.parameters() if p.grad is not None]
        if clip is not None:
            nn.utils.clip_grad_norm_(used, clip)
        with torch.no_grad():
            for p in used:
                p.sub_(LR * scale * p.grad)
        return total().item()

    return (judged(math.exp(H)) - judged(math.exp(-H))) / (2 * H)


def agree(found: float, expected: float, tolerance: float = 1e-5) -> str | None:
    """What to say of two slopes."""
    close = abs(found - expected) <= tolerance * abs(expected)
    return None if close else f"the hypergradient is {found:.3g}, the difference {expected:.3g}"


def compared(
    peer: type[Peer],
    model: Build,
    *data: Batch,
    plain: Build | None = None,
    attention: SDPBackend = SDPBackend.MATH,
    **options: Any,
) -> str | None:
    """A peer's hypergradient against differences, which are taken on `plain` models if these compute the same.

    Attention is by matrix products, so that its kernel, which has no second derivative, decides one row only.
    """
    with sdpa_kernel(attention):
        expected = differences(plain or model, data, options.get("clip"))
        return agree(peer(model(), LR, **options).slope(*data), expected)


def double(data: list[Batch]) -> list[Batch]:
    """Batches in float64."""
    return [(x.double(), y) for x, y in data]


def untied(**options: Any) -> nn.Module:
    """A Transformer with an output layer of its own."""
    model = made(TRANSFORMER, dtype=torch.float64, dropout=0.0, **options)
    model.head.weight = nn.Parameter(0.3 * model.head.weight.detach())
    return model


def classifier() -> nn.Module:
    """A classifier of 6 features into 3 classes."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 16), nn.Tanh(), nn.Linear(16, 3)).double()


def resnet(checkpointing: Checkpointing = None) -> nn.Module:
    """A ResNet without dropout."""
    return made(RESNET, dtype=torch.float64, dropout=0.0, checkpointing=checkpointing)


@situation
def batchnorm(peer: type[Peer]) -> str | None:
    return compared(peer, resnet, *double(images(1)))


@situation
def dropout(peer: type[Peer]) -> str | None:
    """The loss after the step under the mask that gave the gradient."""
    (batch,) = double(images(1))

    def seed(module: nn.Module, args: Any) -> None:
        torch.manual_seed(7)

    def seeded() -> nn.Module:
        model = made(RESNET, dtype=torch.float64, dropout=0.5)
        model.register_forward_pre_hook(seed)
        return model

    expected = differences(seeded, (batch,))
    trained = peer(made(RESNET, dtype=torch.float64, dropout=0.5), LR)
    torch.manual_seed(7)
    return agree(trained.slope(batch), expected)


@situation
def checkpointing_non_reentrant(peer: type[Peer]) -> str | None:
    return compared(peer, lambda: untied(checkpointing="non-reentrant"), *sentences(1), plain=untied)


@situation
def checkpointing_reentrant(peer: type[Peer]) -> str | None:
    return compared(peer, lambda: untied(checkpointing="reentrant"), *sentences(1), plain=untied)


@situation
def tied_weights(peer: type[Peer]) -> str | None:
    return compared(peer, lambda: made(TRANSFORMER, dtype=torch.float64, dropout=0.0), *sentences(1))


@situation
def shared_submodule(peer: type[Peer]) -> str | None:
    def twice() -> nn.Module:
        model = resnet()
        model.blocks[1] = model.blocks[0]
        return model

    return compared(peer, twice, *double(images(1)))


@situation
def frozen_parameters(peer: type[Peer]) -> str | None:
    def partly() -> nn.Module:
        model = resnet()
        model.stem.requires_grad_(False)
        return model

    model = partly()
    before = model.stem[0].weight.detach().clone()
    trained = peer(model)
    for batch in double(images(2)):
        trained.step(batch)
    if not torch.equal(model.stem[0].weight, before):
        return f"a frozen weight moved by {(model.stem[0].weight - before).norm():.1e}"
    return compared(peer, partly, *double(images(1)))


@situation
def unused_parameters(peer: type[Peer]) -> str | None:
    def wider() -> nn.Module:
        model = resnet()
        model.spare = nn.Linear(3, 3).double()
        return model

    return compared(peer, wider, *double(images(1)))


class LowRank(nn.Module):
    """A frozen layer and a trained difference of rank 2."""

    def __init__(self, layer: nn.Linear) -> None:
        super().__init__()
        self.layer = layer.requires_grad_(False)
        self.down = nn.Parameter(torch.randn(2, layer.in_features))
        self.up = nn.Parameter(torch.randn(layer.out_features, 2))

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x) + x @ self.down.T @ self.up.T


def adapted() -> nn.Module:
    """A Transformer of which only differences of low rank are trained."""
    model = untied().requires_grad_(False)
    torch.manual_seed(3)
    for block in model.blocks:
        block.qkv, block.out = LowRank(block.qkv).double(), LowRank(block.out).double()
    return model


@situation
def low_rank_adapters(peer: type[Peer]) -> str | None:
    return compared(peer, adapted, *sentences(1))


@situation
def sparse_embedding(peer: type[Peer]) -> str | None:
    def sparse() -> nn.Module:
        torch.manual_seed(0)
        return nn.Sequential(
            nn.Embedding(WORDS, WIDTH, sparse=True), nn.Flatten(), nn.Linear(LENGTH * WIDTH, WORDS)
        ).double()

    x, y = sentences(1)[0]
    return compared(peer, sparse, (x, y[:, -1]))


@situation
def flash_attention(peer: type[Peer]) -> str | None:
    return compared(peer, untied, *sentences(1), attention=SDPBackend.FLASH_ATTENTION)


@situation
def weight_normalisation(peer: type[Peer]) -> str | None:
    """A layer whose weight is computed from its parameters."""

    def normalised() -> nn.Module:
        model = untied()
        weight_norm(model.blocks[0].out)
        return model

    return compared(peer, normalised, *sentences(1))


@situation
def forward_hooks(peer: type[Peer]) -> str | None:
    """A hook that changes what a layer returns."""

    def hooked() -> nn.Module:
        model = untied()
        model.blocks[0].mlp.register_forward_hook(lambda module, args, out: 3.0 * out)
        return model

    return compared(peer, hooked, *sentences(1))


@situation
def lstm(peer: type[Peer]) -> str | None:
    return compared(peer, lambda: made(LSTM, dtype=torch.float64, dropout=0.0), *sentences(1))


@situation
def compiled(peer: type[Peer]) -> str | None:
    """Compiled ahead of time, forward and backward."""

    def built() -> nn.Module:
        torch.compiler.reset()
        return torch.compile(classifier(), backend="aot_eager")

    return compared(peer, built, *double(batches(1)), plain=classifier)


@situation
def no_recompilation(peer: type[Peer]) -> str | None:
    """A learning rate that changes at every step recompiles nothing."""
    torch.compiler.reset()
    counted: list[int] = []

    def counting(graph: torch.fx.GraphModule, inputs: Any) -> Any:
        counted.append(1)
        return graph.forward

    trained = peer(torch.compile(classifier().float(), backend=counting), LR)
    for batch in batches(12):
        trained.step(batch)
    first = len(counted)
    for batch in batches(12):
        trained.step(batch)
    return None if len(counted) == first else f"{first} compilations in 12 steps, {len(counted)} in 24"


@situation
def autocast(peer: type[Peer]) -> str | None:
    """The judgement is under the same autocast as the training forward."""
    seen: list[torch.dtype] = []

    def noted(outputs: Tensor, targets: Tensor) -> Tensor:
        seen.append(outputs.dtype)
        return loss(outputs, targets)

    context = partial(torch.autocast, "cpu", torch.bfloat16)
    with sdpa_kernel(SDPBackend.MATH):
        found = peer(untied().float(), LR, criterion=noted, context=context).slope(*sentences(1))
    if set(seen) != {torch.bfloat16}:
        return f"forwards ran in {seen}"
    return agree(found, differences(untied, tuple(sentences(1))), 0.05)


@situation
def accumulation(peer: type[Peer]) -> str | None:
    return compared(peer, untied, *sentences(3))


@situation
def clipping(peer: type[Peer]) -> str | None:
    return compared(peer, untied, *sentences(1), clip=0.3)
