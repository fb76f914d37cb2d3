"""What moves: bounds, groups and their ratios, new groups, and schedulers' own numbers."""

import itertools
import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import apo
from tests.shell.helpers import backward, batches, matrices, net, train, vectors, weights

o = torch.optim
FAST = apo.Gradient(o.SGD, lr=3.0, every=1)


def grouped(model: nn.Module) -> torch.optim.Optimizer:
    return o.SGD(
        [{"params": matrices(model)}, {"params": vectors(model), "lr": 0.01}, {"params": [], "lr": 0.5}], lr=0.1
    )


@pytest.mark.parametrize("meta", ["newton", FAST])
def test_one_factor_keeps_the_ratios_of_groups(meta: Any) -> None:
    model = net()
    opt = apo.APO(model, grouped(model), F.cross_entropy, meta=meta)
    assert opt.hypers() == {"lr/0": 0.1, "lr/1": 0.01, "lr/2": 0.5}
    train(model, opt, batches(15))
    tuned = opt.hypers()
    assert tuned["lr/0"] != pytest.approx(0.1, rel=0.01)
    assert tuned["lr/0"] == pytest.approx(10 * tuned["lr/1"], rel=1e-12)
    assert [group["lr"] for group in opt.param_groups] == [0.1, 0.01, 0.5]
    assert all(type(group[name]) is float for group in opt.param_groups for name in ("lr_factor", "effective_lr"))


def test_a_group_at_zero_stays_there() -> None:
    """And does not hold back the others."""
    model = net()
    base = o.SGD([{"params": matrices(model)}, {"params": vectors(model), "lr": 0.0}], lr=1e-3)
    opt = apo.APO(model, base, F.cross_entropy)
    still = [p.detach().clone() for p in vectors(model)]
    train(model, opt, batches(5))
    assert opt.hypers()["lr/1"] == 0.0
    assert opt.hypers()["lr/0"] > 2e-3
    assert all(torch.equal(a, b) for a, b in zip(still, vectors(model), strict=True))


@pytest.mark.parametrize("by", ["global", "group", "layer"])
def test_bounds(by: str) -> None:
    """Every value within [low, high]; with one factor, that of every group."""
    for low, high in ((None, 0.11), (0.0095, None)):
        model = net()
        tune = {"lr": apo.Tune(by, low=low, high=high)}
        sign = -1.0 if high else 1.0
        meta = apo.Gradient(o.SGD, lr=1e4, every=1, maximize=sign > 0)
        base = o.SGD([{"params": matrices(model)}, {"params": vectors(model), "lr": 0.01}], lr=0.1)
        opt = apo.APO(model, base, F.cross_entropy, tune=tune, meta=meta)
        train(model, opt, batches(4))
        values = opt.hypers().values()
        bound = high or low
        assert all(v <= bound * (1 + 1e-12) if high else v >= bound * (1 - 1e-12) for v in values)
        assert any(v == pytest.approx(bound, rel=1e-9) for v in values)


@pytest.mark.parametrize("meta", [apo.Newton(every=1, growth=100.0, shrink=100.0, search=False), FAST])
def test_the_largest_change(meta: Any) -> None:
    """Of every meta-step, either way."""
    for start in (1e-3, 10.0):
        model = net()
        tune = {"lr": apo.Tune(max_change=1.25)}
        opt = apo.APO(model, o.SGD(model.parameters(), lr=start), F.cross_entropy, tune=tune, meta=meta)
        train(model, opt, batches(6))
        rates = [start, *opt.record.column("lr")]
        changes = [abs(math.log(b / a)) for a, b in itertools.pairwise(rates)]
        assert max(changes) <= math.log(1.25) * (1 + 1e-9)
        assert max(changes) > 0.9 * math.log(1.25) or meta is FAST


def test_growth_and_shrink_of_newton() -> None:
    for start, bound in ((1e-4, 1.3), (1e3, 1 / 2.5)):
        model = nn.Linear(6, 3)
        meta = apo.Newton(every=1, growth=1.3, shrink=2.5, search=False, backtrack=False)
        opt = apo.APO(model, o.SGD(model.parameters(), lr=start), lambda z, _: z.square().mean(), meta=meta)
        ((x, y),) = batches(1)
        model(x).square().mean().backward()
        opt.step(batch=(x, y))
        assert opt.hypers()["lr"] / start == pytest.approx(bound, rel=1e-9)


def test_the_clip_of_a_meta_gradient() -> None:
    model = net()
    meta = apo.Gradient(o.SGD, lr=1.0, every=1, clip=1e-3)
    opt = apo.APO(model, o.SGD(model.parameters(), lr=0.1), F.cross_entropy, meta=meta)
    train(model, opt, batches(1))
    assert abs(math.log(opt.hypers()["lr"] / 0.1)) == pytest.approx(1e-3, rel=1e-6)


