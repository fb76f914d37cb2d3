"""Every named experiment runs at the budget smoke, goes on where it stopped, and reports from its cells."""

import json
from pathlib import Path

import pytest

from baselines.cells import Store
from baselines.cli import main
from baselines.experiments import EXPERIMENTS
from baselines.experiments.base import BUDGETS
from baselines.experiments.scripts import SCRIPTS
from tests.documents import ROOT


@pytest.fixture(scope="module")
def cells(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of the store of all experiments here: what two of them have in common is run once."""
    return tmp_path_factory.mktemp("cells")


def test_an_experiment_without_cells_is_not_reported(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    where = ["--cells", str(tmp_path / "cells"), "--out", str(tmp_path / "out")]
    assert main(["report", "comparison-mlp", *where]) == 1
    assert "35 of 35 curves lack cells; python -m baselines run" in capsys.readouterr().out
    assert main(["report", *where]) == 0 and not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_an_experiment_runs_once_and_reports(
    name: str, cells: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    where = ["--budget", "smoke", "--cells", str(cells), "--out", str(tmp_path / "out")]
    assert main(["run", name, "--workers", "0", *where]) == 0
    assert "runs are stored, at least" in capsys.readouterr().out
    folder = tmp_path / "out" / name
    page, results = (folder / "README.md").read_text(), json.loads((folder / "results.json").read_text())
    panels = EXPERIMENTS[name].panels("smoke")
    assert list(results["panels"]) == list(panels)
    for panel, curves in panels.items():
        assert list(results["panels"][panel]) == [curve.label for curve in curves]
        assert all(f"| {curve.label} |" in page for curve in curves)
    assert (folder / "figure.png").read_bytes().startswith(b"\x89PNG")
    stored = len(list(Store(cells)))
    assert main(["run", name, "--workers", "0", *where]) == 0
    assert "at least 0 are to do" in capsys.readouterr().out and len(list(Store(cells))) == stored
    (folder / "README.md").unlink()
    assert main(["report", name, *where]) == 0
    assert (folder / "README.md").read_text() == page


@pytest.mark.parametrize("name", SCRIPTS)
def test_a_script_writes_its_report(name: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert main(["run", name, "--budget", "smoke", "--out", str(tmp_path), "--cells", str(tmp_path / "cells")]) == 0
    folder = tmp_path / SCRIPTS[name].folder
    assert json.loads((folder / "results.json").read_text()) and list(folder.glob("*.png"))
    assert (ROOT / "docs" / "results" / SCRIPTS[name].folder / "README.md").is_file()
    assert not (tmp_path / "cells").exists() and f"{name}: {folder}" in capfd.readouterr().out


def test_what_lacks_cells_is_left_out_and_named(cells: Path, tmp_path: Path) -> None:
    where = ["--budget", "smoke", "--out", str(tmp_path / "out")]
    assert main(["run", "apo-fig2b", "--workers", "0", "--cells", str(cells), *where]) == 0
    plain = [path for path in cells.glob("*.json") if '"method":"fixed"' in path.read_text()]
    (tmp_path / "some").mkdir()
    for path in plain:
        (tmp_path / "some" / path.name).write_bytes(path.read_bytes())
    assert main(["report", "apo-fig2b", "--cells", str(tmp_path / "some"), *where]) == 1
    text = (tmp_path / "out" / "apo-fig2b" / "README.md").read_text()
    assert "Not run yet: RMSprop-APO (RMSprop)." in text and "| RMSprop |" in text and "| RMSprop-APO |" not in text


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_an_experiment_is_whole_at_every_budget(name: str) -> None:
    experiment = EXPERIMENTS[name]
    for budget in BUDGETS:
        panels = experiment.panels(budget)
        assert panels and experiment.departs[budget]
        for curves in panels.values():
            labels = [curve.label for curve in curves]
            assert len(set(labels)) == len(labels) and {c.against for c in curves if c.against} <= set(labels)


def test_an_unknown_name_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["report", "apo-fig99", "--cells", str(tmp_path)]) == 2
    message = f"no experiment with cells is called apo-fig99; there are {', '.join(EXPERIMENTS)}"
    assert message in capsys.readouterr().err
