"""What a loop does beside forward, backward and step: mixed precision, schedules, groups."""

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.optim import lr_scheduler

from tests.training.models import TASKS, loss, made, sentences
from tests.training.peer import Peer
from tests.training.peers import Apo, Higher
from tests.training.situations.registry import situation

_, _, LSTM = TASKS


@situation
def bfloat16_weights(peer: type[Peer]) -> str | None:
    """The learning rate moves by less than bfloat16 can tell apart."""
    trained = peer(made(LSTM, dtype=torch.bfloat16))
    rates = []
    for batch in sentences(12):
        trained.step(batch)
        rates.append(trained.lr)
    if not math.isfinite(rates[-1]):
        return f"the learning rate is {rates[-1]}"
    coarse = all(torch.tensor(rate).bfloat16().item() == rate for rate in rates)
    return "the learning rate is rounded to bfloat16" if coarse else None


@situation
def skipped_by_grad_scaler(peer: type[Peer]) -> str | None:
    """float16 gradients overflow at one step: neither weights nor learning rate may move."""
    trained = peer(made(LSTM, dropout=0.0))
    scaler = torch.amp.GradScaler("cpu", init_scale=1.0)
    model, optimizer = trained.model, trained.optimizer
    for step, batch in enumerate(sentences(12)):
        before = [p.detach().clone() for p in model.parameters()], trained.lr
        slope = trained.ahead((batch,)) if isinstance(trained, Higher) else None
        model.zero_grad()
        scaler.scale(loss(model(batch[0]), batch[1])).backward()
        if step in (0, 10):
            next(model.parameters()).grad[0, 0] = math.inf
        scaler.step(optimizer, **({"batch": batch} if isinstance(trained, Apo) else {}))
        scaler.update()
        if slope is not None:
            trained.move(slope)
        if step in (0, 10):
            if not all(torch.equal(p, q) for p, q in zip(model.parameters(), before[0], strict=True)):
                return "the weights moved"
            if trained.lr != before[1]:
                return f"the learning rate moved from {before[1]:.3g} to {trained.lr:.3g}"
    return None


def scheduled(peer: type[Peer], attach: Callable[[torch.optim.Optimizer], lr_scheduler.LRScheduler]) -> str | None:
    """Each step is as long as schedule × learned says, but the first, which may be searched."""
    trained = peer(made(LSTM, dropout=0.0))
    scheduler = attach(trained.optimizer)
    weight, learned, searched = trained.model.head.weight, [], False
    for step, batch in enumerate(sentences(14)):
        before, expected = weight.detach().clone(), float(scheduler.get_last_lr()[0]) * trained.factor
        learned.append(trained.factor)
        trained.step(batch)
        taken = (weight.detach() - before).norm().item() / (direction(trained.optimizer, weight) or 1.0)
        if searched and abs(taken - expected) > 1e-3 * expected + 1e-7:
            return f"the learning rate of step {step} is {taken:.3g}, schedule × learned {expected:.3g}"
        searched = searched or taken > 0.0
        scheduler.step()
    return None if max(learned) > 1.01 * min(learned) else "nothing was learned"


def direction(optimizer: Any, weight: nn.Parameter) -> float:
    """How far a step at a learning rate of 1 has gone."""
    assert weight.grad is not None
    group = optimizer.param_groups[0]
    if "d" not in group:
        return weight.grad.norm().item()
    state = optimizer.state[weight]
    return (state["exp_avg"] / (state["exp_avg_sq"].sqrt() + group["d"] * group["eps"])).norm().item()


@situation
def lambda_lr(peer: type[Peer]) -> str | None:
    return scheduled(peer, lambda opt: lr_scheduler.LambdaLR(opt, lambda step: 0.9**step))


@situation
def one_cycle_lr(peer: type[Peer]) -> str | None:
    return scheduled(peer, lambda opt: lr_scheduler.OneCycleLR(opt, max_lr=0.1, total_steps=20, cycle_momentum=False))


@situation
def cosine_with_restarts(peer: type[Peer]) -> str | None:
    return scheduled(peer, lambda opt: lr_scheduler.CosineAnnealingWarmRestarts(opt, T_0=4))


@situation
def warmup_from_zero(peer: type[Peer]) -> str | None:
    return scheduled(peer, lambda opt: lr_scheduler.LambdaLR(opt, lambda step: min(1.0, step / 5)))


def grouped(peer: type[Peer], second: float) -> tuple[list[float], float]:
    """How far the weights of two groups go at each step, by unit of gradient; the learning rate at the end."""
    model = made(LSTM, dropout=0.0)
    head = list(model.head.parameters())
    rest = [p for name, p in model.named_parameters() if not name.startswith("head")]
    trained = peer(model, 0.05, groups=[{"params": rest, "lr": 0.05}, {"params": head, "lr": second}])
    ratios = []
    for batch in sentences(12):
        before = [p.detach().clone() for p in (rest[0], head[0])]
        trained.step(batch)
        first, other = (
            ((p.detach() - q).norm() / p.grad.norm()).item() for p, q in zip((rest[0], head[0]), before, strict=True)
        )
        ratios.append(other / first)
    return ratios, trained.lr


@situation
def group_ratios(peer: type[Peer]) -> str | None:
    ratios, lr = grouped(peer, 0.005)
    if any(abs(ratio - 0.1) > 1e-3 for ratio in ratios):
        return f"the ratio of 0.1 became {ratios[-1]:.3g}"
    return "nothing was learned" if lr == 0.05 else None


@situation
def frozen_group(peer: type[Peer]) -> str | None:
    ratios, _ = grouped(peer, 0.0)
    return None if not any(ratios) else f"a group with lr = 0 moves {max(ratios):.3g} times as far as the other"


@situation
def two_players(peer: type[Peer]) -> str | None:
    """A generator is judged by a discriminator: what the judgement leaves there is what a bare step leaves."""
    torch.manual_seed(0)
    generator = nn.Linear(4, 6)
    discriminator = nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.Tanh(), nn.Linear(8, 1))
    fooled = peer(generator, criterion=lambda fake, _: F.softplus(-discriminator(fake)).mean())
    told = peer(discriminator, criterion=lambda score, real: F.binary_cross_entropy_with_logits(score, real))
    target = torch.tensor([1.0] * 8 + [0.0] * 8)[:, None]
    for step in range(12):
        noise = torch.randn(8, 4)
        with torch.no_grad():
            fake = generator(noise)
        told.step((torch.cat([torch.randn(8, 6) + 1.0, fake]), target))
        counted = discriminator[1].num_batches_tracked.item()
        fooled.step((noise, noise))
        more = discriminator[1].num_batches_tracked.item() - counted
        if more != 1:
            return f"the generator's step {step} ran the discriminator's BatchNorm {more} times"
    rates = fooled.lr, told.lr
    return None if all(map(math.isfinite, rates)) else f"the learning rates are {rates}"
