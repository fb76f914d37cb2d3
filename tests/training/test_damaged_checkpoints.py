"""A checkpoint that is damaged or does not fit is refused by name, and nothing of it is loaded."""

import copy
import json
from collections.abc import Callable
from typing import Any

import pytest
import torch

import apo
from tests.shell.helpers import everything
from tests.training.checkpointing import CASES, GRADIENT, Run, data, run
from tests.training.models import TASKS, loss, made

o = torch.optim
LIST, RULE = CASES[3], CASES[7]
Damage = Callable[[dict[str, Any]], Any]


def numbers(change: Callable[[dict[str, Any]], Any]) -> Damage:
    """Damage to the tuning's numbers."""

    def damage(saved: dict[str, Any]) -> None:
        for group in saved["param_groups"]:
            found = json.loads(group["apo/numbers"])
            change(found)
            group["apo/numbers"] = json.dumps(found)

    return damage


def text(new: Any) -> Damage:
    return lambda saved: [group.update({"apo/numbers": new}) for group in saved["param_groups"]]


def options(**new: Any) -> Damage:
    return lambda saved: saved["param_groups"][-1].update(new)


def entry(saved: dict[str, Any]) -> dict[str, Any]:
    return saved["state"][max(saved["state"])]


DAMAGES: dict[str, tuple[Damage, str]] = {
    "newer": (lambda saved: saved["param_groups"][-1].update({"apo/format": 2}), "format 2, newer than 1: update apo"),
    "format-text": (lambda saved: saved["param_groups"][0].update({"apo/format": "1"}), "format '1', which is no num"),
    "no-groups": (lambda saved: saved.pop("param_groups"), "no optimizer's state dict: it has no 'param_groups'"),
    "no-state": (lambda saved: saved.pop("state"), "no optimizer's state dict: it has no 'state'"),
    "empty": (lambda saved: saved.clear(), "{} is no optimizer's state dict"),
    "group-text": (lambda saved: saved["param_groups"].__setitem__(0, "lr"), "the checkpoint's group 'lr' has no list"),
    "no-params": (lambda saved: saved["param_groups"][0].pop("params"), "has no list of 'params'"),
    "fewer-params": (lambda saved: saved["param_groups"][-1]["params"].pop(), "the checkpoint has groups of"),
    "fewer-groups": (lambda saved: saved["param_groups"].pop(), "the checkpoint has groups of"),
    "no-lr": (lambda saved: saved["param_groups"][-1].pop("lr"), "the checkpoint's groups lack 'lr'"),
    "state-number": (lambda saved: saved["state"].update({max(saved["state"]): 3}), "state of parameter .* is 3, not"),
    "cut-off": (
        lambda saved: [g.update({"apo/numbers": g["apo/numbers"][:-9]}) for g in saved["param_groups"]],
        "apo/numbers cannot be read",
    ),
    "no-text": (text(3.0), "apo/numbers cannot be read"),
    "no-object": (text("[1, 2]"), r"apo/numbers is \[1, 2\], not numbers by name"),
    "none-left": (text("{}"), "apo/numbers is {}, not numbers by name"),
    "count-missing": (numbers(lambda found: found.pop("counted")), "the checkpoint's tuning lacks 'counted'"),
    "watch-missing": (numbers(lambda found: found.pop("watch/mean")), "lacks 'watch/mean'"),
    "average-missing": (numbers(lambda found: found.pop("newton/slope")), "lacks 'newton/slope'"),
    "search-missing": (numbers(lambda found: found.pop("searched")), "lacks 'searched'"),
    "count-text": (numbers(lambda found: found.update(steps="3")), "the checkpoint's steps='3' is not a number"),
    "count-float": (numbers(lambda found: found.update(steps=3.5)), "the checkpoint's steps=3.5 is not a count"),
    "count-negative": (numbers(lambda found: found.update(counted=-1)), "counted=-1 is not a count"),
    "count-huge": (numbers(lambda found: found.update(steps=10**400)), "steps=1000.* is not a number"),
    "count-null": (numbers(lambda found: found.update(skipped=None)), "skipped=None is not a number"),
    "count-bool": (numbers(lambda found: found.update(frozen=True)), "frozen=True is not a number"),
    "average-nan": (
        numbers(lambda found: found.update({"newton/slope": float("nan")})),
        "newton/slope=nan is not fini",
    ),
    "offset-text": (
        numbers(lambda found: found.update({n: "far" for n in found if n.startswith("offset/")})),
        "offset/.*='far' is not a number",
    ),
    "offset-far": (
        numbers(lambda found: found.update({n: 1e9 for n in found if n.startswith("offset/")})),
        r"offset/.*=1000000000.0 is not within \(-500, 500\)",
    ),
    "meta-state-list": (
        numbers(lambda found: found.update({n: [1] for n in found if n.startswith("gradient/")})),
        r"gradient/.*=\[1\] is not a number",
    ),
    "lr-negative": (options(lr=-1.0), "lr=-1.0 is not in"),
    "lr-nan": (options(lr=float("nan")), "lr=nan is not in"),
    "lr-text": (options(lr="fast"), "lr must be a float, not 'fast'"),
}
every_damage = pytest.mark.parametrize("damage", DAMAGES)


