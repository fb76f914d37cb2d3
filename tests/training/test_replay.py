"""The schedule that a tuned run found, replayed on a bare optimizer: the same learning rates and the same weights."""

import copy
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.optim.lr_scheduler import LinearLR, LRScheduler, SequentialLR

import apo
from tests.shell.helpers import batches, matrices, muon_and_adamw, net, o, train, vectors, weights
from tests.shell.test_shell_guard import disturbed
from tests.shell.test_shell_guard import made as guarded
from tests.shell.test_shell_search import Cliff
from tests.training.models import TASKS, Task, loss, made

STEPS = 14
ON_THE_WAY = {"meta": apo.Newton(every=3, backtrack=False)}


def grouped(model: nn.Module) -> torch.optim.Optimizer:
    groups = [{"params": matrices(model), "lr": 1e-3}, {"params": vectors(model), "lr": 1e-2}]
    return o.SGD(groups, momentum=0.9, nesterov=True)


def warmed(opt: torch.optim.Optimizer) -> LRScheduler:
    """From 0 up, and down to 0 again."""
    return o.lr_scheduler.LambdaLR(opt, lambda step: min(step / 4, (STEPS - step) / 8))


def tuned(
    task: Task, base: Callable[[nn.Module], Any], **options: Any
) -> tuple[apo.APO, list[list[float]], list[bytes]]:
    """A tuned run under a scheduler: the optimizer, the learning rates of every step, the weights."""
    model = made(task)
    opt = apo.APO(model, base(model), loss, **{**ON_THE_WAY, **options})
    scheduler, rates = warmed(opt), []
    for batch in task.batches(STEPS):
        opt.zero_grad()
        loss(model(batch[0]), batch[1]).backward()
        opt.step(batch=batch)
        scheduler.step()
        rates.append([group["effective_lr"] for group in opt.param_groups])
    return opt, rates, weights(model)


def replayed(task: Task, base: Callable[[nn.Module], Any], record: Any) -> tuple[list[list[float]], list[bytes]]:
    """The learning rates and the weights of a bare run under a replay."""
    model = made(task)
    bare = base(model)
    if not isinstance(bare, torch.optim.Optimizer):
        bare = apo.APO(model, bare, loss, tune={})
    scheduler, rates = apo.replay(record, bare), []
    for x, y in task.batches(STEPS):
        bare.zero_grad()
        loss(model(x), y).backward()
        bare.step()
        rates.append([group["lr"] for group in bare.param_groups])
        scheduler.step()
    return rates, weights(model)


BASES: dict[str, Callable[[nn.Module], Any]] = {
    "adamw": lambda model: o.AdamW(model.parameters(), lr=3.0),
    "tensor-lr": lambda model: o.AdamW(model.parameters(), lr=torch.tensor(1e-5), foreach=False),
    "sgd-groups": grouped,
    "list": muon_and_adamw,
    "rule": lambda model: apo.rmsprop(lr=1e-2),
}
OPTIONS: dict[str, dict[str, Any]] = {
    "sgd-groups": {"tune": {"lr": "group"}, "meta": apo.Gradient(o.SGD, lr=0.3, every=2)},
    "list": {"relative": lambda step: 1.0 / (1.0 + step), "objective": apo.Proximal(lookahead="step")},
}


RUNS = [(TASKS[0], "adamw"), (TASKS[1], "adamw"), *((TASKS[2], name) for name in BASES), (TASKS[1], "list")]


@pytest.mark.parametrize(("task", "name"), RUNS, ids=lambda part: getattr(part, "name", part))
def test_a_bare_run_with_the_replay_is_the_tuned_run(task: Task, name: str, tmp_path: Path) -> None:
    """Bit for bit: with the search from a far-off lr, a schedule on top from 0 to 0, `relative`; from a file too."""
    opt, rates, ends = tuned(task, BASES[name], **OPTIONS.get(name, {}))
    assert len({tuple(rate) for rate in rates}) == STEPS
    opt.record.to_csv(tmp_path / "found.csv")
    for record in (opt.record, tmp_path / "found.csv"):
        again, same = replayed(task, BASES[name], record)
        assert again == rates or name == "tensor-lr"
        assert same == ends


