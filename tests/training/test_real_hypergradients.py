"""On models that people train, with dropout on, the shell's hypergradients equal central differences, in float64.

The differences are taken on a twin without activation checkpointing: the step by hand, from gradients of the twin's own
under the same random numbers, and the loss at the ends of it. With ``Gradient(SGD, lr)`` an offset moves by −lr times
the hypergradient, so ``opt.hypers()`` shows it.
"""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn

import apo
from apo.hypers import Tune
from tests.training.models import TASKS, Batch, Checkpointing, Task, loss, made

o = torch.optim
RATE, STEP = 1e-3, 1e-6  # differences so small miss the kinks of ReLU
DECAY, BETA1, BETA2, EPS, RHO = 0.1, 0.9, 0.99, 1e-3, 0.4
Params = dict[str, Tensor]
Change = Callable[[nn.Module], None]
RESNET, TRANSFORMER, LSTM = TASKS


def untouched(model: nn.Module) -> None:
    """The model as it is; the Transformer's embedding is tied to its head."""


def shared(model: nn.Module) -> None:
    """One block, used twice."""
    model.blocks[1] = model.blocks[0]


def asking(model: nn.Module) -> None:
    """Let activations ask for gradients after a frozen start: reentrant checkpoints give none otherwise."""
    next(model.children()).register_forward_hook(lambda module, args, outputs: outputs.requires_grad_())


def frozen(model: nn.Module) -> None:
    """The stem, and a BatchNorm further on, whose statistics stand still."""
    for part in (model.stem, model.blocks[0].body[1]):
        part.requires_grad_(False)
        part.eval()
    asking(model)


class LoRA(nn.Module):
    """A frozen linear map, and one of low rank beside it that is trained."""

    def __init__(self, base: nn.Linear) -> None:
        super().__init__()
        self.base = base.requires_grad_(False)
        self.down, self.up = nn.Linear(base.in_features, 2, bias=False), nn.Linear(2, base.out_features, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x) + self.up(self.down(x))


def adapted(model: nn.Module) -> None:
    """Everything frozen but adapters beside the linear maps."""
    model.requires_grad_(False)
    torch.manual_seed(7)
    linears = [name for name, m in model.named_modules() if isinstance(m, nn.Linear) and name != "head"]
    for name in linears or ["head"]:
        parent, _, last = name.rpartition(".")
        setattr(model.get_submodule(parent), last, LoRA(model.get_submodule(name)).double())
    asking(model)


class Aside(nn.Module):
    """A parameter that only every other step uses, and one that none does."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model, self.blocks = model, getattr(model, "blocks", None)
        self.sometimes = nn.Parameter(torch.full((), 0.3, dtype=torch.float64))
        self.never = nn.Parameter(torch.ones(3, dtype=torch.float64))
        self.using = True

    def forward(self, x: Tensor) -> Tensor:
        outputs: Tensor = self.model(x)
        return outputs * (1.0 + self.sometimes) if self.using else outputs


class Base(NamedTuple):
    """A base optimizer, and its step by hand: ``step(θ, gradients so far, lr by name) -> θ'``, as it is judged."""

    name: str
    build: Callable[[nn.Module], Any]
    step: Callable[[Params, list[Params], dict[str, float]], Params]
    lookahead: Any = "step"
    lr: float = 0.05


def trained(model: nn.Module) -> list[nn.Parameter]:
    return [p for p in model.parameters() if p.requires_grad]


def history(grads: list[Params], name: str) -> list[Tensor]:
    return [grad[name] for grad in grads if name in grad]


def sgd_step(momentum: float) -> Any:
    def step(theta: Params, grads: list[Params], lr: dict[str, float]) -> Params:
        new = dict(theta)
        for name in grads[-1]:
            own = history(grads, name)
            new[name] = theta[name] - lr[name] * sum(momentum**i * g for i, g in enumerate(reversed(own)))
        return new

    return step


def adamw_step(beta1: float) -> Any:
    def step(theta: Params, grads: list[Params], lr: dict[str, float]) -> Params:
        new = dict(theta)
        for name in grads[-1]:
            own = history(grads, name)
            first = sum((1 - beta1) * beta1**i * g for i, g in enumerate(reversed(own))) / (1 - beta1 ** len(own))
            second = sum((1 - BETA2) * BETA2**i * g**2 for i, g in enumerate(reversed(own))) / (1 - BETA2 ** len(own))
            new[name] = theta[name] - lr[name] * (first / (second.sqrt() + EPS) + DECAY * theta[name])
        return new

    return step


def adamw(model: nn.Module) -> o.Optimizer:
    return o.AdamW(trained(model), lr=0.05, betas=(BETA1, BETA2), eps=EPS, weight_decay=DECAY)


def sgd(model: nn.Module) -> o.Optimizer:
    return o.SGD(trained(model), lr=0.05, momentum=BETA1)


def rule(model: nn.Module) -> Any:
    return [(apo.adamw(lr=0.05, beta1=BETA1, beta2=BETA2, eps=EPS, weight_decay=DECAY), trained(model))]


