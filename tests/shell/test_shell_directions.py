"""The displacement that is judged has no momentum in it; the weights that stay have."""

import copy
import warnings
from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import apo
from apo.bases.base import NUMBER
from apo.bases.torch_optimizer import TorchBase
from apo.hypers import Tune
from tests.cases import bits, randn
from tests.shell.helpers import backward, batches, net, train, weights

o = torch.optim

SAME_STATE = {
    "adam": (o.Adam, {"betas": (0.9, 0.95), "weight_decay": 0.1}, {"betas": (0.0, 0.95)}),
    "adam-decoupled": (o.Adam, {"weight_decay": 0.1, "decoupled_weight_decay": True}, {"betas": (0.0, 0.999)}),
    "adam-maximize": (o.Adam, {"maximize": True, "weight_decay": 0.1}, {"betas": (0.0, 0.999)}),
    "adamw": (o.AdamW, {"weight_decay": 0.3}, {"betas": (0.0, 0.999)}),
    "adamw-amsgrad": (o.AdamW, {"betas": (0.8, 0.5), "amsgrad": True}, {"betas": (0.0, 0.5)}),
    "adamw-fused": (o.AdamW, {"fused": True, "weight_decay": 0.3}, {"betas": (0.0, 0.999)}),
    "adamw-foreach": (o.AdamW, {"foreach": True, "amsgrad": True}, {"betas": (0.0, 0.999)}),
    "radam": (o.RAdam, {"betas": (0.9, 0.9), "weight_decay": 0.1}, {"betas": (0.0, 0.9)}),
    "radam-decoupled": (
        o.RAdam,
        {"weight_decay": 0.1, "decoupled_weight_decay": True, "betas": (0.9, 0.9)},
        {"betas": (0.0, 0.9)},
    ),
    "adamax": (o.Adamax, {"betas": (0.9, 0.8), "weight_decay": 0.1}, {"betas": (0.0, 0.8)}),
    "nadam": (o.NAdam, {"weight_decay": 0.1}, {"betas": (0.0, 0.999)}),
    "nadam-decoupled": (o.NAdam, {"weight_decay": 0.1, "decoupled_weight_decay": True}, {"betas": (0.0, 0.999)}),
    "sgd": (o.SGD, {"momentum": 0.9, "weight_decay": 0.1}, {"momentum": 0.0}),
    "sgd-nesterov": (o.SGD, {"momentum": 0.9, "nesterov": True}, {"momentum": 0.0, "nesterov": False}),
    "sgd-dampening": (o.SGD, {"momentum": 0.7, "dampening": 0.4}, {"momentum": 0.0}),
    "sgd-maximize": (o.SGD, {"momentum": 0.7, "maximize": True, "weight_decay": 0.1}, {"momentum": 0.0}),
    "sgd-fused": (o.SGD, {"momentum": 0.9, "fused": True}, {"momentum": 0.0}),
    "rmsprop": (o.RMSprop, {"momentum": 0.9, "weight_decay": 0.1, "alpha": 0.9}, {"momentum": 0.0}),
    "rmsprop-centered": (o.RMSprop, {"momentum": 0.5, "centered": True, "alpha": 0.9}, {"momentum": 0.0}),
}
"""A class, its options, and what takes the momentum away. No second moment depends on the first."""