def test_steps_that_were_shortened() -> None:
    """The learning rate is that of the step that stayed; it was reached by scaling, so weights agree to rounding."""
    model, meta = Cliff(), apo.Newton(every=1, search=False, growth=1.0001, average=0.999)
    opt = apo.APO(model, o.SGD(model.parameters(), lr=0.5), evaluate=lambda m, b: (m(b), None), meta=meta)
    data = [torch.tensor(float(value), dtype=torch.float64) for value in (1, 1, 1, 1, 1e4, 1, 1)]
    rates = []
    for batch in data:
        opt.zero_grad()
        model(batch).backward()
        opt.step(batch=batch)
        rates.append(opt.param_groups[0]["effective_lr"])
    assert rates[4] < 1e-3 * rates[3]
    bare = Cliff()
    sgd = o.SGD(bare.parameters(), lr=7.0)
    scheduler = apo.replay(opt.record, sgd)
    for batch, rate in zip(data, rates, strict=True):
        assert sgd.param_groups[0]["lr"] == rate
        sgd.zero_grad()
        bare(batch).backward()
        sgd.step()
        scheduler.step()
    torch.testing.assert_close(bare.theta, model.theta, rtol=1e-12, atol=0.0)


def test_steps_that_a_guard_shortened_between_meta_steps() -> None:
    model, opt = guarded()
    train(model, opt, batches(13))
    disturbed(model, opt, batches(1, seed=8)[0])
    shortened = opt.param_groups[0]["effective_lr"]
    train(model, opt, batches(1))
    again, plain = guarded(tune={})
    scheduler, rates = apo.replay(opt.record, plain), []
    for batch in batches(15):
        rates += scheduler.get_last_lr()
        train(again, plain, [batch])
        scheduler.step()
    assert rates[13] == shortened < rates[12] / 3
    assert rates[14] == opt.param_groups[0]["effective_lr"]


def steady(by: Any = "global", steps: int = 7, **options: Any) -> tuple[nn.Module, apo.APO]:
    model = net()
    opt = apo.APO(model, o.SGD(model.parameters(), lr=0.1), F.cross_entropy, tune={"lr": by}, **ON_THE_WAY, **options)
    train(model, opt, batches(steps))
    return model, opt


def test_the_file_has_a_row_where_something_changed(tmp_path: Path) -> None:
    _, opt = steady()
    opt.record.to_csv(tmp_path / "found.csv")
    read = apo.Record.from_csv(tmp_path / "found.csv")
    lines = (tmp_path / "found.csv").read_text().splitlines()
    assert [line.partition(",")[0] for line in lines] == ["step", "0.0", "1.0", "3.0", "4.0", "6.0"]
    assert read.rows == [pytest.approx(row, rel=0.0, abs=0.0, nan_ok=True) for row in opt.record]
    assert read.rates == opt.record.rates
    assert read.columns == opt.record.columns


def test_the_last_learning_rates_stay() -> None:
    _, opt = steady()
    sgd = o.SGD(net().parameters(), lr=1.0)
    scheduler = apo.replay(opt.record, sgd)
    for _ in range(30):
        sgd.step()
        scheduler.step()
    assert sgd.param_groups[0]["lr"] == scheduler.get_last_lr()[0] == opt.record.rates[0][-1]


def test_a_replay_is_a_scheduler_like_any_other(tmp_path: Path) -> None:
    """It resumes from a state dict, which does not carry the record, and goes into a sequence."""
    _, opt = steady()
    found = list(opt.record.rates[0])
    sgd = o.SGD(net().parameters(), lr=1.0)
    scheduler = apo.replay(opt.record, sgd)
    for _ in range(2):
        sgd.step()
        scheduler.step()
    torch.save([sgd.state_dict(), scheduler.state_dict()], tmp_path / "saved.pt")
    other = o.SGD(net().parameters(), lr=2.0)
    resumed = apo.replay(opt.record, other)
    saved = torch.load(tmp_path / "saved.pt", weights_only=True)
    assert set(saved[1]) == {"base_lrs", "last_epoch", "_step_count", "_last_lr"} | set(saved[1]) - {"_rates", "_first"}
    other.load_state_dict(saved[0])
    resumed.load_state_dict(saved[1])
    for rate in found[2:]:
        assert other.param_groups[0]["lr"] == resumed.get_last_lr()[0] == rate
        other.step()
        resumed.step()
    assert isinstance(scheduler, LRScheduler)
    third = o.SGD(net().parameters(), lr=1.0)
    parts = [LinearLR(third, 0.5, total_iters=2), apo.replay(opt.record, third)]
    sequence = SequentialLR(third, parts, milestones=[2])
    seen = []
    for _ in range(5):
        seen.append(third.param_groups[0]["lr"])
        third.step()
        sequence.step()
    assert seen[2:] == found[:3]
    assert copy.deepcopy(resumed).get_last_lr() == resumed.get_last_lr()


