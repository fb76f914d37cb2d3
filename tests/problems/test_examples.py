import json
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

import apo
from tests.documents import ROOT, example


@pytest.fixture
def functional_apo(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    return example("functional_apo", monkeypatch)


def start(x: float, y: float) -> dict[str, torch.Tensor]:
    return {"x": torch.tensor(x, dtype=torch.float64), "y": torch.tensor(y, dtype=torch.float64)}


def run(script: str, *arguments: str) -> str:
    command = [sys.executable, "-W", "error", str(ROOT / "examples" / script), *arguments]
    environment = os.environ | {"MPLBACKEND": "Agg", "OMP_NUM_THREADS": "1"}
    return subprocess.run(command, check=True, capture_output=True, text=True, env=environment).stdout


def results(out: Path) -> Any:
    assert (out / "curves.png").read_bytes().startswith(b"\x89PNG")
    return json.loads((out / "results.json").read_text(), parse_constant=pytest.fail)


def test_apo_descends_rosenbrocks_valley_from_any_learning_rate(functional_apo: ModuleType) -> None:
    lrs = [1e-2, 1e-4, 1e-6]
    starts = [start(1.0, -1.5) for _ in lrs]
    case = (apo.rmsprop(), apo.problems.rosenbrock, starts, lrs, 600)
    tuned = functional_apo.side_by_side(*case, {"lr": 0.1}, 1)
    fixed = functional_apo.side_by_side(*case, {})
    for by_hand, by_itself in zip(fixed, tuned, strict=True):
        assert by_itself.losses[0] == 625.0 and by_itself.losses.shape == (601,)
        assert by_itself.losses[-1] < 0.1 < 0.4 < by_hand.losses[-1]


def test_runs_side_by_side_are_the_runs_by_themselves(functional_apo: ModuleType) -> None:
    points, lrs = [(1.0, -1.5), (0.5, 0.5)], [1e-3, 1e-2]
    options = (60, {"lr": 0.1, "rho": 0.01}, 5)
    starts = [start(*at) for at in points]
    together = functional_apo.side_by_side(apo.rmsprop(), apo.problems.rosenbrock, starts, lrs, *options)
    for begin, lr, run in zip(starts, lrs, together, strict=True):
        alone = functional_apo.train(apo.rmsprop(lr=lr), apo.problems.rosenbrock, begin, *options)
        torch.testing.assert_close(run.losses, alone.losses, rtol=1e-9, atol=0.0)
        assert set(run.hypers) == {"lr", "rho"}
        torch.testing.assert_close(run.hypers["rho"], alone.hypers["rho"], rtol=1e-9, atol=0.0)


def test_rosenbrock_runs_from_the_command_line(tmp_path: Path) -> None:
    arguments = ("--steps", "30", "--every", "1", "5", "--lrs", "1e-2", "1e-6", "--fixed-lrs", "1e-3")
    printed = run("rosenbrock.py", *arguments, "--out", str(tmp_path))
    runs = results(tmp_path)["runs"]
    assert len(runs) == 6 * (1 + 2 * 2)
    assert all(set(r["loss"]) == {"30"} for r in runs)
    assert [r["curve"]["step"][-1] for r in runs if "curve" in r] == [30] * (1 + 2 * 2)
    assert "(-2.0, 2.0)  APO every=5" in printed and "fixed:" in printed


def test_the_regression_runs_from_the_command_line(tmp_path: Path) -> None:
    # A meta learning rate of 500 for ρ ruins the run: what is not finite must not spoil the table or the file.
    arguments = ("--horizons", "20", "40", "--every", "5", "--fixed-lrs", "1e-3", "1e-2", "--rho-rates", "0.01", "500")
    printed = run(
        "ill_conditioned_regression.py", *arguments, "--lrs", "1e-3", "--seeds", "0", "1", "--out", str(tmp_path)
    )
    runs = results(tmp_path)["runs"]
    assert len(runs) == 2 * (2 + 3)
    assert all(set(r["loss"]) == set(r["median"]) == {"20", "40"} for r in runs)
    assert [r["curve"]["rho"][0] for r in runs[:5] if "rho" in r["tune"]] == [0.5526, None]
    assert "lr and rho (0.01), every=5" in printed and "best fixed lr" in printed
