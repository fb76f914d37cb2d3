"""Layers that are frozen at first, as in fine-tuning, and unfrozen while a tuned run goes on."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import apo
from tests.cases import bits
from tests.shell.helpers import batches, net, train

o = torch.optim


@pytest.mark.parametrize("fisher", ["mc", "exact", "empirical"])
def test_kfac_preconditions_a_layer_that_was_frozen_when_the_rule_was_made(fisher: Any) -> None:
    model = net(dropout=0.0)
    first, bias = model[0].weight, model[0].bias
    model[0].requires_grad_(False)
    rule = apo.kfac(model, lr=1e-2, damping=0.1, every=1, fisher=fisher)
    opt = apo.APO(model, rule, F.cross_entropy, tune={})
    start = bits(first)
    train(model, opt, batches(3))
    assert bits(first) == start
    assert first not in opt.state
    assert set(opt.state[model[5].weight]["inputs"].shape) == {9}
    model[0].requires_grad_(True)
    opt.add_param_group({"params": [first, bias]})
    train(model, opt, batches(2, seed=2))
    assert opt.state[first]["observations"] == 2.0
    before = first.detach().clone()
    (batch,) = batches(1, seed=3)
    opt.zero_grad()
    F.cross_entropy(model(batch[0]), batch[1]).backward()
    grad = torch.cat([first.grad, bias.grad.unsqueeze(1)], 1)
    opt.step(batch=batch)
    expected = 1e-2 * natural(opt.state[first], grad, 0.1)[:, :-1]
    torch.testing.assert_close(before - first.detach(), expected, rtol=1e-4, atol=1e-7)
    assert not torch.allclose(expected, 1e-2 * grad[:, :-1], rtol=0.1), "it is not the plain step"


def natural(known: dict[str, Tensor], grad: Tensor, damping: float) -> Tensor:
    """(S ⊗ A + λI)⁻¹ G by one linear system."""
    curvature = torch.kron(known["outputs"], known["inputs"])
    solved: Tensor = torch.linalg.solve(curvature + damping * torch.eye(len(curvature)), grad.flatten())
    return solved.reshape_as(grad)


@pytest.mark.parametrize("by", ["global", "layer"])
def test_a_torch_optimizer_takes_them_as_they_come(by: str) -> None:
    """Parameters that are in the optimizer from the start, and get gradients later."""
    model = net()
    model[0].requires_grad_(False)
    opt = apo.APO(model, o.AdamW(model.parameters(), lr=1e-3), F.cross_entropy, tune={"lr": by})
    start = bits(model[0].weight)
    train(model, opt, batches(11))
    assert bits(model[0].weight) == start
    assert model[0].weight not in opt.state
    model[0].requires_grad_(True)
    train(model, opt, batches(11, seed=2))
    assert bits(model[0].weight) != start
    assert len(opt.record) == 3
    assert all(torch.isfinite(torch.tensor(list(opt.hypers().values()))))
