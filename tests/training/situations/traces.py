"""What an extra evaluation leaves behind: an iteration under a peer against a bare forward and backward."""

from typing import Any

import torch
from torch import nn

from tests.shell.helpers import net
from tests.training.models import TASKS, Batch, images, loss, made, sentences
from tests.training.peer import NotApplicable, Peer
from tests.training.situations.registry import situation

RESNET, _, LSTM = TASKS


def bare(model: nn.Module, batch: Batch) -> nn.Module:
    """The model after a forward and backward, without any step."""
    torch.manual_seed(5)
    loss(model(batch[0]), batch[1]).backward()
    return model


def one_step(peer: type[Peer], model: nn.Module, batch: Batch) -> nn.Module:
    """The model after an iteration."""
    trained = peer(model)
    torch.manual_seed(5)
    trained.step(batch)
    return model


@situation
def batchnorm_statistics(peer: type[Peer]) -> str | None:
    batch = images(1)[0]
    expected = dict(bare(made(RESNET, dropout=0.0), batch).named_buffers())
    found = dict(one_step(peer, made(RESNET, dropout=0.0), batch).named_buffers())
    if all(torch.equal(found[name], expected[name]) for name in expected):
        return None
    return f"num_batches_tracked is {found['stem.1.num_batches_tracked'].item()} after one step"


@situation
def custom_buffers(peer: type[Peer]) -> str | None:
    batch = (torch.randn(8, 6), torch.randint(3, (8,)))
    calls = one_step(peer, net(), batch)[3].calls.item()
    return None if calls == 1.0 else f"a buffer that counts calls is {calls:.0f} after one step"


@situation
def random_numbers(peer: type[Peer]) -> str | None:
    batch = sentences(1)[0]
    bare(made(LSTM), batch)
    expected = torch.get_rng_state()
    one_step(peer, made(LSTM), batch)
    return None if torch.equal(torch.get_rng_state(), expected) else "the next dropout mask is another one"


@situation
def gradients_as_found(peer: type[Peer]) -> str | None:
    batch = sentences(1)[0]
    expected = bare(made(LSTM, dropout=0.0), batch)
    found = one_step(peer, made(LSTM, dropout=0.0), batch)
    for p, q in zip(found.parameters(), expected.parameters(), strict=True):
        if p.grad is None:
            return ".grad is None after the step"
        if not torch.allclose(p.grad, q.grad, rtol=1e-4, atol=1e-7):
            return f".grad is off by {(p.grad - q.grad).abs().max():.1e}"
    return None


@situation
def errors_in_the_judgement(peer: type[Peer]) -> str | None:
    """User code raises once, in an evaluation that a bare loop does not have; then training goes on."""
    batches, calls = sentences(4), [0]
    model = made(LSTM, dropout=0.0)
    before = [p.detach().clone() for p in model.parameters()]

    def raising(outputs: Any, targets: Any) -> Any:
        calls[0] += 1
        if calls[0] == 2:
            raise KeyError("user code")
        return loss(outputs, targets)

    trained = peer(model, criterion=raising)
    lr = trained.lr
    try:
        trained.step(batches[0])
    except KeyError:
        pass
    else:
        raise NotApplicable("it evaluates nothing more")
    moved = [not torch.equal(p, q) for p, q in zip(model.parameters(), before, strict=True)]
    if any(moved) != all(moved):
        return "the step is taken in part"
    if trained.lr != lr:
        return f"the learning rate moved from {lr:.3g} to {trained.lr:.3g}"
    for batch in batches[1:]:
        trained.step(batch)
    return None
