"""The hypergradients that the shell computes equal central differences of the objective, in float64.

With ``Gradient(SGD, lr)`` an offset moves by −lr times the hypergradient, so ``opt.hypers()`` shows it. The differences
are taken on copies: the base optimizer's own step with one learning rate changed, then Q by the formula.
"""

import copy
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call

import apo
from apo.hypers import Tune
from tests.cases import RULES
from tests.shell.differences import FIRST, OTHER, SECOND, WEIGHTS, loss_on, model_of, objective_at, values_of
from tests.shell.helpers import Batch, batches, matrices, net, train, vectors

RATE, STEP = 1e-3, 1e-4
pytestmark = pytest.mark.filterwarnings("ignore:the momentum of Muon")
o = torch.optim


def shell_slopes(build: Callable[[nn.Module], Any], tune: Any, objective: apo.Proximal) -> dict[str, float]:
    """The hypergradients by label, after two steps that are not judged by what is compared."""
    model = model_of()
    meta = apo.Gradient(o.SGD, lr=RATE, every=3)
    opt = apo.APO(model, build(model), F.cross_entropy, tune=tune, meta=meta, objective=objective)
    opt.freeze()
    for _ in range(2):
        fed_step(model, opt)
    opt.unfreeze()
    opt._counts.counted = 0
    before = opt.hypers()
    fed_step(model, opt)
    assert len(opt.record) == 1
    return {label: math.log(before[label] / value) / RATE for label, value in opt.hypers().items()}


def fed_step(model: nn.Module, opt: apo.APO) -> None:
    opt.zero_grad()
    for batch, weight in zip((FIRST, SECOND), WEIGHTS, strict=True):
        (weight / sum(WEIGHTS) * F.cross_entropy(model(batch[0]), batch[1])).backward()
        opt.feed(batch, weight)
    opt.step(other=OTHER)


def backward_both(model: nn.Module) -> None:
    model.zero_grad()
    loss_on(model, dict(model.named_parameters())).backward()


OBJECTIVES = {
    "loss": apo.Proximal(),
    "squared": apo.Proximal(fsd=0.7, wsd=0.2),
    "kl": apo.Proximal(fsd=0.9, discrepancy="kl"),
    "bregman": apo.Proximal(fsd=0.8, discrepancy="bregman", wsd=0.1),
    "gauss-newton": apo.Proximal(fsd=0.5, discrepancy="gauss_newton"),
    "linear": apo.Proximal(fsd=0.4, wsd=0.3, loss_model="linear"),
}
GRANULARITIES: dict[str, Any] = {
    "global": "global",
    "group": "group",
    "layer": "layer",
    "parameter": "parameter",
    "callable": lambda name: name.rpartition(".")[2],
}
every_objective = pytest.mark.parametrize("objective", OBJECTIVES.values(), ids=OBJECTIVES)


def keys(by: Any, model: nn.Module) -> dict[str, str]:
    """The label's ending of every parameter; groups are matrices and the rest."""
    how = Tune(by)
    return {name: how.key(0 if p.ndim == 2 else 1, name) for name, p in model.named_parameters()}


def two_groups(cls: Any, **options: Any) -> Callable[[nn.Module], Any]:
    """Matrices, and the rest at a third of the learning rate."""

    def build(model: nn.Module) -> Any:
        groups = [{"params": matrices(model)}, {"params": vectors(model), "lr": options["lr"] / 3}]
        return cls(groups, **options)

    return build


def torch_differences(
    build: Callable[[nn.Module], Any], key_of: dict[str, str], objective: apo.Proximal
) -> dict[str, float]:
    """dQ/d log lr by key: each parameter's displacement, from a step at its own learning rate."""
    model = model_of()
    opts = build(model)
    opts = opts if isinstance(opts, list) else [opts]
    for _ in range(2):
        backward_both(model)
        for opt in opts:
            opt.step()
    backward_both(model)
    before = values_of(model)

    def stepped(scale: float) -> dict[str, Tensor]:
        twin, bases = copy.deepcopy((model, opts))
        for p, q in zip(twin.parameters(), model.parameters(), strict=True):
            p.grad = q.grad
        for base in bases:
            for group in base.param_groups:
                group["lr"] *= scale
            base.step()
        return values_of(twin)

    plain, up, down = stepped(1.0), stepped(math.exp(STEP)), stepped(math.exp(-STEP))
    found = {}
    for key in dict.fromkeys(key_of.values()):
        high, low = ({n: moved[n] if key_of[n] == key else plain[n] for n in plain} for moved in (up, down))
        found[key] = objective_at(model, objective, before, high) - objective_at(model, objective, before, low)
    return {"/".join(["lr", *filter(None, [key])]): change / (2 * STEP) for key, change in found.items()}


