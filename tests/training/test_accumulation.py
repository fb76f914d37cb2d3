"""Gradient accumulation and clipping: micro-batches are one batch, and a clipped step is judged as it is."""

import gc
import math
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import apo
from tests.training.models import TASKS, Batch, Task, loss, made

o = torch.optim
CUTS = [(0, 3), (3, 6), (6, 8)]
PLAIN = [TASKS[1], TASKS[2]]  # without BatchNorm, whose statistics are those of a micro-batch


def micro_batches(batch: Batch) -> list[tuple[Batch, float]]:
    """Three, the last one smaller, and their shares."""
    return [((batch[0][a:b], batch[1][a:b]), (b - a) / 8) for a, b in CUTS]


@pytest.mark.parametrize("objective", [apo.Proximal(), apo.Proximal(fsd=0.3, wsd=0.1, other_fraction=1.0)])
@pytest.mark.parametrize("task", PLAIN, ids=lambda task: task.name)
def test_uneven_micro_batches_are_one_batch(task: Task, objective: apo.Proximal) -> None:
    """In every row of the record and every weight, in float64."""
    runs = []
    for cut in (True, False):
        model = made(task, dtype=torch.float64, dropout=0.0)
        opt = apo.APO(model, o.AdamW(model.parameters(), lr=1e-3), loss, objective=objective, meta=apo.Newton(every=2))
        for batch in task.batches(6):
            opt.zero_grad()
            for part, share in micro_batches(batch) if cut else [(batch, 1.0)]:
                (share * loss(model(part[0]), part[1])).backward()
                opt.feed(part, weight=8 * share)
            opt.step()
        runs.append((opt.record.rows, [p.detach().clone() for p in model.parameters()]))
    assert len(runs[0][0]) == 3
    for ours, whole in zip(runs[0][0], runs[1][0], strict=True):
        assert ours == pytest.approx({**whole, "evaluations": ours["evaluations"]}, rel=1e-6, abs=1e-12, nan_ok=True)
    for p, q in zip(runs[0][1], runs[1][1], strict=True):
        torch.testing.assert_close(p, q, rtol=1e-8, atol=1e-10)


def test_the_graphs_and_batches_of_micro_batches_are_let_go() -> None:
    """No forward of the evaluation outlives its own micro-batch, and no batch the step."""
    task = TASKS[1]
    model = made(task)
    alive: list[int] = []
    outputs: list[Any] = []

    def forward(m: nn.Module, batch: Batch) -> torch.Tensor:
        gc.collect()
        alive.append(sum(ref() is not None for ref in outputs))
        out = m(batch[0])
        outputs.append(weakref.ref(out))
        return out

    opt = apo.APO(model, o.SGD(model.parameters(), lr=0.1), loss, forward=forward, meta="paper")
    parts = micro_batches(task.batches(1)[0])
    for part, share in parts:
        (share * loss(model(part[0]), part[1])).backward()
        opt.feed(part, weight=share)
    opt.step()
    assert len(alive) == 3
    assert max(alive) <= 1
    kept = [weakref.ref(part[0]) for part, _ in parts]
    del parts, part
    gc.collect()
    assert [ref() for ref in kept] == [None] * 3


def by_norm(model: nn.Module) -> None:
    nn.utils.clip_grad_norm_(model.parameters(), 0.05)


def by_value(model: nn.Module) -> None:
    nn.utils.clip_grad_value_(model.parameters(), 1e-3)


@pytest.mark.parametrize("clip", [by_norm, by_value])
@pytest.mark.parametrize("task", TASKS, ids=lambda task: task.name)
def test_the_hypergradient_takes_the_clipped_gradient_as_given(task: Task, clip: Callable[[nn.Module], None]) -> None:
    """Against central differences of the loss after a clipped step, dropout and BatchNorm included."""

    def stepped(rate: float) -> tuple[apo.APO, float]:
        model = made(task, dtype=torch.float64)
        opt = apo.APO(model, o.SGD(model.parameters(), lr=rate), loss, meta=apo.Newton(every=1, search=False))
        batch = task.batches(1)[0]
        batch = batch[0].double() if batch[0].is_floating_point() else batch[0], batch[1]
        loss(model(batch[0]), batch[1]).backward()
        clip(model)
        opt.step(batch=batch)
        return opt, opt.record[0]["loss"]

    rate, h = 0.5, 1e-5
    row = stepped(rate)[0].record[0]
    difference = (stepped(rate * math.exp(h))[1] - stepped(rate * math.exp(-h))[1]) / (2 * h)
    assert row["slope"] + row["curvature"] == pytest.approx(difference, rel=1e-6)


def tuned(scale: Callable[[nn.Module], Any]) -> float:
    """Where the learning rate of AdamW, which does not heed a constant factor, settles."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(20, 32), nn.Tanh(), nn.Linear(32, 5))
    opt = apo.APO(model, o.AdamW(model.parameters(), lr=1e-2), F.cross_entropy, meta=apo.Newton(every=4))
    generator = torch.Generator().manual_seed(1)
    weight = torch.randn(20, 5, generator=generator)
    for _ in range(200):
        x = torch.randn(32, 20, generator=generator)
        y = (x @ weight + 2.0 * torch.randn(32, 5, generator=generator)).argmax(1)
        opt.zero_grad()
        F.cross_entropy(model(x), y).backward()
        scale(model)
        opt.step(batch=(x, y))
    rates = opt.record.column("lr")[25:]
    return math.exp(sum(map(math.log, rates)) / len(rates))


def multiplied(factor: float) -> Callable[[nn.Module], None]:
    def scale(model: nn.Module) -> None:
        for p in model.parameters():
            p.grad.mul_(factor)

    return scale


def test_the_learning_rate_that_is_found_does_not_depend_on_clipping() -> None:
    """Nor on a division by the number of micro-batches that was forgotten."""
    plain = tuned(lambda model: None)
    assert tuned(multiplied(8.0)) == pytest.approx(plain, rel=0.02)
    assert tuned(lambda model: nn.utils.clip_grad_norm_(model.parameters(), 0.3)) == pytest.approx(plain, rel=0.15)