def test_what_is_not_lr_moves_beside_newton() -> None:
    """At the same meta-steps, by the paper's meta-optimizer."""
    model = net()
    tune = {"lr": "global", "rho": "global", "eps": "global"}
    meta = apo.Newton(every=4, search=False)
    opt = apo.APO(model, apo.rmsprop(lr=1e-2, eps=1e-3), F.cross_entropy, tune=tune, meta=meta)
    start = opt.hypers()
    train(model, opt, batches(1))
    first = opt.hypers()
    assert abs(math.log(first["rho"] / start["rho"])) == pytest.approx(math.log(1.02)), "an exponent moves slowly"
    assert abs(math.log(first["eps"] / start["eps"])) == pytest.approx(1.0, rel=1e-2), "RMSprop's first step"
    assert first["lr"] / start["lr"] in (pytest.approx(1.1), pytest.approx(0.25)) or 0.25 < first["lr"] / 1e-2 < 1.1
    train(model, opt, batches(3))
    assert opt.hypers() == first


@pytest.mark.parametrize("on", ["shell", "base"])
@pytest.mark.parametrize("by", ["global", "group", "parameter"])
def test_a_group_added_later_is_tuned_with_the_others(by: str, on: str) -> None:
    model = net()
    base = o.SGD(matrices(model), lr=0.1, momentum=0.5)
    opt = apo.APO(model, base, F.cross_entropy, tune={"lr": by}, meta=apo.Gradient(o.RMSprop, lr=0.1, every=1))
    train(model, opt, batches(3))
    before = opt.hypers()
    added = {"params": vectors(model), "lr": 0.02}
    (opt if on == "shell" else base).add_param_group(added)
    known = {label: value for label, value in opt.hypers().items() if label in before}
    assert all(a is b for a, b in zip(opt.param_groups, base.param_groups, strict=True))
    if by != "global":
        assert known == before
    new = opt.hypers()
    late = vectors(model)[1:]  # a bias before BatchNorm has no gradient but rounding
    still = [p.detach().clone() for p in late]
    train(model, opt, batches(3))
    assert all(not torch.equal(a, b) for a, b in zip(still, late, strict=True))
    assert all(opt.hypers()[label] != value for label, value in new.items() if label != "lr/0.bias")
    if by == "global":
        assert new["lr/1"] / new["lr/0"] == pytest.approx(0.2, rel=1e-9)


def test_a_group_for_one_of_several_bases_goes_to_that_base() -> None:
    model = net()
    first, second = o.SGD(matrices(model)[:1], lr=0.1), o.SGD(vectors(model), lr=0.2)
    opt = apo.APO(model, [first, second], F.cross_entropy, meta="paper")
    with pytest.raises(ValueError, match="several base optimizers: call add_param_group of the one it belongs to"):
        opt.add_param_group({"params": matrices(model)[1:]})
    second.add_param_group({"params": matrices(model)[1:]})
    train(model, opt, batches(2))
    assert len(opt.param_groups) == 3
    assert second.param_groups[1]["lr_factor"] == first.param_groups[0]["lr_factor"]


def test_a_rule_takes_groups_of_its_own_values() -> None:
    model = net()
    base = (apo.adam(lr=1e-2), [{"params": matrices(model)}, {"params": vectors(model), "lr": 1e-3, "eps": 1e-4}])
    opt = apo.APO(model, [base], F.cross_entropy, tune={"lr": "group", "eps": "group"}, meta="paper")
    train(model, opt, batches(1))
    assert set(opt.hypers()) == {"lr/0", "lr/1", "eps/0", "eps/1"}


@pytest.mark.parametrize("per", ["parameter", "global"])
def test_a_chain_that_clips_is_tuned_as_clipped_gradients_are(per: Any) -> None:
    """In float64, as if torch had clipped every gradient before the step."""
    ends = {}
    for name in ("chain", "torch", "neither"):
        model = net(dropout=0.0).double()
        rule = apo.apollo(lr=0.1)
        rule = apo.chain(apo.clip_by_norm(0.05, per=per), rule) if name == "chain" else rule
        opt = apo.APO(model, rule, F.cross_entropy, meta=apo.Gradient(o.SGD, lr=1.0, every=2))
        for batch in batches(12, dtype=torch.float64):
            opt.zero_grad()
            backward(model, batch)
            parts = [[p] for p in model.parameters()] if per == "parameter" else [list(model.parameters())]
            for part in parts if name == "torch" else []:
                nn.utils.clip_grad_norm_(part, 0.05)
            opt.step(batch=batch)
        ends[name] = torch.cat(
            [torch.tensor([opt.hypers()["lr"]]), *(p.detach().reshape(-1) for p in model.parameters())]
        )
    torch.testing.assert_close(ends["chain"], ends["torch"], rtol=1e-4, atol=1e-5)
    assert ends["chain"][0] != pytest.approx(0.1, rel=1e-3)
    assert (ends["chain"] - ends["neither"]).abs().max() > 1e-2