@pytest.fixture(scope="module", params=[LIST, RULE], ids=["list", "rule"])
def trained(request: pytest.FixtureRequest) -> Run:
    each = run(request.param)
    each.train(data(request.param, 6))
    return each


@every_damage
def test_damage_is_named_and_nothing_is_loaded(trained: Run, damage: str) -> None:
    saved = copy.deepcopy(trained.opt.state_dict())
    for group in saved["param_groups"]:
        group["weight_decay"] = 0.5  # would be seen if it were loaded
    do, message = DAMAGES[damage]
    do(saved)
    before = everything(trained.model, trained.opt)
    for keep in (False, True):
        if keep and damage.startswith(("lr-", "offset", "average")):
            continue  # what is kept of this optimizer's is not read
        with pytest.raises((ValueError, TypeError), match=message):
            trained.opt.load_state_dict(saved, keep_hypers=keep)
        assert everything(trained.model, trained.opt) == before


@pytest.mark.parametrize("saved", [None, 3, "state", [], torch.zeros(2)])
def test_what_is_no_state_dict_is_refused(trained: Run, saved: Any) -> None:
    with pytest.raises(ValueError, match="is no optimizer's state dict: it has no 'state'"):
        trained.opt.load_state_dict(saved)


def test_a_rules_state_of_other_shapes_is_refused() -> None:
    trained = run(RULE)
    trained.train(data(RULE, 2))
    saved = copy.deepcopy(trained.opt.state_dict())
    first = saved["state"][0]
    field = next(name for name, value in first.items() if value.ndim)
    for wrong, what in ((torch.zeros(2, 3, 5), r"of shape \(2, 3, 5\)"), (1.0, "1.0")):
        first[field] = wrong
        before = everything(trained.model, trained.opt)
        with pytest.raises(ValueError, match=f"the checkpoint's {field} of .* is {what}"):
            trained.opt.load_state_dict(saved)
        assert everything(trained.model, trained.opt) == before


def test_a_base_that_fails_to_load_takes_back_those_before_it() -> None:
    class Failing(o.SGD):
        def load_state_dict(self, state_dict: Any) -> None:
            super().load_state_dict(state_dict)
            raise RuntimeError("no room")

    model = made(TASKS[0])
    params = list(model.parameters())
    opt = apo.APO(model, [o.AdamW(params[:4]), Failing(params[4:], lr=0.1)], loss, assume_linear=True, meta=GRADIENT)
    saved = copy.deepcopy(opt.state_dict())
    for group in saved["param_groups"]:
        group["lr"] = 7.0
    before = everything(model, opt)
    with pytest.raises(RuntimeError, match="no room"):
        opt.load_state_dict(saved)
    assert everything(model, opt) == before
