"""The proximal objective of a small model, written anew: what central differences are taken of."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call

import apo
from tests.shell.helpers import batches

FIRST, SECOND, OTHER = batches(3, seed=4, size=7, dtype=torch.float64)
WEIGHTS = (1.0, 3.0)


def model_of() -> nn.Sequential:
    torch.manual_seed(3)
    return nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 3)).double()


def loss_on(model: nn.Module, params: dict[str, Tensor]) -> Tensor:
    parts = [F.cross_entropy(functional_call(model, params, (x,)), y) for x, y in (FIRST, SECOND)]
    return (WEIGHTS[0] * parts[0] + WEIGHTS[1] * parts[1]) / sum(WEIGHTS)


def distance(name: str, new: Tensor, old: Tensor, targets: Tensor) -> Tensor:
    """The discrepancies of algorithms and equations, written anew."""
    if name == "squared_error":
        return ((new - old) ** 2).sum(1).mean()
    if name == "kl":
        p = new.softmax(1)
        return (p * (new.softmax(1).log() - old.softmax(1).log())).sum(1).mean()
    slope = (old.softmax(1) - F.one_hot(targets, 3)) / len(old)
    if name == "bregman":
        return F.cross_entropy(new, targets) - F.cross_entropy(old, targets) - (slope * (new - old)).sum()
    p, change = old.softmax(1), new - old
    return ((p * change**2).sum(1) - (p * change).sum(1) ** 2).mean()


def objective_at(
    model: nn.Module, objective: apo.Proximal, before: dict[str, Tensor], after: dict[str, Tensor]
) -> float:
    """Q at θ' for a step from θ."""
    leaves = {name: p.clone().requires_grad_() for name, p in before.items()}
    loss = loss_on(model, leaves)
    slopes = torch.autograd.grad(loss, list(leaves.values()))
    moved = {name: after[name] - before[name] for name in before}
    if objective.loss_model == "exact":
        q = loss_on(model, after)
    else:
        q = loss.detach() + sum((s * d).sum() for s, d in zip(slopes, moved.values(), strict=True))
    if objective.fsd:
        new, old = (functional_call(model, p, (OTHER[0],)) for p in (after, before))
        assert isinstance(objective.discrepancy, str)
        q = q + objective.fsd * distance(objective.discrepancy, new, old, OTHER[1])
    return (q + objective.wsd * 0.5 * sum((d**2).sum() for d in moved.values())).item()


def values_of(model: nn.Module) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters()}