@pytest.mark.parametrize("judged", ["steady", "no-momentum", "step"])
@pytest.mark.parametrize(("cls", "options", "without"), SAME_STATE.values(), ids=SAME_STATE)
def test_of_torch_optimizers(cls: Any, options: dict[str, Any], without: dict[str, Any], judged: str) -> None:
    """What is judged is the step that a twin of the same state, without momentum, would take; both scaled in lr.

    Steady, it is as long as momentum makes it while the gradient stays.
    """
    adds = cls in (o.SGD, o.RMSprop) and judged == "steady"
    gain = (1.0 - options.get("dampening", 0.0)) / (1.0 - options["momentum"]) if adds else 1.0
    params = [nn.Parameter(randn(4, 3, seed=1)), nn.Parameter(randn(5, seed=2))]
    twins = [nn.Parameter(p.detach().clone()) for p in params]
    opt, twin = cls(params, lr=0.03, **options), cls(twins, lr=0.03, **{**options, **without})
    reference = cls([nn.Parameter(p.detach().clone()) for p in params], lr=0.03, **options)
    base = TorchBase(opt, {"lr": Tune()}, {p: str(i) for i, p in enumerate(params)}, assume_linear=True, judged=judged)
    opt.param_groups[0][NUMBER] = 0
    for step in range(8):
        grads = [randn(*p.shape, seed=10 * step + i) for i, p in enumerate(params)]
        followers = reference.param_groups[0]["params"]
        for p, follower, other, grad in zip(params, followers, twins, grads, strict=True):
            p.grad, follower.grad, other.grad = grad.clone(), grad.clone(), grad.clone()
            with torch.no_grad():
                other.copy_(p)
        before = [p.detach().clone() for p in params]
        scale = 0.5 if step % 2 else 1.0
        for group in (*reference.param_groups, *twin.param_groups):
            group["lr"] = 0.03 * scale
        trial = base.trial([{"lr": 0.03 * scale}], judged)
        assert (trial.commit is None) == base.takes(judged)
        (names,) = trial.cuts
        piece = trial.look(names)
        if trial.commit is not None:
            assert all(torch.equal(p, old) for p, old in zip(params, before, strict=True)), "nothing is taken yet"
            trial.commit()
        reference.step()
        twin.step()
        assert [bits(p) for p in params] == [bits(p) for p in followers], "what stays is the bare optimizer's"
        for i, (old, other, new) in enumerate(zip(before, twins, params, strict=True)):
            expected = new.detach() - old if judged == "step" else gain * (other.detach() - old)
            torch.testing.assert_close(piece.delta[str(i)], expected, rtol=1e-9, atol=1e-13)
            assert torch.equal(trial.before[str(i)], old)
        (terms,) = piece.pullback({"0": torch.ones(4, 3, dtype=torch.float64)}).values()
        assert sum(terms).item() == pytest.approx(piece.delta["0"].sum().item(), rel=1e-9)
    assert opt.param_groups[0]["lr"] == 0.03


@pytest.mark.parametrize("cls", [o.Adagrad, o.Adadelta, o.RMSprop, o.SGD])
def test_without_momentum_the_step_itself_is_judged(cls: Any) -> None:
    """Then nothing is swapped: the step that is taken is the step that is judged."""
    param = nn.Parameter(randn(3, seed=1))
    base = TorchBase(cls([param], lr=0.1), {"lr": Tune()}, {param: "p"}, assume_linear=True, judged="no-momentum")
    base.optimizer.param_groups[0][NUMBER] = 0
    param.grad = randn(3, seed=2)
    trial = base.trial([{"lr": 0.1}], "no-momentum")
    assert trial.commit is None
    assert torch.equal(trial.before["p"] + trial.look({"p": None}).delta["p"], param.detach())


def test_an_unknown_optimizer_with_momentum_is_judged_by_its_step_with_a_warning() -> None:
    class Mine(o.SGD):
        pass

    model = net()
    with pytest.warns(UserWarning, match=r"momentum of Mine cannot be told.*lookahead='step'"):
        apo.APO(model, Mine(model.parameters(), lr=0.1, momentum=0.9), F.cross_entropy)
    apo.APO(model, Mine(model.parameters(), lr=0.1), F.cross_entropy)
    step = apo.Proximal(lookahead="step")
    apo.APO(model, Mine(model.parameters(), lr=0.1, momentum=0.9), F.cross_entropy, objective=step)
    apo.APO(model, Mine(model.parameters(), lr=0.1, momentum=0.9), F.cross_entropy, tune={})


