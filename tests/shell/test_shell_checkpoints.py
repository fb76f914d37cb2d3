"""Training goes on from a checkpoint, or in a copy, bit for bit."""

import copy
import io
import json
import pickle
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import apo
from tests.shell.helpers import (
    TORCH_BASES,
    Base,
    batches,
    everything,
    matrices,
    net,
    state,
    traces,
    train,
    vectors,
    weights,
)

o = torch.optim
pytestmark = pytest.mark.filterwarnings("ignore:the momentum of Muon")


def rule_and_torch(model: nn.Module) -> Any:
    return [(apo.rmsprop(lr=1e-2, bias_correction=True), matrices(model)), o.SGD(vectors(model), lr=0.1, momentum=0.9)]


BASES = [
    TORCH_BASES[1],
    TORCH_BASES[2],
    TORCH_BASES[4],
    TORCH_BASES[6],
    Base("rule-adamw", lambda _: apo.adamw(lr=1e-2)),
    Base("rule-apollo", lambda _: apo.apollo(lr=0.1)),
    Base("rule-sgd", lambda _: apo.sgd(lr=0.1, momentum=0.9, nesterov=True)),
    Base("rule-and-torch", rule_and_torch),
]
every_base = pytest.mark.parametrize("base", BASES, ids=[base.name for base in BASES])
METAS: dict[str, Any] = {
    "newton": apo.Newton(every=3),
    "rmsprop": apo.Gradient(o.RMSprop, lr=0.1, every=3),
    "adam": apo.Gradient(o.Adam, lr=0.1, every=3),
    "momentum": apo.Gradient(o.SGD, lr=0.1, momentum=0.9, every=3),
}
every_meta = pytest.mark.parametrize("meta", METAS.values(), ids=METAS)
Pair = tuple[nn.Module, apo.APO]


def pair(base: Base, **options: Any) -> Pair:
    model = net()
    return model, apo.APO(model, base.build(model), F.cross_entropy, **options)


def through_a_file(state_dict: Any) -> Any:
    """What `torch.load` makes of it with weights only."""
    file = io.BytesIO()
    torch.save(state_dict, file)
    return torch.load(io.BytesIO(file.getvalue()), weights_only=True)


def on(model: nn.Module, opt: apo.APO, data: Any) -> list[Any]:
    """Everything after some more steps, and the rows of their meta-steps."""
    rows = len(opt.record)
    torch.manual_seed(7)
    train(model, opt, data)
    return [weights(model), traces(model), state(model, [opt]), opt.hypers(), list(opt.record)[rows:]]


@pytest.mark.parametrize("by", ["global", "layer"])
@every_meta
@every_base
def test_a_resumed_run_is_the_run(base: Base, meta: Any, by: str) -> None:
    """Stopped between meta-steps, and resumed in another optimizer with other learning rates."""
    data = batches(14)
    options: dict[str, Any] = {"meta": meta, "tune": {"lr": by}}
    model, opt = pair(base, **options)
    train(model, opt, data[:5])
    twin, other = pair(base, **options)
    for group in other.param_groups:
        group["lr"] *= 3.0
    saved = through_a_file({"model": model.state_dict(), "opt": opt.state_dict()})
    twin.load_state_dict(saved["model"])
    other.load_state_dict(saved["opt"])
    assert other.hypers() == opt.hypers()
    if by == "global":
        assert other.hypers()["lr" if "lr" in other.hypers() else "lr/0"] == pytest.approx(
            other.param_groups[0]["effective_lr"], rel=1e-12
        )
    left, right = on(model, opt, data[5:]), on(twin, other, data[5:])
    assert left == right
    assert left[-1], "meta-steps follow"


def test_the_order_of_tune_does_not_matter() -> None:
    data = batches(8)
    runs = []
    for names in (("lr", "rho", "eps"), ("eps", "lr", "rho")):
        model = net()
        tune = dict.fromkeys(names, "parameter")
        opt = apo.APO(model, apo.rmsprop(lr=1e-2), F.cross_entropy, tune=tune, meta=METAS["adam"])
        if runs:
            model.load_state_dict(runs[0][0])
            opt.load_state_dict(runs[0][1])
        else:
            train(model, opt, data[:4])
            runs.append(copy.deepcopy((model.state_dict(), opt.state_dict())))
        runs.append(on(model, opt, data[4:])[:4])
    assert runs[1] == runs[2]