@pytest.mark.parametrize("make", [lambda m: o.AdamW(m.parameters(), lr=0.01), lambda m: apo.adamw(lr=0.01)])
def test_a_schedulers_number_stays_its_own(make: Any) -> None:
    """OneCycleLR and chained schedulers see only what they wrote; hypers() is apart from them."""
    model = net()
    opt = apo.APO(model, make(model), F.cross_entropy, meta=apo.Newton(every=2))
    lonely = o.AdamW(net().parameters(), lr=0.01)
    chains = [
        o.lr_scheduler.SequentialLR(
            opt_,
            [o.lr_scheduler.LinearLR(opt_, 0.1, total_iters=4), o.lr_scheduler.CosineAnnealingLR(opt_, 8)],
            milestones=[4],
        )
        for opt_ in (opt, lonely)
    ]
    for batch in batches(10):
        assert opt.param_groups[0]["lr"] == lonely.param_groups[0]["lr"]
        factor = opt.hypers()["lr"] / 0.01
        expected = opt.param_groups[0]["lr"] * factor
        train(model, opt, [batch])
        lonely.step()
        if opt.record[-1]["scale"] == 1.0:
            assert opt.param_groups[0]["effective_lr"] == pytest.approx(expected, rel=1e-9)
        for chain in chains:
            chain.step()


def test_a_step_hook_and_the_defaults_are_those_of_an_optimizer() -> None:
    model, calls = net(), []
    base = o.SGD(model.parameters(), lr=0.1, momentum=0.9)
    opt = apo.APO(model, base, F.cross_entropy, meta="paper")
    assert opt.defaults is base.defaults
    opt.register_step_pre_hook(lambda *_: calls.append("before"))
    opt.register_step_post_hook(lambda *_: calls.append("after"))
    base.register_step_post_hook(lambda *_: calls.append("base"))
    train(model, opt, batches(1))
    assert calls == ["before", "base", "after"]
    assert opt.state is base.state
    one_cycle = o.lr_scheduler.OneCycleLR(opt, max_lr=0.1, total_steps=10)
    train(model, opt, batches(1))
    one_cycle.step()
    assert base.param_groups[0]["momentum"] != 0.9


def test_each_base_of_a_list_keeps_a_state_of_its_own() -> None:
    """It can be saved and copied by itself, as its owner may."""
    model = net()
    first, second = o.Adam(matrices(model), lr=0.1), o.Adam(vectors(model), lr=0.2)
    opt = apo.APO(model, [first, second], F.cross_entropy, meta="paper")
    train(model, opt, batches(2))
    assert len(second.state_dict()["state"]) == len(vectors(model))
    assert all(p in opt.state and opt.state[p] for p in model.parameters())
    assert opt.state[vectors(model)[0]] is second.state[vectors(model)[0]]


def test_an_offset_that_explodes_leaves_numbers_finite() -> None:
    """A meta learning rate that is absurd: the learning rate stays a number, and the loop goes on."""
    for sign in (False, True):
        model = net()
        meta = apo.Gradient(o.SGD, lr=1e6, every=1, maximize=sign)
        opt = apo.APO(model, o.SGD(model.parameters(), lr=1e-3), F.cross_entropy, meta=meta)
        for batch in batches(3):
            opt.zero_grad()
            backward(model, batch)
            opt.step(batch=batch)
            assert 0.0 < opt.hypers()["lr"] < math.inf
            with torch.no_grad():
                for p in model.parameters():
                    p.nan_to_num_(0.0, 0.0, 0.0).clamp_(-1.0, 1.0)


def test_the_same_parameter_in_a_later_group_of_another_base() -> None:
    """Refused at the next call, again and again."""
    model = net()
    first, second = o.SGD(matrices(model), lr=0.1), o.Adam(vectors(model))
    opt = apo.APO(model, [first, second], F.cross_entropy)
    second.add_param_group({"params": matrices(model)[:1]})
    backward(model, batches(1)[0])
    before = weights(model)
    for _ in range(2):
        with pytest.raises(ValueError, match=r"0.weight is in more than one group; give it to one optimizer"):
            opt.step(batch=batches(1)[0])
    assert weights(model) == before