class Watch(nn.Module):
    """Keeps the weights that each forward saw."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner
        self.log: list[list[list[Tensor]]] = [[]]  # a list of the module's own would be put back

    @property
    def seen(self) -> list[list[Tensor]]:
        return self.log[0]

    def forward(self, x: Tensor) -> Tensor:
        self.seen.append([p.detach().clone() for p in self.inner.parameters()])
        return self.inner(x)


@pytest.mark.parametrize("build", [lambda m: o.SGD(m.parameters(), lr=0.1, momentum=0.9), lambda m: apo.sgd(0.1, 0.9)])
def test_the_objective_is_evaluated_where_the_step_without_momentum_leads(build: Any) -> None:
    """And the live weights come back exactly; to a rule its gradient still belongs to θ."""
    model = Watch(net(dropout=0.0))
    meta = apo.Gradient(o.SGD, lr=0.0, every=1)
    objective = apo.Proximal(lookahead="no-momentum")
    opt = apo.APO(model, build(model), F.cross_entropy, meta=meta, objective=objective)
    for batch in batches(3):
        opt.zero_grad()
        F.cross_entropy(model(batch[0]), batch[1]).backward()
        old = [p.detach().clone() for p in model.parameters()]
        grads = [p.grad.clone() for p in model.parameters()]
        opt.step(batch=batch)
        for p, g, at in zip(old, grads, model.seen[-1], strict=True):
            torch.testing.assert_close(at, p - 0.1 * g, rtol=1e-6, atol=1e-7)
    assert any(not torch.equal(a, p) for a, p in zip(model.seen[-1], model.parameters(), strict=True))


@pytest.mark.parametrize("meta", [apo.Gradient(o.SGD, lr=1e-3, every=2), apo.Newton(every=2, search=False)])
def test_a_list_of_a_rule_and_a_torch_optimizer(meta: Any) -> None:
    """The same numbers as two torch optimizers in a list."""
    runs = []
    for first in ("rule", "torch"):
        model = net(dropout=0.0).double()
        left, right = list(model[0].parameters()), [*model[1].parameters(), *model[5].parameters()]
        base = (apo.adam(lr=1e-2), left) if first == "rule" else o.Adam(left, lr=1e-2)
        opt = apo.APO(model, [base, o.SGD(right, lr=0.1, momentum=0.9)], F.cross_entropy, meta=meta)
        train(model, opt, batches(9, dtype=torch.float64))
        runs.append((opt.hypers(), [p.detach().clone() for p in model.parameters()]))
    assert runs[0][0].keys() == {"lr/0", "lr/1"}
    assert runs[0][0] == pytest.approx(runs[1][0], rel=1e-7)
    for a, b in zip(runs[0][1], runs[1][1], strict=True):
        torch.testing.assert_close(a, b, rtol=1e-7, atol=1e-9)


def test_a_torch_optimizer_beside_a_rule_whose_eps_alone_is_tuned() -> None:
    """Nothing of the torch optimizer is tuned; it steps as ever, its momentum out of the judgement."""
    model = net(dropout=0.0)
    left, right = list(model[0].parameters()), [*model[1].parameters(), *model[5].parameters()]
    base = [o.SGD(right, lr=0.1, momentum=0.9), (apo.rmsprop(lr=1e-2, eps=1e-2), left)]
    opt = apo.APO(model, base, F.cross_entropy, tune={"eps": "global"}, meta="paper")
    twin = copy.deepcopy(model)
    train(model, opt, batches(1))
    assert set(opt.hypers()) == {"eps"}
    assert opt.hypers()["eps"] != pytest.approx(1e-2, rel=0.01)
    bare = o.SGD([*twin[1].parameters(), *twin[5].parameters()], lr=0.1, momentum=0.9)
    x, y = batches(1)[0]
    F.cross_entropy(twin(x), y).backward()
    bare.step()
    assert weights(twin[5]) == weights(model[5])


@pytest.mark.parametrize(
    ("build", "gain"),
    [
        (lambda m: o.SGD(m.parameters(), lr=0.1, momentum=0.9), 10.0),
        (lambda m: o.SGD(m.parameters(), lr=0.1, momentum=0.8, nesterov=True), 5.0),
        (lambda m: o.RMSprop(m.parameters(), lr=1e-2, momentum=0.9), 10.0),
        (lambda m: apo.sgd(lr=0.1, momentum=0.9), 10.0),
        (lambda m: apo.sgd(lr=0.1, momentum=0.9, dampening=0.5), 5.0),
        (lambda m: o.AdamW(m.parameters(), lr=1e-2), 1.0),
        (lambda m: o.NAdam(m.parameters(), lr=1e-2), 1.0),
        (lambda m: o.Adamax(m.parameters(), lr=1e-2), 1.0),
        (lambda m: apo.adamw(lr=1e-2), 1.0),
        (lambda m: apo.apollo(lr=0.1), 1.0),
    ],
)
def test_by_default_the_step_is_as_long_as_momentum_makes_it(build: Any, gain: float) -> None:
    """Without its length, SGD's learning rate would come out 1 / (1 − μ) times too long; averages keep the length."""
    slopes = {}
    for lookahead in (None, "no-momentum", "step"):
        model = net(dropout=0.0)
        objective = apo.Proximal(lookahead=lookahead) if lookahead else None
        meta = apo.Gradient(o.SGD, lr=0.0, every=1)
        opt = apo.APO(model, build(model), F.cross_entropy, meta=meta, objective=objective)
        for batch in batches(4):
            opt.zero_grad()
            F.cross_entropy(model(batch[0]), batch[1]).backward()
            opt.step(batch=batch)
        slopes[lookahead] = opt.record.column("slope")
    assert slopes["no-momentum"] != slopes["step"]
    assert slopes[None] == pytest.approx([gain * slope for slope in slopes["no-momentum"]], rel=1e-6)


