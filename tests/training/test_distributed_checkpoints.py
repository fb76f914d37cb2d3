"""Distributed checkpointing takes the shell as any optimizer: by name, flattened or not, through its dry step."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch.distributed import checkpoint as dcp
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)

import apo
from tests.cases import bits
from tests.documents import programs
from tests.shell.helpers import everything, state, weights
from tests.training.checkpointing import CASES, NEWTON, Case, Run, data, run
from tests.training.models import TASKS, loss, made

o = torch.optim
pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled, unavailable or uninitialized")
every_case = pytest.mark.parametrize("case", CASES, ids=[case.name for case in CASES])


def parts(of: Run, flat: bool) -> dict[str, Any]:
    options = StateDictOptions(flatten_optimizer_state_dict=flat)
    return {"model": get_model_state_dict(of.model), "opt": get_optimizer_state_dict(of.model, of.opt, options=options)}


def load(into: Run, folder: Path, flat: bool) -> None:
    found = parts(into, flat)
    dcp.load(found, checkpoint_id=folder)
    set_model_state_dict(into.model, found["model"])
    options = StateDictOptions(flatten_optimizer_state_dict=flat)
    set_optimizer_state_dict(into.model, into.opt, found["opt"], options=options)


WAYS = [(case, False) for case in CASES] + [(case, True) for case in CASES[::3]]


@pytest.mark.parametrize(("case", "flat"), WAYS, ids=[f"{case.name}{'-flat' * flat}" for case, flat in WAYS])
def test_a_resumed_run_is_the_run(case: Case, flat: bool, tmp_path: Path) -> None:
    batches = data(case, 11)
    first = run(case)
    first.train(batches[:6])
    dcp.save(parts(first, flat), checkpoint_id=tmp_path)
    tuned, rows = first.opt.hypers(), len(first.opt.record)
    ends = []
    second = run(case, seed=5)
    load(second, tmp_path, flat)
    second.scheduler.load_state_dict(first.scheduler.state_dict())
    assert second.opt.hypers() == tuned
    for each in (first, second):
        torch.manual_seed(3)
        losses, states = each.train(batches[6:]), state(each.model, [each.opt])
        ends.append([losses, each.opt.hypers(), weights(each.model), [entries for entries in states if any(entries)]])
    assert ends[0] == ends[1]
    assert list(first.opt.record)[rows:] == list(second.opt.record)


@every_case
def test_the_dry_step_is_not_ours(case: Case) -> None:
    """It makes states; the run that follows is searched, judged and counted as if it had not been."""
    each = run(case)
    before = everything(each.model, each.opt)
    get_optimizer_state_dict(each.model, each.opt)
    after = everything(each.model, each.opt)
    before[2] = after[2] = None  # what it is for
    assert after == before
    assert len(each.opt.record) == 0
    each.train(data(case, 1))
    assert len(each.opt.record) == 1, "the first step is judged"
    assert each.opt.record[0]["step"] == 0.0


def test_the_dry_step_of_a_stateless_optimizer_takes_nothing_away() -> None:
    """Plain SGD has no state, so every look at it takes a dry step: B', batches and counts must outlast it."""
    batches = data(CASES[0], 10)
    runs = []
    for looking in (False, True):
        each, losses = run(CASES[0]), []
        for batch in batches:
            losses += each.train([batch])
            each.opt.zero_grad()
            if looking:
                before = everything(each.model, each.opt)
                get_optimizer_state_dict(each.model, each.opt)
                assert everything(each.model, each.opt) == before
        runs.append([losses, each.opt.record.rows, weights(each.model)])
    assert runs[0] == runs[1]
    assert runs[0][1][-1]["without_other"] == 1.0


def test_a_warm_up_from_zero_is_no_dry_step() -> None:
    """Its gradients are not zero, so it is counted as a step, and not as one that moved something."""
    model = made(TASKS[0])
    opt = apo.APO(model, o.AdamW(model.parameters(), lr=0.0), loss)
    x, y = TASKS[0].batches(1)[0]
    loss(model(x), y).backward()
    opt.step(batch=(x, y))
    assert (opt._counts.steps, opt._counts.counted) == (1, 0)


def test_parameters_in_another_order_find_their_state() -> None:
    first, twin = made(TASKS[1]), made(TASKS[1], seed=5)
    opts = []
    for model, order in ((first, 1), (twin, -1)):
        opts.append(apo.APO(model, o.AdamW(list(model.parameters())[::order]), loss, meta=NEWTON, tune={"lr": "layer"}))
    for x, y in TASKS[1].batches(5):
        first.zero_grad()
        loss(first(x), y).backward()
        opts[0].step(batch=(x, y))
    set_optimizer_state_dict(twin, opts[1], get_optimizer_state_dict(first, opts[0]))
    assert opts[1].hypers() == opts[0].hypers()
    for name, param in first.named_parameters():
        theirs = opts[1].state[twin.get_parameter(name)]
        assert {k: bits(v) for k, v in opts[0].state[param].items()} == {k: bits(v) for k, v in theirs.items()}


def test_the_pages_program(tmp_path: Path) -> None:
    names: dict[str, Any] = {}
    exec(programs("docs/training/checkpoints.md")[1], names)
    torch.manual_seed(0)
    (model, opt), (twin, other) = names["made"](), names["made"]()
    x, y = torch.randn(8, 6), torch.arange(8) % 3
    torch.nn.functional.cross_entropy(model(x), y).backward()
    opt.step(batch=(x, y))
    names["save"](model, opt, tmp_path)
    names["load"](twin, other, tmp_path)
    assert weights(twin) == weights(model)
    assert other.hypers() == opt.hypers() != {"lr": 1e-3}
