"""With nothing tuned, or tuned by nothing, training is the bare base optimizer's, bit for bit."""

from collections.abc import Callable, Iterable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import apo
from apo.lifting import Lifted
from apo.types import Params
from tests.cases import RULES, RuleCase, bits, names
from tests.shell.helpers import TORCH_BASES, Base, backward, batches, net, optimizers, state, traces, train, weights

LONG, SHORT = 32, 10
every_base = pytest.mark.parametrize("base", TORCH_BASES, ids=[base.name for base in TORCH_BASES])
every_rule = pytest.mark.parametrize("case", RULES, ids=names(RULES))
pytestmark = pytest.mark.filterwarnings("ignore:the momentum of Muon")
STILL = apo.Gradient(torch.optim.SGD, lr=0.0, every=3)


def follow(model: nn.Module, step: Callable[[Any], None], look: Callable[[], Any], steps: int = SHORT) -> list[Any]:
    """Everything that there is to see, after each of the steps."""
    torch.manual_seed(5)
    seen = []
    for batch in batches(steps):
        model.zero_grad()
        backward(model, batch)
        step(batch)
        seen.append((weights(model), traces(model), look()))
    return seen


def bare(base: Base, steps: int = SHORT) -> list[Any]:
    model = net()
    opts = optimizers(base.build(model))

    def step(_: Any) -> None:
        for opt in opts:
            opt.step()

    return follow(model, step, lambda: state(model, opts), steps)


def shelled(build: Callable[[nn.Module], Any], steps: int = SHORT, **options: Any) -> tuple[list[Any], apo.APO]:
    model = net()
    opt = apo.APO(model, build(model), F.cross_entropy, **options)
    return follow(model, lambda batch: opt.step(batch=batch), lambda: state(model, [opt]), steps), opt


def unobserving(case: RuleCase) -> apo.Rule[Any, Any]:
    """The rule, blind to the model's curvature; what it observes has tests of its own."""
    return case.rule()._replace(observe=None, fisher=None)


def in_place(rule: apo.Rule[Any, Any], params: Params, grads: Params, state: Any, hypers: Any) -> bool:
    """Whether the rule has taken the step in place, one parameter at a time, in the order of the calls."""
    take = rule.step.in_place if isinstance(rule.step, Lifted) else None
    if take is None:
        return False
    slices = [type(state)(*([field[name]] if field else None for field in state)) for name in params]
    taken = [take([params[n]], [grads[n]], part, hypers) for n, part in zip(params, slices, strict=True)]
    assert len(set(taken)) == 1
    return taken[0]


def bare_rule(rule: apo.Rule[Any, Any], steps: int = SHORT, each: Iterable[str] = ()) -> list[Any]:
    """A run of the rule itself; the hyperparameters of ``each`` are given for every parameter, the same."""
    model = net()
    live = dict(model.named_parameters())
    lifted = isinstance(rule.step, Lifted)
    same = type(rule.hypers)(*(h.item() if lifted else h for h in rule.hypers))
    hypers = same._replace(**{hyper: dict.fromkeys(live, getattr(same, hyper)) for hyper in each})
    kept = [rule.init({name: p.detach() for name, p in live.items()})]

    def step(_: Any) -> None:
        params = {name: p.detach().clone() for name, p in live.items()}
        grads: Any = {name: p.grad for name, p in live.items()}
        if in_place(rule, {name: p.detach() for name, p in live.items()}, grads, kept[0], same):
            return
        new, kept[0] = rule.step(params, grads, kept[0], hypers)
        with torch.no_grad():
            for name, p in live.items():
                p.copy_(new[name])

    def look() -> list[Any]:
        fields = sorted(kept[0]._asdict().items())
        return [[{k: bits(v[name]) for k, v in fields if name in v}] for name in live]

    return follow(model, step, look, steps)


@every_base
def test_nothing_tuned_is_the_bare_torch_optimizer(base: Base) -> None:
    run, opt = shelled(base.build, LONG, tune={})
    assert run == bare(base, LONG)
    assert not opt.due
    assert len(opt.record) == 0


@every_rule
def test_nothing_tuned_is_the_bare_rule(case: RuleCase) -> None:
    run, _ = shelled(lambda _: unobserving(case), LONG, tune={})
    for found, expected in zip(run, bare_rule(unobserving(case), LONG), strict=True):
        assert found[:2] == expected[:2]
        assert [list(filter(None, entries)) for entries in found[2]] == [
            list(filter(None, entries)) for entries in expected[2]
        ]


@pytest.mark.parametrize(
    ("by", "lookahead"), [("global", "no-momentum"), ("group", "step"), ("layer", "no-momentum"), ("parameter", "step")]
)
@every_base
def test_judging_leaves_no_trace_of_itself(base: Base, by: str, lookahead: Any) -> None:
    """A meta-optimizer that moves nothing: every third step is judged, and the run is the bare one."""
    objective = apo.Proximal(fsd=0.3, wsd=0.1, lookahead=lookahead)
    run, opt = shelled(base.build, tune={"lr": by}, meta=STILL, objective=objective)
    assert run == bare(base)
    assert len(opt.record) == (SHORT + 2) // 3
    assert all(row["hypergradient_norm"] > 0.0 and row["fsd"] > 0.0 for row in list(opt.record)[1:])


@every_rule
def test_judging_a_rule_leaves_no_trace_of_itself(case: RuleCase) -> None:
    by = "global" if "decay" in case.name else "parameter"
    tune = {name: by for name in case.adaptable() if case.rule().domains[name].one_step}
    objective = apo.Proximal(fsd=0.3, wsd=0.1)
    run, opt = shelled(lambda _: unobserving(case), tune=tune, meta=STILL, objective=objective)
    expected = bare_rule(unobserving(case), each=tune if by == "parameter" else ())
    assert [seen[:2] for seen in run] == [seen[:2] for seen in expected]
    assert len(opt.record) == (SHORT + 2) // 3


@every_base
def test_a_tuned_run_is_a_bare_run_with_its_learning_rates(base: Base) -> None:
    """Weights, buffers and random numbers of a tuned run, from its effective learning rates alone."""
    model = net()
    opt = apo.APO(model, base.build(model), F.cross_entropy, meta=apo.Newton(every=3, search=False, backtrack=False))
    rates: list[list[float]] = []

    def step(batch: Any) -> None:
        opt.step(batch=batch)
        rates.append([group["effective_lr"] for group in opt.param_groups])

    run = follow(model, step, lambda: None)
    assert len({rate[0] for rate in rates}) > 2, "the learning rate moves"
    again = net()
    opts = optimizers(base.build(again))
    replayed = iter(rates)

    def replay(_: Any) -> None:
        for group, rate in zip((g for b in opts for g in b.param_groups), next(replayed), strict=True):
            group["lr"] = rate
        for b in opts:
            b.step()

    assert follow(again, replay, lambda: None) == run


def test_evaluation_keeps_the_users_flags() -> None:
    """A layer that is in eval mode while the model trains stays so, and its statistics too."""
    model = net()
    opt = apo.APO(model, torch.optim.SGD(model.parameters(), lr=0.1), F.cross_entropy, meta=STILL)
    model[1].eval()
    before = traces(model)[0]["1.running_mean"]
    train(model, opt, batches(4))
    assert [m.training for m in model.modules()].count(False) == 1
    assert traces(model)[0]["1.running_mean"] == before
