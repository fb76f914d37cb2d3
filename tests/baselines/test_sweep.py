"""A sweep stores each run as it finishes, repeats none, and stops at a loss that is not finite."""

import json
from pathlib import Path

import pytest

from baselines.config import Config
from baselines.sweep import Result, sweep

QUICK = {"method": "fixed", "steps": 6, "eval_every": 3, "log_every": 1, "hidden": (8,)}


def test_finished_runs_are_kept_and_not_repeated(tmp_path: Path) -> None:
    path, configs = tmp_path / "out" / "results.json", [Config(seed=seed, **QUICK) for seed in (1, 0)]
    reported: list[Result] = []
    results = sweep(configs, path, train_examples=100, report=reported.append)
    assert [result["config"]["seed"] for result in results] == [1, 0]
    assert json.loads(path.read_text())["runs"] == reported
    assert all(r["finished"] and r["parameters"] == 64 * 8 + 8 + 8 * 10 + 10 for r in results)
    measured = [row["step"] for row in results[0]["rows"] if row["train_loss"] is not None]
    assert measured == [row["step"] for row in results[0]["rows"] if row["test_loss"] is not None] == [0, 3, 6]
    assert len(results[0]["rows"]) == 7

    def unexpected(result: Result) -> None:
        pytest.fail("a stored run was repeated")

    assert sweep(configs, path, report=unexpected) == results


def test_processes_side_by_side_give_the_same(tmp_path: Path) -> None:
    configs = [Config(seed=seed, **QUICK) for seed in (0, 1)]
    one = sweep(configs, tmp_path / "one.json")
    two = sweep(configs, tmp_path / "two.json", workers=2)
    assert [[row["loss"] for row in r["rows"]] for r in one] == [[row["loss"] for row in r["rows"]] for r in two]


def test_a_run_that_diverges_ends_there(tmp_path: Path) -> None:
    (result,) = sweep([Config(optimizer="sgd", lr=1e30, **QUICK)], tmp_path / "results.json")
    assert not result["finished"] and result["rows"][-1]["step"] < 6
    assert json.loads((tmp_path / "results.json").read_text())["runs"][0]["rows"][-1]["loss"] is None  # NaN