def test_gradients_that_a_hook_changes_after_the_judgement_are_told_of() -> None:
    """A pre-hook of the base optimizer comes too late; one that only looks on is no matter."""
    for change, warned in ((0.5, True), (None, False)):

        def hook(optimizer: Any, args: Any, kwargs: Any, change: float | None = change) -> None:
            for param in optimizer.param_groups[0]["params"]:
                param.grad.mul_(change) if change else param.grad.abs()

        model = net()
        base = o.AdamW(model.parameters(), lr=1e-3)
        base.register_step_pre_hook(hook)
        opt = apo.APO(model, base, F.cross_entropy, meta=apo.Newton(search=False))
        (batch,) = batches(1)
        backward(model, batch)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            opt.step(batch=batch)
        assert any("pre-hook of AdamW changes gradients" in str(w.message) for w in caught) == warned


@pytest.mark.filterwarnings("ignore:Using backward")
def test_gradients_that_carry_a_graph() -> None:
    model = net(dropout=0.0)
    opt = apo.APO(model, o.AdamW(model.parameters(), lr=1e-3), F.cross_entropy, meta=apo.Newton(every=1))
    for x, y in batches(3):
        opt.zero_grad()
        F.cross_entropy(model(x), y).backward(create_graph=True)
        opt.step(batch=(x, y))
    assert len(opt.record) == 3


def test_the_state_of_a_group_without_gradients_does_not_depend_on_what_is_judged() -> None:
    """A rule that counts its calls is called for every group, at a meta-step and between."""

    class State(NamedTuple):
        calls: Tensor

    def step(params: Any, grads: Any, state: State, hypers: Any) -> Any:
        return {n: p - hypers.lr * grads[n] if n in grads else p for n, p in params.items()}, State(state.calls + 1.0)

    sgd = apo.sgd(lr=0.1)
    rule = sgd._replace(init=lambda params: State(torch.zeros(())), step=step, without_momentum=None)
    model = net(dropout=0.0)
    opt = apo.APO(model, [(rule, [*model[0].parameters()])], F.cross_entropy, meta=apo.Newton(every=2))
    opt.add_param_group({"params": [*model[5].parameters()]})
    for batch in batches(6):
        opt.zero_grad()
        backward(model, batch)
        for param in model[5].parameters():
            param.grad = None
        opt.step(batch=batch)
    assert [opt.state[group["params"][0]]["calls"].item() for group in opt.param_groups] == [6.0, 6.0]
