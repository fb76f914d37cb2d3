"""Under autocast a loss of float32 has the rounding of bfloat16, which does not mislead the first step's search."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import apo
from tests.training.models import TASKS, Task, loss, made

Forward = Callable[[nn.Module, Tensor], Tensor]


def plain(model: nn.Module, x: Tensor) -> Tensor:
    return model(x)


def outside(model: nn.Module, x: Tensor) -> Tensor:
    """As a training loop has it."""
    with torch.autocast("cpu", torch.bfloat16):
        return model(x)


def inside(model: nn.Module, x: Tensor) -> Tensor:
    """As Accelerate has it: within the model's own forward, whose outputs are of float32."""
    if "forward" not in vars(model):
        cast = torch.autocast("cpu", torch.bfloat16)(model.forward)
        model.forward = lambda x: cast(x).float()  # type: ignore[method-assign]
    return model(x)


def found(task: Task, forward: Forward, lr: float) -> float:
    model = made(task)
    opt = apo.APO(model, torch.optim.AdamW(model.parameters(), lr=lr), loss=loss)
    batch: Any = task.batches(1, size=32)[0]
    loss(forward(model, batch[0]), batch[1]).backward()
    opt.step(batch=batch)
    return opt.hypers()["lr"]


@pytest.mark.parametrize("lr", [1e-6, 1e-5, 1e-4])
@pytest.mark.parametrize("forward", [outside, inside])
@pytest.mark.parametrize("task", TASKS, ids=lambda task: task.name)
def test_the_search_finds_what_it_finds_in_float32(task: Task, forward: Forward, lr: float) -> None:
    assert 1 / 5 < found(task, forward, lr) / found(task, plain, lr) < 5