BASES = [
    Base("sgd", sgd, sgd_step(0.0), "no-momentum"),
    Base("sgd-step", sgd, sgd_step(BETA1)),
    Base("adamw", adamw, adamw_step(0.0), "no-momentum"),
    Base("adamw-step", adamw, adamw_step(BETA1)),
    Base("rule", rule, adamw_step(0.0), "no-momentum"),
    Base("rule-step", rule, adamw_step(BETA1)),
]
BY_NAME = {base.name: base for base in BASES}


def model_of(task: Task, change: Any, checkpointing: Checkpointing = None) -> nn.Module:
    model = made(task, dtype=torch.float64, checkpointing=checkpointing)
    return change(model) or model


def batches_of(task: Task) -> list[Batch]:
    return [(x.double() if x.is_floating_point() else x, y) for x, y in task.batches(3, size=4)]


def forward(model: nn.Module, batch: Batch, number: int) -> Tensor:
    """The loss of a training forward, under random numbers of its own."""
    if isinstance(model, Aside):
        model.using = number % 2 == 0
    torch.manual_seed(number)
    return loss(model(batch[0]), batch[1])


def shell_slopes(model: nn.Module, base: Base, by: Any, data: list[Batch]) -> dict[str, float]:
    """The hypergradients of the last step, by label; the gradient of everything is left alone."""
    meta = apo.Gradient(o.SGD, lr=RATE, every=1)
    objective = apo.Proximal(lookahead=base.lookahead)
    opt = apo.APO(model, base.build(model), loss, tune={"lr": by}, meta=meta, objective=objective)
    opt.freeze()
    for number, batch in enumerate(data):
        if number == len(data) - 1:
            opt.unfreeze()
        opt.zero_grad()
        forward(model, batch, number).backward()
        kept = {p: (p.grad, None if p.grad is None else p.grad.clone()) for p in model.parameters()}
        before = opt.hypers()
        opt.step(batch=batch)
        for p, (grad, content) in kept.items():
            assert p.grad is grad
            assert grad is None or torch.equal(grad, content)
    assert len(opt.record) == 1
    return {label: math.log(before[label] / value) / RATE for label, value in opt.hypers().items()}


def differences(twin: nn.Module, base: Base, by: Any, data: list[Batch]) -> dict[str, float]:
    """dQ/d log lr by label, without a shell."""
    live = {name: p for name, p in twin.named_parameters() if p.requires_grad}
    key_of = {name: Tune(by).key(0, name) for name in live}
    taken = BY_NAME[base.name.partition("-")[0] + "-step"].step
    grads: list[Params] = []
    for number, batch in enumerate(data):
        for p in live.values():
            p.grad = None
        forward(twin, batch, number).backward()
        grads.append({name: p.grad.clone() for name, p in live.items() if p.grad is not None})
        theta = {name: p.detach().clone() for name, p in live.items()}
        if number < len(data) - 1:
            write(live, taken(theta, grads, dict.fromkeys(live, base.lr)))

    def q(key: str, shift: float) -> float:
        rates = {name: base.lr * math.exp(shift if key_of[name] == key else 0.0) for name in live}
        write(live, base.step(theta, grads, rates))
        with torch.no_grad():
            return forward(twin, data[-1], len(data) - 1).item()

    return {
        "/".join(["lr", *filter(None, [key])]): (q(key, STEP) - q(key, -STEP)) / (2 * STEP)
        for key in dict.fromkeys(key_of.values())
    }


def write(live: dict[str, nn.Parameter], values: Params) -> None:
    with torch.no_grad():
        for name, p in live.items():
            p.copy_(values[name])


def check(task: Task, base: Base, by: Any, change: Any = untouched, checkpointing: Checkpointing = None) -> None:
    data = batches_of(task)
    slopes = shell_slopes(model_of(task, change, checkpointing), base, by, data)
    expected = differences(model_of(task, change), base, by, data)
    assert slopes.keys() == expected.keys()
    assert max(map(abs, expected.values())) > 1e-4
    for label, value in expected.items():
        assert slopes[label] == pytest.approx(value, rel=1e-5, abs=1e-8), label


every_task = pytest.mark.parametrize("task", TASKS, ids=[task.name for task in TASKS])
every_way = pytest.mark.parametrize("checkpointing", [None, "reentrant", "non-reentrant"])


@pytest.mark.parametrize("base", BASES, ids=[base.name for base in BASES])
@every_task
def test_of_every_kind_of_base(task: Task, base: Base) -> None:
    check(task, base, "layer", checkpointing="non-reentrant")


@pytest.mark.parametrize(
    ("checkpointing", "by"), [(None, "parameter"), ("reentrant", "layer"), ("non-reentrant", "global")]
)
@every_task
def test_under_activation_checkpointing(task: Task, checkpointing: Checkpointing, by: str) -> None:
    check(task, BY_NAME["adamw"], by, checkpointing=checkpointing)


CHANGES = [(RESNET, shared), (TRANSFORMER, shared), (RESNET, frozen), (TRANSFORMER, adapted), (RESNET, adapted)]
CHANGES += [(task, Aside) for task in TASKS]


@every_way
@pytest.mark.parametrize(("task", "change"), CHANGES, ids=[f"{task.name}-{c.__name__}" for task, c in CHANGES])
def test_of_unusual_parameters(task: Task, change: Any, checkpointing: Checkpointing) -> None:
    base = BY_NAME["rule-step" if checkpointing == "reentrant" else "adamw"]
    check(task, base, "layer", change, checkpointing)
