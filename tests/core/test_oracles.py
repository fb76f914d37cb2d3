"""The hypergradient equals the one-step unrolls of two independent libraries, `higher` and `torchopt`."""

from collections.abc import Callable
from typing import Any

import higher
import pytest
import torch
import torchopt
from torch import Tensor, nn
from torch.func import grad
from torch.utils._pytree import tree_map

import apo
from tests.cases import Moment, Problem, mlp, moment

LR, DECAY = 0.05, 0.3
BETAS = {"beta1": 0.5, "beta2": 0.75}  # exact in float32, in which torchopt corrects Adam's bias
STATES = {"fresh": 0, "after-3-steps": 3}

ROWS: list[tuple[str, Callable[..., apo.Rule], dict[str, Any]]] = [
    ("SGD", apo.sgd, {"lr": LR}),
    ("SGD", apo.sgd, {"lr": LR, "weight_decay": DECAY}),
    ("SGD", apo.sgd, {"lr": LR, "momentum": 0.8, "dampening": 0.2, "weight_decay": DECAY}),
    ("SGD", apo.sgd, {"lr": LR, "momentum": 0.8, "nesterov": True}),
    ("RMSprop", apo.rmsprop, {"lr": LR, "alpha": 0.9, "eps": 1e-2, "weight_decay": DECAY}),
    ("Adam", apo.adam, {"lr": LR, "eps": 1e-2, "weight_decay": DECAY, **BETAS}),
]
# higher has no AdamW; torchopt adds RMSprop's epsilon inside the root, and takes tensors for lr and eps alone.
TORCHOPT_ROWS = [
    *(row for row in ROWS if row[0] != "RMSprop"),
    ("AdamW", apo.adamw, {"lr": LR, "eps": 1e-2, "weight_decay": DECAY, **BETAS}),
]

every_state = pytest.mark.parametrize("steps", STATES.values(), ids=STATES)


def ids(rows: list[Any]) -> list[str]:
    return ["-".join([name, *renamed(options)]) for name, _, options in rows]


def hypergradients(rule: apo.Rule, problem: Problem, at: Moment, options: dict[str, Any]) -> dict[str, Tensor]:
    slopes = apo.hypergradient(rule, problem.loss, *at, rule.hypers)[1]
    return {name: getattr(slopes, name) for name in options if name not in ("nesterov", *BETAS)}


def renamed(options: dict[str, Any]) -> dict[str, Any]:
    """The options under the names that torch, higher and torchopt give them."""
    betas = {"betas": tuple(BETAS.values())} if "beta1" in options else {}
    return {**{key: value for key, value in options.items() if key not in BETAS}, **betas}


def leaf(value: float) -> Tensor:
    return torch.tensor(value, dtype=torch.float64, requires_grad=True)


class Holder(nn.Module):
    """Parameters, and the loss of a problem as the forward: the shape in which `higher` takes a model."""

    def __init__(self, problem: Problem) -> None:
        super().__init__()
        self.problem = problem
        self.keys = list(problem.params)
        self.weights = nn.ParameterList([p.clone() for p in problem.params.values()])

    def forward(self) -> Tensor:
        return self.problem.loss(dict(zip(self.keys, self.weights, strict=True)))


@pytest.mark.filterwarnings("ignore:Differentiable RMSprop suffers:UserWarning")
@every_state
@pytest.mark.parametrize(("name", "make", "options"), ROWS, ids=ids(ROWS))
def test_equals_higher(name: str, make: Callable[..., apo.Rule], options: dict[str, Any], steps: int) -> None:
    problem = mlp()
    rule = make(**options)
    model = Holder(problem)
    twin = getattr(torch.optim, name)(model.parameters(), **renamed(options))
    for _ in range(steps):
        twin.zero_grad()
        model().backward()
        twin.step()
    for history in twin.state.values():
        if "step" in history:
            history["step"] = int(history["step"])  # torch's counter would make higher's powers float32
    expected = hypergradients(rule, problem, moment(rule, problem, steps), options)
    # higher adds Adam's epsilon before it corrects the bias of the root; torch and apo add it after.
    units = {"eps": (1.0 - BETAS["beta2"] ** (steps + 1)) ** 0.5} if name == "Adam" else {}
    inputs = {key: leaf(options[key] * units.get(key, 1.0)) for key in expected}
    override: Any = {key: [value] for key, value in inputs.items()}
    with higher.innerloop_ctx(model, twin, copy_initial_weights=False, override=override) as (fast, unroll):
        unroll.step(fast())
        found = torch.autograd.grad(fast(), list(inputs.values()), materialize_grads=True)
    for key, slope in zip(inputs, found, strict=True):
        torch.testing.assert_close(expected[key], slope * units.get(key, 1.0), rtol=1e-10, atol=1e-14)


@every_state
@pytest.mark.parametrize(("name", "make", "options"), TORCHOPT_ROWS, ids=ids(TORCHOPT_ROWS))
def test_equals_torchopt(name: str, make: Callable[..., apo.Rule], options: dict[str, Any], steps: int) -> None:
    problem = mlp()
    rule = make(**options)
    expected = hypergradients(rule, problem, moment(rule, problem, steps), options)
    inputs = {key: leaf(options[key]) for key in expected if key in ("lr", "eps")}
    transform = getattr(torchopt, name.lower())(**{**renamed(options), **inputs})
    params, state, new = problem.params, transform.init(problem.params), problem.params
    for _ in range(steps + 1):
        params = {key: p.detach() for key, p in new.items()}
        state = tree_map(lambda leaf: leaf.detach() if isinstance(leaf, Tensor) else leaf, state)
        updates, state = transform.update(grad(problem.loss)(params), state, params=params, inplace=False)
        new = torchopt.apply_updates(params, updates, inplace=False)
    found = torch.autograd.grad(problem.loss(new), list(inputs.values()))
    for key, slope in zip(inputs, found, strict=True):
        torch.testing.assert_close(expected[key], slope, rtol=1e-10, atol=1e-14)