def agree(found: dict[str, float], expected: dict[str, float]) -> None:
    assert found.keys() == expected.keys()
    assert max(map(abs, expected.values())) > 1e-7
    for label, value in expected.items():
        assert found[label] == pytest.approx(value, rel=1e-5, abs=1e-9), label


PLAIN = {
    "sgd": two_groups(o.SGD, lr=0.3, weight_decay=0.1),
    "adagrad": two_groups(o.Adagrad, lr=0.05),
    "rmsprop": two_groups(o.RMSprop, lr=0.02, centered=True),
    "adamw-no-beta1": two_groups(o.AdamW, lr=0.05, betas=(0.0, 0.9), weight_decay=0.2),
}


@every_objective
@pytest.mark.parametrize("build", PLAIN.values(), ids=PLAIN)
def test_of_torch_optimizers(build: Any, objective: apo.Proximal) -> None:
    by = "group"
    # One factor on all groups has one label where they differ only by it.
    agree(shell_slopes(build, {"lr": by}, objective), torch_differences(build, keys(by, model_of()), objective))


@pytest.mark.parametrize("by", GRANULARITIES.values(), ids=GRANULARITIES)
@pytest.mark.parametrize("objective", [OBJECTIVES["squared"], OBJECTIVES["linear"]], ids=["exact", "linear"])
def test_of_every_granularity(by: Any, objective: apo.Proximal) -> None:
    build = PLAIN["adamw-no-beta1"]
    found = shell_slopes(build, {"lr": by}, objective)
    expected = torch_differences(build, keys(by, model_of()), objective)
    if by == "global":
        assert found["lr/0"] == pytest.approx(found["lr/1"], rel=1e-9)
        found = {"lr": found["lr/0"]}
    agree(found, expected)


MOMENTUM = {
    "sgd-momentum": two_groups(o.SGD, lr=0.1, momentum=0.9, nesterov=True),
    "adam": two_groups(o.Adam, lr=0.03, weight_decay=0.1),
    "nadam": two_groups(o.NAdam, lr=0.03),
    "muon-adamw": lambda model: [o.Muon(matrices(model), lr=0.02), o.AdamW(vectors(model), lr=0.01)],
}


@pytest.mark.parametrize("build", MOMENTUM.values(), ids=MOMENTUM)
def test_of_the_step_itself(build: Any) -> None:
    """Judged with its momentum."""
    objective = apo.Proximal(fsd=0.7, wsd=0.2, lookahead="step")
    agree(
        shell_slopes(build, {"lr": "layer"}, objective), torch_differences(build, keys("layer", model_of()), objective)
    )


def rule_differences(
    rule: apo.Rule[Any, Any], hyper: str, key_of: dict[str, str], objective: apo.Proximal
) -> dict[str, float]:
    """dQ/d log of one hyperparameter by key, through the step without momentum where that is judged."""
    model = model_of()
    params = values_of(model)
    state = rule.init(params)

    def gradient(at: dict[str, Tensor]) -> dict[str, Tensor]:
        return torch.func.grad(lambda p: loss_on(model, p))(at)

    for _ in range(2):
        params, state = rule.step(params, gradient(params), state, rule.hypers)
    grads = gradient(params)
    free = None if objective.lookahead == "step" else rule.without_momentum
    mu = getattr(rule.hypers, "momentum", torch.zeros(())).item()
    gain = 1.0 / (1.0 - mu) if objective.lookahead == "steady" else 1.0

    def q(key: str, shift: float) -> float:
        base = getattr(rule.hypers, hyper)
        apart = {name: base * math.exp(shift if key_of[name] == key else 0.0) for name in params}
        hypers = rule.hypers._replace(**{hyper: apart})
        if free and gain != 1.0:
            rate: Any = hypers.lr
            longer = {name: gain * r for name, r in rate.items()} if isinstance(rate, dict) else gain * rate
            hypers = hypers._replace(lr=longer)
        after = free(params, grads, state, hypers) if free else rule.step(params, grads, state, hypers)[0]
        return objective_at(model, objective, params, after)

    return {
        "/".join([hyper, *filter(None, [key])]): (q(key, STEP) - q(key, -STEP)) / (2 * STEP)
        for key in dict.fromkeys(key_of.values())
    }


TUNED_NAMES = (
    *("sgd-nesterov-decay", "rmsprop-rho", "adamw", "adam-decay", "apollo-decoupled-decay", "apollo-clipped"),
    *("quasi-adam", "quasi-adam-tensor", "quasi-adam-switch"),
)
TUNED_RULES = [case for case in RULES if case.name in TUNED_NAMES]


