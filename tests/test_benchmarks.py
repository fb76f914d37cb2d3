"""The benchmarks measure what they say: every contestant trains, bytes are counted, ratios are of the same round."""

import json
from functools import partial
from itertools import groupby
from pathlib import Path

import pytest
import torch
from torch import nn

from benchmarks import __main__ as command
from benchmarks import rule_cost, timing
from benchmarks.contestants import BARE, CONTESTANTS, Contestant, Step
from benchmarks.memory import Counting
from benchmarks.tasks import GROWTH, LARGE, TASKS, Many, Task, classifier
from benchmarks.timing import measure, summary

TINY = classifier(partial(Many, 3, 20), "tiny", 100, 60)
CPU = torch.device("cpu")


@pytest.mark.parametrize("name", CONTESTANTS)
def test_every_contestant_trains(name: str) -> None:
    torch.manual_seed(0)
    model = TINY.build()
    before = [param.detach().clone() for param in model.parameters()]
    (batch,) = TINY.batches(1, 0, CPU)
    loss = TINY.loss(model(batch[0]), batch[1]).item()
    step = CONTESTANTS[name].make(model, TINY)
    for _ in range(min(CONTESTANTS[name].every, 10) + 2):
        step(batch)
    assert all(not torch.equal(old, new) for old, new in zip(before, model.parameters(), strict=True))
    after = TINY.loss(model(batch[0]), batch[1]).item()
    assert after < loss or name in ("Prodigy", "D-Adaptation")  # these start from 1e-6


@pytest.mark.parametrize("name", TASKS)
def test_every_task_has_batches_for_its_model(name: str) -> None:
    task = TASKS[name]
    first, second = task.batches(2, 0, CPU)
    assert not torch.equal(first[0], second[0]) and torch.equal(first[0], task.batches(1, 0, CPU)[0][0])
    loss = task.loss(task.build()(first[0]), first[1])
    assert loss.shape == () and loss.isfinite()


def test_the_large_models_have_the_stated_sizes() -> None:
    with torch.device("meta"):
        sizes = {name: sum(param.numel() for param in task.build().parameters()) for name, task in LARGE.items()}
    assert sizes["resnet18"] == 11_173_962 and 105e6 < sizes["gpt"] < 115e6


def test_bytes_are_counted_while_they_live() -> None:
    before = torch.zeros(1000)
    with Counting() as counting:
        first = before + 1
        assert (counting.live, counting.peak) == (4000, 4000)
        view = first.view(10, 100)
        second = first * 2
        assert (counting.live, counting.peak) == (8000, 8000)
        del second, first
        assert counting.live == 4000  # the view holds it
        del view
        before.add_(1)
        assert (counting.live, counting.peak) == (0, 8000)
        weight = torch.ones(100, requires_grad=True)
        (weight * 2).relu().sum().backward()
        assert weight.grad is not None and counting.live == 2 * 400


def test_blocks_hold_whole_intervals_and_turn(monkeypatch: pytest.MonkeyPatch) -> None:
    taken: list[str] = []

    def make(name: str, model: nn.Module, task: Task) -> Step:
        return lambda batch: taken.append(name)

    fake = {name: Contestant(partial(make, name), every) for name, every in (("a", 1), ("b", 15))}
    seconds = measure(TINY, fake, 2, CPU)
    runs = [(name, len(list(group))) for name, group in groupby(taken)]
    assert runs == [("a", 3 + 20), ("b", 15 + 30 + 15 + 30), ("a", 3 + 20)]  # the second round begins with b
    assert {name: len(times) for name, times in seconds.items()} == {"a": 2, "b": 2}
    monkeypatch.setattr(timing.Clock, "stop", lambda self: 60.0)
    assert measure(TINY, fake, 1, CPU) == {"a": [3.0], "b": [2.0]}


def test_ratios_are_those_of_the_same_round() -> None:
    found = summary({BARE: [1.0, 10.0, 2.0], "other": [2.0, 15.0, 5.0]})
    assert found["other"].ratio == 2.0 and (found["other"].low, found["other"].high) == (1.75, 2.25)
    assert found[BARE][1:] == (1.0, 1.0, 1.0) and found["other"].seconds == 5.0
    assert summary({BARE: [2.0], "other": [3.0]})["other"][1:] == (1.5, 1.5, 1.5)


def test_the_command_writes_a_report(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(command.TASKS, "tensors", TINY)
    asked = ["tensors", "--only", "torch's, every 10, ", "--rounds", "2", "--device", "cpu", "--out", str(tmp_path)]
    assert command.main(asked) == 0
    names = [BARE, *(name for name in CONTESTANTS if "torch's, every 10, " in name)]
    page, printed = (tmp_path / "README.md").read_text(), capsys.readouterr().out
    rows = [line.split(" | ")[0].removeprefix("| ") for line in page.splitlines() if line.startswith("| ")]
    assert rows[1:] == names and f"    python -m benchmarks {' '.join(asked)}" in page
    assert all(line in printed for line in page.splitlines() if line.startswith("| "))
    results = json.loads((tmp_path / "results.json").read_text(), parse_constant=pytest.fail)
    measured = results["tasks"]["tensors"]
    assert list(measured["contestants"]) == names and measured["weights"] == 3 * 20 * 10 * 4
    peaks = [each["peak"] for each in measured["contestants"].values()]
    assert peaks[0] >= 4 * measured["weights"] and min(peaks[1:]) > peaks[0]  # weights, gradients, two averages
    assert (tmp_path / "figure.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        (["mlp", "vgg"], "there is no task vgg; there are mlp, cnn"),
        (["mlp", "--only", "lion"], "no contestant has 'lion' in its name; there are Adam (torch)"),
        (["mlp", "--rounds", "0"], "--rounds 0: at least 1"),
        (["mlp", "--block", "0"], "--block 0: at least 1"),
    ],
)
def test_what_is_not_there_is_refused(asked: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        command.main(asked)
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("name", rule_cost.STEPS)
def test_steps_alone_need_no_batch(name: str) -> None:
    torch.manual_seed(0)
    model = TINY.build()
    before = [param.detach().clone() for param in model.parameters()]
    step = rule_cost.STEPS[name].make(model, TINY)
    for _ in range(2):
        step(TINY.batches(1, 0, CPU)[0])
    assert all(not torch.equal(old, new) for old, new in zip(before, model.parameters(), strict=True))


def test_growth_is_of_the_stated_sizes() -> None:
    with torch.device("meta"):
        models = {name: list(task.build().parameters()) for name, task in GROWTH.items()}
    for name, params in models.items():
        kind, size = name.split("-")
        if kind == "tensors":
            assert len(params) == int(size) and sum(map(torch.Tensor.numel, params)) == 100_000
        else:
            assert sum(map(torch.Tensor.numel, params)) == pytest.approx(float(size), rel=0.03)
