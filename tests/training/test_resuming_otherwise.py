"""Resumed into something else than was saved: another dtype, granularity, `every`, a group more; and with hooks."""

import copy
from typing import Any

import pytest
import torch

import apo
from tests.shell.helpers import everything, state, weights
from tests.training.checkpointing import CASES, GRADIENT, NEWTON, data, run, through_a_file

o = torch.optim
ADAMW = CASES[2]


def saved_run(**options: Any) -> tuple[Any, dict[str, Any]]:
    first = run(ADAMW, **options)
    first.train(data(ADAMW, 6))
    return first, through_a_file(first.checkpoint())


def test_another_granularity_starts_from_the_mean() -> None:
    first, saved = saved_run()
    fine = run(ADAMW, tune={"lr": "layer"}, meta=GRADIENT)
    fine.resume(saved)
    assert list(fine.opt.hypers().values()) == pytest.approx([first.opt.hypers()["lr"]] * len(fine.opt.hypers()))
    assert len(fine.opt.hypers()) > 1
    first, saved = saved_run(tune={"lr": "layer"}, meta=GRADIENT)
    rates = torch.tensor(list(first.opt.hypers().values()), dtype=torch.float64)
    coarse = run(ADAMW, meta=GRADIENT)
    coarse.resume(saved)
    assert coarse.opt.hypers()["lr"] == pytest.approx(rates.log().mean().exp().item())
    assert len(set(rates.tolist())) > 1
    coarse.train(data(ADAMW, 4))
    assert len(coarse.opt.record) == 1


def test_another_every_counts_from_the_same_steps() -> None:
    _, saved = saved_run()
    second = run(ADAMW, meta=apo.Newton(every=5))
    second.resume(saved)
    second.train(data(ADAMW, 6))
    assert second.opt.record.column("step") == [10.0]


def test_bounds_are_those_of_the_optimizer_that_loads() -> None:
    first, saved = saved_run()
    bound = first.opt.hypers()["lr"] / 2
    second = run(ADAMW, tune={"lr": apo.Tune(high=bound)})
    second.resume(saved)
    assert second.opt.hypers()["lr"] == pytest.approx(bound)


def test_a_group_added_after_resuming() -> None:
    first, saved = saved_run()
    second = run(ADAMW)
    second.resume(saved)
    extra = torch.nn.Parameter(torch.zeros(3))
    second.model.register_parameter("extra", extra)
    second.opt.add_param_group({"params": [extra], "lr": 0.5})
    factor = first.opt.param_groups[0]["lr_factor"]
    assert second.opt.hypers() == {"lr/0": first.opt.hypers()["lr"], "lr/1": pytest.approx(0.5 * factor)}
    assert second.opt.param_groups[1]["lr_factor"] == factor, "one factor for every group"


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_another_dtype(dtype: torch.dtype) -> None:
    """State is cast to the weights' dtype, as in torch; the tuning's numbers are floats as before."""
    first, saved = saved_run()
    second = run(ADAMW)
    second.model.to(dtype)
    second.resume(saved)
    assert second.opt.hypers() == first.opt.hypers()
    assert {entry["exp_avg"].dtype for entry in second.opt.state.values()} == {dtype}
    second.train(data(ADAMW, 1))


def test_hooks_see_the_whole_of_it_in_their_turn() -> None:
    first, saved = saved_run()
    opt, seen = first.opt, []
    opt.register_state_dict_pre_hook(lambda opt: seen.append("before saving"))
    opt.register_state_dict_post_hook(lambda opt, found: seen.append("apo/numbers" in found["param_groups"][0]))
    opt.register_load_state_dict_pre_hook(lambda opt, found: seen.append(found["param_groups"][0]["apo/format"]))
    opt.register_load_state_dict_pre_hook(lambda opt, found: {**found, "param_groups": saved["opt"]["param_groups"]})
    opt.register_load_state_dict_post_hook(lambda opt: seen.append(opt.hypers()))
    found = opt.state_dict()
    tuned = opt.hypers()
    first.train(data(ADAMW, 4))
    assert opt.hypers() != tuned
    opt.load_state_dict(found)
    assert seen == ["before saving", True, 1, tuned]


def test_the_state_dict_is_live_as_in_torch_and_a_copy_is_not() -> None:
    first, _ = saved_run()
    live, kept = first.opt.state_dict(), copy.deepcopy(first.opt.state_dict())
    first.train(data(ADAMW, 1))
    now = first.opt.state_dict()
    same = [live["state"][i]["exp_avg"].equal(now["state"][i]["exp_avg"]) for i in now["state"]]
    other = [kept["state"][i]["exp_avg"].equal(now["state"][i]["exp_avg"]) for i in now["state"]]
    assert all(same)
    assert not any(other)
    assert kept["param_groups"] == live["param_groups"], "the numbers are those of the moment, in both"


def test_with_the_bare_optimizer_both_ways() -> None:
    first, saved = saved_run(objective=apo.Proximal())
    twin = run(ADAMW, seed=5)
    bare = o.AdamW(twin.model.parameters())
    bare.load_state_dict(saved["opt"])
    assert state(twin.model, [bare]) == state(first.model, [first.opt])
    back = run(ADAMW, seed=5)
    back.opt.load_state_dict(through_a_file(o.AdamW.state_dict(first.opt._bases[0].optimizer)))
    assert state(back.model, [back.opt]) == state(first.model, [first.opt])
    assert back.opt.due
    assert back.opt.param_groups[0]["lr_factor"] == 1.0


def test_loading_its_own_state_before_the_first_step_changes_nothing() -> None:
    runs = []
    for loading in (False, True):
        each = run(CASES[10], meta=NEWTON)
        if loading:
            before = everything(each.model, each.opt)
            each.opt.load_state_dict(through_a_file(each.opt.state_dict()))
            assert everything(each.model, each.opt) == before
        torch.manual_seed(1)
        runs.append([each.train(data(CASES[10], 5)), weights(each.model), each.opt.record.rows])
    assert runs[0] == runs[1]
