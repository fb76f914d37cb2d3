"""Population-based training by Ray Tune: what is copied, what is multiplied, and that the whole is a plain loop."""

import copy
import dataclasses
import itertools
import math
import random
from pathlib import Path
from typing import NamedTuple

import pytest

from baselines.cells import Cell, Store, Trained, compute
from baselines.cli import main
from baselines.comparators import pbt
from baselines.config import Config

CONFIG = Config(
    method="pbt",
    optimizer="rmsprop",
    lr=3e-3,
    steps=44,
    log_every=4,
    perturb_every=8,
    eval_every=22,
    hidden=(8,),
    examples=400,
    seed=1,
)


class Done(NamedTuple):
    """What one population came to."""

    reports: list[list[pbt.Report]]
    cell: Cell


@pytest.fixture(scope="module")
def done() -> Done:
    """Computed once, as Ray takes seconds to start."""
    seen: list[list[pbt.Report]] = []
    combine = pbt.combine

    def spy(reports: list[list[pbt.Report]]) -> Trained:
        seen.extend(reports)
        return combine(reports)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pbt, "combine", spy)
        cell = compute(CONFIG)
    return Done(seen, cell)


@pytest.fixture
def reports(done: Done) -> list[list[pbt.Report]]:
    return done.reports


def rates(members: list[pbt.Report]) -> list[float]:
    """The learning rate that each member had."""
    return [member["rows"][-1]["lr"] for member in members]


def test_the_factors_are_drawn_from_the_seed(reports: list[list[pbt.Report]]) -> None:
    """So that the same configuration gives the same cell."""
    draws = random.Random(CONFIG.seed)
    for before, after in itertools.pairwise(reports):
        draws.choice([0])  # whom to copy, of one
        draws.random()  # whether to draw the learning rate anew: never
        changed = set(rates(after)) - set(rates(before))
        best = min(before, key=lambda report: report["measure"])
        assert best["rows"][-1]["lr"] * draws.choice((1.2, 0.8)) in {*changed, *rates(before)}


def test_the_worst_goes_on_from_the_best_at_a_rate_near_its_own(reports: list[list[pbt.Report]]) -> None:
    assert [member["steps"] for member, *_ in reports] == [8, 16, 24, 32, 40, 44]
    assert rates(reports[0]) == [3e-3] * 4 and [member["seed"] for member in reports[0]] == [4, 5, 6, 7]
    for before, after in itertools.pairwise(reports):
        measures = [member["measure"] for member in before]
        best, worst = measures.index(min(measures)), measures.index(max(measures))
        expected = [member["seed"] for member in before]
        expected[worst] = expected[best]
        assert [member["seed"] for member in after] == expected
        factor = rates(after)[worst] / rates(before)[best]
        assert min(abs(factor - 0.8), abs(factor - 1.2)) < 1e-12
        kept = [place for place in range(4) if place != worst]
        assert [rates(after)[place] for place in kept] == [rates(before)[place] for place in kept]


def test_it_is_a_plain_loop_over_four_networks(reports: list[list[pbt.Report]]) -> None:
    """Weights, optimizer's state and data order are copied: every batch loss is the loop's, to the bit."""
    members = [pbt.Member(CONFIG) for _ in range(4)]
    for place, member in enumerate(members):
        member.begin(place, CONFIG.lr)
    for time, found in enumerate(reports):
        own = [member.advance() for member in members]
        for one, other in zip(own, found, strict=True):
            assert [row["loss"] for row in one["rows"]] == [row["loss"] for row in other["rows"]]
        if time + 1 < len(reports):
            measures = [report["measure"] for report in own]
            best, worst = measures.index(min(measures)), measures.index(max(measures))
            state = copy.deepcopy(members[best].run.state_dict())
            members[worst].begin(0, rates(reports[time + 1])[worst])
            members[worst].run.load_state_dict(state)
    accuracies = [report["outcome"]["test_accuracy"] for report in own]
    assert accuracies == [report["outcome"]["test_accuracy"] for report in reports[-1]]


def test_the_cell_is_of_the_best_and_costs_all(done: Done, tmp_path: Path) -> None:
    cell, last = done.cell, done.reports[-1]
    Store(tmp_path).put(cell)
    stored = Store(tmp_path).get(CONFIG)
    assert stored is not None and stored.loss == pytest.approx(cell.loss, rel=1e-4) and math.isfinite(stored.area)
    assert cell.finished and cell.steps == 44 and cell.about["warnings"] == []
    assert cell.curves["step"] == sorted([*range(0, 48, 4), 22])
    best = min(last, key=lambda report: report["measure"])
    assert cell.outcome["train_loss"] == best["outcome"]["train_loss"]
    assert [row["loss"] for row in best["rows"]] == cell.curves["loss"][-len(best["rows"]) :]
    assert [cell.curves[f"lr/{place}"][-1] for place in range(4)] == rates(last)
    spent = sum(member["rows"][-1]["seconds"] for members in done.reports for member in members)
    assert cell.outcome["seconds"] == cell.curves["seconds"][-1] == pytest.approx(spent)
    seconds = [second for second in cell.curves["seconds"] if second is not None]
    assert seconds == sorted(seconds) and len(seconds) == len(cell.curves["step"])


def test_a_member_that_diverges_is_the_worst() -> None:
    member = pbt.Member(dataclasses.replace(CONFIG, optimizer="sgd"))
    member.begin(0, 1e30)
    assert member.advance()["measure"] == math.inf


def test_the_interval_is_about_a_twentieth_of_the_run() -> None:
    config = dataclasses.replace(CONFIG, perturb_every=None)
    assert [pbt.interval(config, steps) for steps in (44, 1000, 3000)] == [4, 48, 152]
    with pytest.raises(ValueError, match="perturb_every=10 is not allowed; it must be a multiple of log_every=4"):
        dataclasses.replace(CONFIG, perturb_every=10)
    with pytest.raises(ValueError, match="population=3 is an option of --method pbt, and --method fixed ignores it"):
        Config(method="fixed", population=3)


def test_train_is_of_one_model(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", "--method", "pbt"]) == 2
    assert "--method pbt trains a population, not one model" in capsys.readouterr().err