@every_base
def test_loading_ones_own_state_before_the_first_step_changes_nothing(base: Base) -> None:
    data = batches(7)
    runs = []
    for loading in (False, True):
        model, opt = pair(base)
        if loading:
            opt.load_state_dict(through_a_file(opt.state_dict()))
        runs.append(on(model, opt, data))
    assert runs[0] == runs[1]


def test_only_plain_numbers_beside_the_bases_own_state() -> None:
    model, opt = pair(BASES[0], meta=METAS["adam"], tune={"lr": "layer"})
    train(model, opt, batches(5))
    for group in opt.state_dict()["param_groups"]:
        assert group["apo/format"] == 1
        for name, value in group.items():
            if name.startswith("apo/") or name in ("lr_factor", "effective_lr"):
                assert type(value) in (int, float, str), name
        assert all(type(number) in (int, float) for number in json.loads(group["apo/numbers"]).values())
    assert all(group["apo/numbers"] == "" for group in opt.param_groups), "live groups keep none"


@pytest.mark.parametrize("base", [b for b in BASES if not b.name.startswith("rule")], ids=lambda base: base.name)
def test_a_bare_checkpoint_loads(base: Base) -> None:
    """And the tuning starts afresh, whatever this one had tuned before."""
    data = batches(6)
    model = net()
    built = base.build(model)
    bares = built if isinstance(built, list) else [built]
    for x, y in data[:3]:
        model.zero_grad()
        F.cross_entropy(model(x), y).backward()
        for b in bares:
            b.step()
    twin, opt = pair(base)
    train(twin, opt, data[3:])
    if len(bares) == 1:
        opt.load_state_dict(through_a_file(bares[0].state_dict()))
        assert state(twin, [opt]) == state(model, bares)
        assert opt.due
        assert all(group["lr_factor"] == 1.0 for group in opt.param_groups)
        train(twin, opt, data[:1])
        assert opt.record[-1]["step"] == 0.0


def test_a_shells_checkpoint_loads_into_the_bare_optimizer() -> None:
    model, opt = pair(BASES[1])
    train(model, opt, batches(3))
    bare = o.AdamW(net().parameters(), lr=1.0)
    bare.load_state_dict(opt.state_dict())
    assert bare.param_groups[0]["lr"] == 1e-2


def test_a_newer_format_is_refused() -> None:
    model, opt = pair(BASES[0])
    saved = opt.state_dict()
    saved["param_groups"][0]["apo/format"] = 2
    before = everything(model, opt)
    with pytest.raises(ValueError, match="format 2, newer than 1: update apo"):
        opt.load_state_dict(saved)
    assert everything(model, opt) == before


@every_base
def test_groups_that_do_not_fit_are_refused_with_nothing_applied(base: Base) -> None:
    model, opt = pair(base)
    train(model, opt, batches(2))
    before = everything(model, opt)
    saved = copy.deepcopy(opt.state_dict())
    saved["param_groups"][-1]["params"].pop()
    with pytest.raises(ValueError, match=r"the checkpoint has groups of \[.*\] parameters, this optimizer has"):
        opt.load_state_dict(saved)
    saved["param_groups"].append(saved["param_groups"][0])
    with pytest.raises(ValueError, match="the checkpoint has groups of"):
        opt.load_state_dict(saved)
    assert everything(model, opt) == before


def test_a_checkpoint_of_another_rule_is_refused_with_nothing_applied() -> None:
    model, opt = pair(Base("adam", lambda _: apo.adam(lr=1e-2)))
    train(model, opt, batches(2))
    bare = o.Adam(net().parameters())
    before = everything(model, opt)
    with pytest.raises(ValueError, match=r"the checkpoint's groups lack 'beta1', .*of another optimizer"):
        opt.load_state_dict(bare.state_dict())
    assert everything(model, opt) == before