@pytest.mark.parametrize("by", ["global", "layer", "parameter", GRANULARITIES["callable"]])
@pytest.mark.parametrize("lookahead", ["steady", "no-momentum", "step"])
@pytest.mark.parametrize("case", TUNED_RULES, ids=[case.name for case in TUNED_RULES])
def test_of_every_hyperparameter_of_rules(case: Any, lookahead: Any, by: Any) -> None:
    rule = case.rule()
    objective = apo.Proximal(fsd=0.7, wsd=0.2, lookahead=lookahead)
    tuned = [name for name in case.adaptable() if rule.domains[name].one_step]
    found = shell_slopes(lambda _: rule, dict.fromkeys(tuned, by), objective)
    expected = {}
    for name in tuned:
        expected |= rule_differences(rule, name, keys(by, model_of()), objective)
    agree(found, expected)


@every_objective
def test_of_rules_under_every_objective(objective: apo.Proximal) -> None:
    rule = apo.rmsprop(lr=0.02, rho=0.4, eps=1e-2, alpha=0.9)
    found = shell_slopes(lambda _: rule, {"lr": "global", "rho": "global", "eps": "global"}, objective)
    expected = {}
    for name in ("lr", "rho", "eps"):
        expected |= rule_differences(rule, name, keys("global", model_of()), objective)
    agree(found, expected)


def test_a_forced_momentum_moves_in_logit() -> None:
    """Its coordinate is the logit, judged through the whole step."""
    model = model_of()
    rule = apo.sgd(lr=0.1, momentum=0.8)
    opt = apo.APO(
        model,
        rule,
        F.cross_entropy,
        tune={"momentum": apo.Tune(force=True)},
        meta=apo.Gradient(o.SGD, lr=RATE, every=1),
        objective=apo.Proximal(lookahead="step"),
    )
    for batch in (FIRST, SECOND):
        model.zero_grad()
        F.cross_entropy(model(batch[0]), batch[1]).backward()
        before, start = opt.hypers()["momentum"], values_of(model)
        kept = {name: dict(opt.state.get(p, {})) for name, p in model.named_parameters()}
        grads = {name: p.grad.clone() for name, p in model.named_parameters()}
        opt.step(batch=batch)
    after = opt.hypers()["momentum"]
    kind = type(rule.init(start))
    state = kind(*({name: fields[field] for name, fields in kept.items()} for field in kind._fields))

    def q(shift: float) -> float:
        value = torch.tensor(before, dtype=torch.float64).logit().add(shift).sigmoid()
        new, _ = rule.step(start, grads, state, rule.hypers._replace(momentum=value))
        return F.cross_entropy(functional_call(model, new, (SECOND[0],)), SECOND[1]).item()

    slope = (q(STEP) - q(-STEP)) / (2 * STEP)
    logits = torch.tensor([before, after], dtype=torch.float64).logit()
    assert abs(slope) > 1e-6
    assert (logits[0] - logits[1]).item() / RATE == pytest.approx(slope, rel=1e-5)


def test_the_record_shows_the_norm() -> None:
    model = model_of()
    batch: Batch = FIRST
    meta = apo.Gradient(o.SGD, lr=RATE, every=1)
    opt = apo.APO(model, o.SGD(model.parameters(), lr=0.3), F.cross_entropy, tune={"lr": "parameter"}, meta=meta)
    before = opt.hypers()
    F.cross_entropy(model(batch[0]), batch[1]).backward()
    opt.step(batch=batch)
    slopes = [math.log(opt.hypers()[label] / before[label]) / -RATE for label in before]
    assert opt.record[0]["hypergradient_norm"] == pytest.approx(math.hypot(*slopes), rel=1e-9)


@pytest.mark.parametrize("by", ["global", "parameter"])
@pytest.mark.parametrize("piece", [1, 40, 2**18])
def test_pieces_add_up(piece: int, by: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """How many parameters are looked at together changes nothing but the order of sums."""
    found = []
    for size in (2**18, piece):
        monkeypatch.setattr("apo.pieces.PIECE", {"cpu": size})
        for base in (lambda m: apo.adam(lr=1e-2), lambda m: torch.optim.AdamW(m.parameters(), lr=1e-2)):
            model = net()
            meta = apo.Gradient(torch.optim.SGD, lr=0.1, every=1)
            objective = apo.Proximal(fsd=0.1, wsd=0.1)
            opt = apo.APO(model, base(model), F.cross_entropy, objective=objective, tune={"lr": by}, meta=meta)
            train(model, opt, batches(4))
            found.append([*(row[name] for row in opt.record for name in row), *opt.hypers().values()])
    for one, other in zip(found[:2], found[2:], strict=True):
        assert one == pytest.approx(other, rel=1e-3, abs=2e-5, nan_ok=True)
