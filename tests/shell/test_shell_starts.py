"""From any initial learning rate the tuned runs end alike: the demo's promise, on the bundled digits."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import apo
from baselines.data import load
from baselines.models import mlp
from tests.shell.helpers import o

STARTS = (1e-6, 1e-3, 0.1, 1.0)
NOISE = 1e-2
"""Losses below this count as this."""


def trained(cls: Any, lr: float, steps: int = 800) -> float:
    """The loss on the training set."""
    torch.manual_seed(0)
    data = load("digits")
    model: nn.Module = mlp((1, 8, 8), data.classes)
    opt = apo.APO(model, cls(model.parameters(), lr=lr), F.cross_entropy)
    order = torch.Generator().manual_seed(0)
    for _ in range(steps):
        rows = torch.randint(len(data.train_inputs), (50,), generator=order)
        batch = data.train_inputs[rows], data.train_targets[rows]
        opt.zero_grad()
        F.cross_entropy(model(batch[0]), batch[1]).backward()
        opt.step(batch=batch)
    with torch.no_grad():
        return F.cross_entropy(model(data.train_inputs), data.train_targets).item()


@pytest.mark.parametrize("cls", [o.AdamW, o.RMSprop])
def test_runs_from_far_apart_end_within_a_factor_of_two(cls: Any) -> None:
    losses = [max(trained(cls, lr), NOISE) for lr in STARTS]
    assert max(losses) <= 2.0 * min(losses)
    assert max(losses) < 0.1, "none is dead"
