"""Plans ask for what they need, share cells, and are judged by the logarithm of the loss."""

import dataclasses
import math
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from baselines import plans
from baselines.cells import Cell, Store, compute, missing
from baselines.config import Config
from baselines.judge import Comparison, compare, mean_loss, rank
from tests.baselines.driving import drive
from tests.baselines.files import write_idx_set

QUICK = Config(method="fixed", steps=6, log_every=2, hidden=(8,))


def stand_in(config: Config, loss: float) -> Cell:
    curves: dict[str, list[float | None]] = {"step": [0, 6], "loss": [None, loss]}
    return Cell(config, "", math.isfinite(loss), 6, 1, {"train_loss": loss}, curves, {"wall": 1.0, "time": 0})


def rates(plan: plans.Plan[Any], losses: Callable[[float], float]) -> tuple[Any, list[float]]:
    """What a plan finds where losses depend on the learning rate, and the rates that it asked for."""
    found, asked = drive(plan, lambda config: stand_in(config, losses(config.lr)))
    return found, [config.lr for config in asked]


def test_the_grid() -> None:
    assert [plans.grid(place) for place in range(-3, 4)] == [0.03, 0.1, 0.3, 1.0, 3.0, 10.0, 30.0]
    assert [plans.grid(plans.place_of(value)) for value in (1e-3, 2e-3, 0.12, 1.0)] == [1e-3, 3e-3, 0.1, 1.0]


@pytest.mark.parametrize("best", [1e-5, 1e-3, 0.3, 10.0])
def test_a_walk_ends_when_its_optimum_is_interior(best: float) -> None:
    tried, asked = rates(plans.walk(dataclasses.replace(QUICK, lr=0.01)), lambda lr: 1.0 + abs(math.log(lr / best)))
    assert tried[0].config.lr == best and len(set(asked)) == len(asked)
    place = plans.place_of(best)
    assert {plans.grid(place - 1), plans.grid(place + 1)} < set(asked)
    assert asked[:3] == [0.003, 0.01, 0.03]


def test_a_walk_leaves_what_diverges() -> None:
    tried, _ = rates(plans.walk(dataclasses.replace(QUICK, lr=1.0)), lambda lr: math.inf if lr > 1e-3 else 1.0 / lr)
    assert tried[0].config.lr == 1e-3 and math.isinf(tried[-1].loss)
    nothing, asked = rates(plans.walk(dataclasses.replace(QUICK, lr=1e-10)), lambda lr: math.inf)
    assert math.isinf(nothing[0].loss) and min(asked) == plans.grid(plans.PLACES[0])


def test_below_the_floor_the_faster_run_wins() -> None:
    slow, fast = stand_in(QUICK, 1e-4), stand_in(QUICK, 2e-4)
    slow.curves["loss"] = [None, 1.0]
    assert sorted([slow, fast], key=rank) == [fast, slow]


def test_only_the_winner_gets_all_seeds() -> None:
    plan = plans.best_of(plans.walk(dataclasses.replace(QUICK, lr=0.01)), 3)
    (winners, tried), asked = rates(plan, lambda lr: 1.0 + abs(math.log(lr / 0.01)))
    assert [(cell.config.lr, cell.config.seed) for cell in winners] == [(0.01, 0), (0.01, 1), (0.01, 2)]
    assert len(tried) == 3 and len(asked) == 5


@pytest.mark.parametrize("workers", [0, 2])
def test_plans_share_cells_and_repeat_none(tmp_path: Path, workers: int) -> None:
    def make() -> dict[str, plans.Plan[Any]]:
        pair = [dataclasses.replace(QUICK, seed=seed) for seed in (0, 1)]
        return {"both": plans.search(pair), "one": plans.search(pair[:1])}

    store, new = Store(tmp_path), []
    assert plans.estimate(make().values(), store)[:2] == (0, 2)
    found = plans.carry_out(make(), store, workers=workers, report=new.append)
    assert len(new) == 2 and found["one"][0] in found["both"]
    losses = {cell.config.seed: cell.loss for cell in found["both"]}
    alone = {seed: compute(dataclasses.replace(QUICK, seed=seed)).loss for seed in (0, 1)}
    assert losses == pytest.approx(alone, rel=1e-4) and list(losses.values()) == sorted(losses.values())
    again = plans.carry_out(make(), Store(tmp_path), workers=workers, report=lambda cell: pytest.fail("repeated"))
    assert again == found
    assert plans.estimate(make().values(), store) == (2, 0, 0.0)


