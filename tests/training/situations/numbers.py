"""Numbers that go wrong, starts that are far off, and memory."""

import functools
import gc
import math
from collections.abc import Callable

import torch
from torch import Tensor, nn

from tests.shell.helpers import batches
from tests.training.models import Batch, loss, sentences
from tests.training.peer import NotApplicable, Peer
from tests.training.peers import Prodigy
from tests.training.situations.registry import situation
from tests.training.situations.slopes import untied

STEPS = 160


def small() -> nn.Module:
    """A classifier of 6 features into 3 classes."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 16), nn.Tanh(), nn.Linear(16, 3))


@situation
def positive_learning_rate(peer: type[Peer]) -> str | None:
    """Noise without signal on large inputs: every step was too long."""
    trained = peer(small(), 0.05)
    generator = torch.Generator().manual_seed(3)
    for step in range(120):
        x = 10.0 * torch.randn(4, 6, generator=generator)
        trained.step((x, torch.randint(3, (4,), generator=generator)))
        if trained.lr <= 0.0:
            return f"the learning rate is {trained.lr:.2g} after {step + 1} steps"
        if not math.isfinite(trained.lr):
            return f"the learning rate is {trained.lr} after {step + 1} steps"
    return None


@situation
def nan_in_a_batch(peer: type[Peer]) -> str | None:
    """The weights are put back by hand, as from a checkpoint; what was learned has survived, and learning goes on."""
    trained = peer(small())
    data = batches(40)
    for step, (x, y) in enumerate(data):
        if step != 20:
            trained.step((x, y))
            continue
        kept, lr = [p.detach().clone() for p in trained.model.parameters()], trained.lr
        trained.step((torch.full_like(x, math.nan), y))
        with torch.no_grad():
            for p, q in zip(trained.model.parameters(), kept, strict=True):
                p.copy_(q)
        if not math.isfinite(trained.lr):
            return f"the learning rate is {trained.lr}, and was {lr:.3g}"
    weights = torch.cat([p.detach().flatten() for p in trained.model.parameters()])
    if not math.isfinite(trained.lr) or not weights.isfinite().all():
        return "20 steps later the weights are not finite"
    return None


def final(step: Callable[[Batch], float], data: list[Batch]) -> float:
    """The mean loss over the last tenth of a run, or infinity if it breaks down."""
    losses: list[float] = []
    for batch in data:
        losses.append(step(batch))
        if not math.isfinite(losses[-1]):
            return math.inf
    last = losses[-len(losses) // 10 :]
    return sum(last) / len(last)


def transformer() -> nn.Module:
    """A Transformer with an output layer of its own, for gdtuo's sake."""
    return untied().float()


@functools.cache
def best_fixed() -> float:
    """The lowest final loss of a fixed learning rate on a grid."""

    def fixed(lr: float) -> float:
        model = transformer()
        optimizer = torch.optim.SGD(model.parameters(), lr)

        def step(batch: Batch) -> float:
            optimizer.zero_grad()
            before = loss(model(batch[0]), batch[1])
            before.backward()
            optimizer.step()
            return before.item()

        return final(step, sentences(STEPS))

    return min(map(fixed, (0.1, 0.3, 1.0)))


def far_off(peer: type[Peer], lr: float) -> str | None:
    found = final(peer(transformer(), lr).step, sentences(STEPS))
    return (
        None if found <= 2.0 * best_fixed() else f"a loss of {found:.3g}, of the best learning rate {best_fixed():.3g}"
    )


@situation
def start_far_above(peer: type[Peer]) -> str | None:
    if peer is Prodigy:
        raise NotApplicable("it starts from below")
    return far_off(peer, 10.0)


@situation
def start_far_below(peer: type[Peer]) -> str | None:
    return far_off(peer, 1e-7)


def tensors() -> int:
    """How many tensors are alive; some things that are not look up what they are, with a warning."""
    return sum(issubclass(type(thing), Tensor) for thing in gc.get_objects())


@situation
def flat_memory(peer: type[Peer]) -> str | None:
    """A hundred steps without a garbage collector, twenty apart, leave no tensors behind."""
    trained = peer(small())
    data = batches(120)
    for batch in data[:20]:
        trained.step(batch)
    gc.collect()
    gc.disable()
    try:
        before = tensors()
        for batch in data[20:]:
            trained.step(batch)
        more = tensors() - before
    finally:
        gc.enable()
    return None if more < 20 else f"{more} more tensors after 100 steps"
