"""The demo runs all six runs, shows its table, and draws its picture."""

import json
import math
from pathlib import Path

import pytest

from baselines.cli import main
from baselines.plots import Curve, demo_figure, smoothed, training_figure
from baselines.run import COLUMNS, Row


def history(lr: float, losses: list[float]) -> list[Row]:
    """A history with a row a step."""
    rows: list[Row] = []
    for step, loss in enumerate([float("nan"), *losses]):
        row: Row = dict.fromkeys(COLUMNS)
        row |= {"step": step, "epoch": step / 2, "lr": lr, "loss": loss if step else None}
        rows.append(row)
    return rows


def test_the_demo_leaves_a_picture_and_its_numbers_for_apo(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["demo", "--epochs", "1", "--out", str(tmp_path / "d")]) == 0
    content = json.loads((tmp_path / "d" / "demo.json").read_text())
    assert [(run["config"]["method"], run["config"]["lr"]) for run in content["runs"]] == [
        (method, lr) for method in ("fixed", "apo") for lr in (1e-6, 1e-3, 1.0)
    ]
    tuned = [run["outcome"]["lr"] for run in content["runs"][3:]]
    assert max(tuned) / min(tuned) < 10  # 1e6 at the start
    assert (tmp_path / "d" / "demo.png").read_bytes()[:4] == b"\x89PNG"
    out = capsys.readouterr().out
    assert "six times" in out and "tuned LR" in out and "demo.png" in out


def test_absent_data_is_explained(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["demo", "--data", "fashion-mnist", "--data-dir", str(tmp_path), "--out", str(tmp_path / "d")]) == 2
    assert "apt-get install dataset-fashion-mnist" in capsys.readouterr().err
    assert not (tmp_path / "d").exists()


def test_pictures_survive_runs_that_diverge() -> None:
    bad = [1e9, float("inf"), float("nan"), float("nan")]
    curves = [Curve(method, lr, history(lr, bad)) for method in ("fixed", "apo") for lr in (1e-6, 1e-3, 1.0)]
    demo_figure(curves, "all dead").canvas.draw()
    training_figure(history(0.0, bad), "dead").canvas.draw()


def test_smoothing_keeps_constants_and_the_first_value() -> None:
    assert smoothed([3.0] * 50) == pytest.approx([3.0] * 50)
    assert smoothed([5.0, 1.0])[0] == pytest.approx(5.0) and smoothed([]) == []
    late = smoothed([1.0] * 50 + [1e6, math.inf, 1.0])
    assert late[50] < 100 and math.isnan(late[51]) and math.isfinite(late[52])