def test_a_run_that_fails_loses_no_other(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    bad = dataclasses.replace(QUICK, examples=10**6)
    with pytest.raises(ValueError, match="has only"):
        plans.carry_out({"a": plans.search([QUICK, bad])}, Store(tmp_path), workers=0)
    assert Store(tmp_path).get(QUICK) is not None


def test_an_estimate_is_of_what_is_missing(tmp_path: Path) -> None:
    store = Store(tmp_path)
    store.put(stand_in(QUICK, 1.0))
    walk = plans.estimate([plans.walk(dataclasses.replace(QUICK, seed=5))], store)
    assert walk == (0, 3, 3.0)


def seeds(*losses: float) -> list[Cell]:
    return [stand_in(QUICK, loss) for loss in losses]


def test_results_are_compared_by_log_ratio() -> None:
    low, high = seeds(0.1, 0.11, 0.09), seeds(0.2, 0.22, 0.18)
    assert mean_loss(low) == pytest.approx((0.1 * 0.11 * 0.09) ** (1 / 3))
    comparison = compare(low, high)
    deviation = math.sqrt(2 * sum((math.log(x) - math.log(mean_loss(low))) ** 2 for x in (0.1, 0.11, 0.09)) / 2 / 3)
    assert comparison == pytest.approx(Comparison(0.5, deviation))
    assert comparison.verdict == "better" and compare(high, low).verdict == "worse"
    assert compare(low, seeds(0.1, 0.12, 0.09)).verdict == "equal"
    assert compare(seeds(1e-5, 1e-3), seeds(1e-2, 5e-3)).ratio == 1.0
    assert compare(seeds(0.1), seeds(0.2)).verdict == "open"
    assert compare(low, seeds(0.1, math.inf)).verdict == "better"
    assert compare(seeds(math.inf), low).verdict == "worse"
    assert compare(seeds(math.inf), seeds(math.inf)).verdict == "open"


def test_data_are_read_from_a_folder_that_no_cell_keeps(tmp_path: Path) -> None:
    write_idx_set(tmp_path / "data", compressed=True)
    config = Config(data="mnist", method="fixed", steps=3, hidden=(8,), batch_size=4)

    def make() -> plans.Plan[list[Cell]]:
        return plans.located(plans.search([config, QUICK]), str(tmp_path / "data"))

    store = Store(tmp_path / "cells")
    assert plans.estimate([make()], store)[:2] == (0, 2)
    cells = plans.carry_out({"both": make()}, store, workers=0)["both"]
    assert {cell.config.data: cell.config.data_dir for cell in cells} == {"mnist": None, "digits": None}
    assert missing([config, QUICK], store) == []
    with pytest.raises(FileNotFoundError, match="--data-dir"):
        plans.carry_out({"elsewhere": plans.search([config])}, Store(tmp_path / "none"), workers=0)


def test_workers_end_with_a_killed_run(tmp_path: Path) -> None:
    """They would go on to the end of their cell, for nobody."""
    script, beats = tmp_path / "script.py", tmp_path / "beats"
    script.write_text(
        """
import multiprocessing, pathlib, sys, time
from concurrent.futures import ProcessPoolExecutor
from baselines.plans import end_with_parent

def beat(path):
    for count in range(1200):
        pathlib.Path(path).write_text(str(count))
        time.sleep(0.05)

if __name__ == "__main__":
    pool = ProcessPoolExecutor(1, multiprocessing.get_context("spawn"), initializer=end_with_parent)
    pool.submit(beat, sys.argv[1]).result()
"""
    )
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
    run = subprocess.Popen([sys.executable, script, beats], env=environment, stderr=subprocess.DEVNULL)
    try:
        assert until(beats.exists, 60.0)
    finally:
        run.kill()
        run.wait()

    def still() -> bool:
        before = beats.read_text()
        time.sleep(0.5)
        return beats.read_text() == before

    assert until(still, 20.0)


def until(happened: Callable[[], bool], seconds: float) -> bool:
    """Whether something happens in time."""
    end = time.monotonic() + seconds
    while not (found := happened()) and time.monotonic() < end:
        time.sleep(0.05)
    return found