def test_restored_hyperparameters_win_unless_kept() -> None:
    model, opt = pair(BASES[0])
    train(model, opt, batches(5))
    saved = copy.deepcopy(opt.state_dict())
    for keep in (False, True):
        twin, other = pair(Base("sgd", lambda m: o.SGD(m.parameters(), lr=3.0, momentum=0.5)))
        other.load_state_dict(saved, keep_hypers=keep)
        assert other.hypers() == ({"lr": 3.0} if keep else opt.hypers())
        assert other.param_groups[0]["momentum"] == (0.5 if keep else 0.9)
        assert state(twin, [other]) == state(model, [opt])


def test_kept_hyperparameters_are_judged_in_their_own_units() -> None:
    """Averages of slopes are per unit of the factor on the learning rate; another learning rate has other units."""
    model = nn.Linear(6, 3)
    meta = apo.Newton(every=1, search=False, growth=100.0)
    opt = apo.APO(model, o.SGD(model.parameters(), lr=1e-3), F.cross_entropy, meta=meta)
    for batch in batches(30):
        train(model, opt, [batch])
    best = opt.hypers()["lr"]
    other = apo.APO(model, o.SGD(model.parameters(), lr=best), F.cross_entropy, meta=meta)
    other.load_state_dict(opt.state_dict(), keep_hypers=True)
    train(model, other, batches(20, seed=9))
    assert best / 4 < other.hypers()["lr"] < 4 * best


@pytest.mark.parametrize("after", [0, 2, 3, 4])
@pytest.mark.parametrize("how", ["deepcopy", "pickle"])
@every_base
def test_a_copy_goes_on(base: Base, how: str, after: int) -> None:
    """Of (model, optimizer), at any call: before a meta-step it holds the noise of the forwards to come."""
    data = batches(10)
    model, opt = pair(base, meta=METAS["newton"], objective=apo.Proximal(fsd=0.5))
    train(model, opt, data[:after])
    opt.zero_grad()
    twin, other = copy.deepcopy((model, opt)) if how == "deepcopy" else pickle.loads(pickle.dumps((model, opt)))
    assert all(p in set(twin.parameters()) for group in other.param_groups for p in group["params"])
    assert other.due == opt.due
    left, right = on(model, opt, data[after:]), on(twin, other, data[after:])
    assert left == right
    assert opt.record.rows == other.record.rows


def test_a_copy_under_a_scheduler_steps_itself() -> None:
    model, opt = pair(BASES[0])
    scheduler = o.lr_scheduler.StepLR(opt, 5)
    train(model, opt, batches(2))
    twin, other = copy.deepcopy((model, opt))
    before = weights(model)
    train(twin, other, batches(1))
    assert weights(model) == before
    assert weights(twin) != before
    scheduler.step()


def test_a_copy_of_the_model_alone_is_a_model() -> None:
    """It takes no optimizer along, and its forwards are no one's."""
    model, opt = pair(BASES[0])
    plain = len(pickle.dumps(net()))
    train(model, opt, batches(2))
    assert len(pickle.dumps(model)) < plain + 1000
    twin = copy.deepcopy(model)
    train(model, opt, batches(1))
    for _ in range(3):
        twin(batches(1)[0][0])
    recorders = [hook.__self__ for hook in (*twin._forward_pre_hooks.values(), *twin._forward_hooks.values())]
    assert all(not recorder.seen and not recorder.armed for recorder in recorders)
    assert model.state_dict().keys() == twin.state_dict().keys() == net().state_dict().keys()


def test_an_optimizer_that_is_gone_leaves_nothing_on_the_model() -> None:
    model = net()
    for _ in range(3):
        opt = apo.APO(model, o.SGD(model.parameters(), lr=0.1), F.cross_entropy)
        train(model, opt, batches(2))
    assert len(model._forward_pre_hooks) == len(model._forward_hooks) == 1
    del opt
    assert not model._forward_pre_hooks
    assert not model._forward_hooks