def test_the_record_of_a_run_that_went_back_or_was_resumed() -> None:
    model, opt = steady(steps=4)
    saved, kept = copy.deepcopy(opt.state_dict()), list(opt.record.rates[0])
    train(model, opt, batches(3, seed=5))
    opt.load_state_dict(saved)
    assert list(opt.record.rates[0][:4]) == kept
    opt.param_groups[0]["lr"] = 0.05
    train(model, opt, batches(2, seed=6))
    assert list(opt.record.rates[0]) == [*kept, *[0.5 * opt.param_groups[0]["lr_factor"] * 0.1] * 2]
    fresh = net()
    other = apo.APO(fresh, o.SGD(fresh.parameters(), lr=0.1), F.cross_entropy, **ON_THE_WAY)
    other.load_state_dict(saved)
    train(fresh, other, batches(1, seed=6))
    sgd = o.SGD(net().parameters(), lr=1.0)
    with pytest.raises(ValueError, match=r"begins after 4 steps, as that of a run that was resumed.*last_epoch=3"):
        apo.replay(other.record, sgd)
    sgd.param_groups[0]["initial_lr"] = 1.0
    assert apo.replay(other.record, sgd, last_epoch=3).get_last_lr() == [other.param_groups[0]["effective_lr"]]
    train(model, opt, batches(5))
    other.load_state_dict(opt.state_dict())
    train(fresh, other, batches(1, seed=6))
    assert (other.record.first, len(other.record.rates[0])) == (11, 1)


apart = pytest.mark.parametrize("by", ["layer", "parameter", lambda name: name[-1]])


@apart
def test_a_group_that_was_tuned_apart_is_refused(by: Any, tmp_path: Path) -> None:
    _, opt = steady(by)
    opt.record.to_csv(tmp_path / "found.csv")
    for record in (opt.record, tmp_path / "found.csv"):
        with pytest.raises(ValueError, match=r"parameters of group 0 have no learning rate in common at every step"):
            apo.replay(record, o.SGD(net().parameters(), lr=1.0))


@apart
def test_layers_with_groups_of_their_own_are_replayed(by: Any) -> None:
    """Where a group holds the parameters of one key only, its learning rate says it all."""
    key = (lambda name: name.rpartition(".")[0]) if by == "layer" else (lambda name: name) if by == "parameter" else by
    ends = []
    for record in (None, "tuned"):
        model = net()
        groups: dict[str, list[nn.Parameter]] = {}
        for name, p in model.named_parameters():
            groups.setdefault(key(name), []).append(p)
        bare = o.SGD([{"params": params} for params in groups.values()], lr=0.05)
        if record is None:
            opt = apo.APO(model, bare, F.cross_entropy, tune={"lr": by}, meta=apo.Gradient(o.SGD, lr=0.3, every=2))
            train(model, opt, batches(6))
        else:
            scheduler = apo.replay(opt.record, bare)
            for x, y in batches(6):
                bare.zero_grad()
                F.cross_entropy(model(x), y).backward()
                bare.step()
                scheduler.step()
        ends.append(weights(model))
    assert ends[0] == ends[1]
    assert all(a != b for a, b in pairwise(column[-1] for column in opt.record.rates))


def test_what_cannot_be_replayed(tmp_path: Path) -> None:
    model, opt = steady()
    sgd = o.SGD(net().parameters(), lr=1.0)
    with pytest.raises(ValueError, match="the record has no learning rates: no step has been taken yet"):
        apo.replay(apo.Record(), sgd)
    with pytest.raises(
        ValueError, match=r"this optimizer tunes its lr: replay on the bare one, or on apo.APO\(..., tun"
    ):
        apo.replay(opt.record, opt)
    with pytest.raises(TypeError, match="must be a torch optimizer"):
        apo.replay(opt.record, model)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="the record is of 1 parameter groups, the optimizer has 2"):
        apo.replay(opt.record, grouped(net()))
    (tmp_path / "other.csv").write_text("epoch,lr\n1,2\n")
    (tmp_path / "wide.csv").write_text("step,lr\n1,2,3\n")
    for name in ("other.csv", "wide.csv"):
        with pytest.raises(ValueError, match=rf"{name} is no file of record.to_csv"):
            apo.replay(tmp_path / name, sgd)
    assert sgd.param_groups[0]["lr"] == 1.0
