"""A search makes cells, goes on where it was cut off, and shows the schedule of every value."""

import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from baselines.cells import Store, compute
from baselines.cli import main
from baselines.config import Config
from baselines.ray_session import session
from baselines.search import Over, Search

OPTIONS: dict[str, Any] = {"optimizer": "rmsprop", "meta": "paper", "every": 2, "steps": 8, "hidden": (4,)}
COMMAND = ["sweep", "--optimizer", "rmsprop", "--meta", "paper", "--every", "2", "--steps", "8", "--hidden", "4"]


@pytest.fixture(scope="module", autouse=True)
def ray() -> Iterator[None]:
    """One start for all, as it takes seconds."""
    with session(1):
        yield


def test_every_weight_is_a_cell_and_those_that_are_there_are_not_run_again(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    where = ["--cells", str(tmp_path / "cells"), "--out", str(tmp_path / "out")]
    store = Store(tmp_path / "cells")
    store.put(compute(Config(**OPTIONS, fsd=0.1)))
    assert main([*COMMAND, "--fsd", "1,0.1,0", *where]) == 0
    said = capsys.readouterr().out
    assert "1 runs are stored, 2 are to do: about" in said and "2/2: fsd" in said and "fsd 0.1" not in said
    losses = {}
    for fsd in (1.0, 0.1, 0.0):
        cell, own = Store(tmp_path / "cells").get(Config(**OPTIONS, fsd=fsd)), compute(Config(**OPTIONS, fsd=fsd))
        assert cell is not None and cell.loss == pytest.approx(own.loss, rel=1e-4)
        losses[f"{fsd:g}"] = cell.loss
    page = (tmp_path / "out" / "README.md").read_text()
    rows = [line.split(" | ") for line in page.splitlines() if line.startswith("| ")][2:]
    assert [row[0].removeprefix("| ") for row in rows] == sorted(losses, key=lambda value: losses[value])
    assert [row[1] for row in rows] == [f"{loss:.3g}" for loss in sorted(losses.values())]
    results = json.loads((tmp_path / "out" / "results.json").read_text(), parse_constant=pytest.fail)
    assert results["over"] == ["fsd"] and [run["loss"] for run in results["runs"]] == sorted(losses.values())
    assert len({tuple(run["curves"]["lr"]) for run in results["runs"]}) == 3  # a schedule each
    assert (tmp_path / "out" / "figure.png").read_bytes().startswith(b"\x89PNG")
    monkeypatch.setattr(Search, "carry_out", lambda *args, **options: pytest.fail("run again"))
    assert main([*COMMAND, "--fsd", "1,0.1,0", *where]) == 0
    assert (tmp_path / "out" / "README.md").read_text() == page


def test_a_range_is_searched_until_there_are_as_many_trials_as_asked_for(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    where = ["--cells", str(tmp_path / "cells"), "--out", str(tmp_path / "out")]
    ranged = [*COMMAND, "--fsd", "1e-4..1", "--over", "lr=1e-3,1e-2", *where]
    assert main([*ranged, "--trials", "3"]) == 0
    first = {(cell.config.fsd, cell.config.lr) for cell in Store(tmp_path / "cells")}
    assert len(first) == 3 and all(1e-4 <= fsd <= 1 and lr in (1e-3, 1e-2) for fsd, lr in first)
    assert all(fsd == float(f"{fsd:.3g}") for fsd, _ in first)
    assert main([*ranged, "--trials", "4"]) == 0
    assert "3 runs are stored, 1 are to do" in capsys.readouterr().out
    both = {(cell.config.fsd, cell.config.lr) for cell in Store(tmp_path / "cells")}
    assert first < both and len(both) == 4
    page = (tmp_path / "out" / "README.md").read_text()
    assert "A search over lr, fsd" in page and page.count("\n| 0.0") == 4


def test_the_searcher_knows_the_cells_that_are_there(tmp_path: Path) -> None:
    options = {name: value for name, value in OPTIONS.items() if name != "hidden"}
    search, store = Search(options, [Over.parse("fsd=1e-4..1"), Over.parse("hidden=4,4+4")], 5), Store(tmp_path)
    wanted = [(0.5, "4"), (0.01, "4+4")]
    for values in wanted:
        store.put(compute(search.config(values)))
    store.put(compute(Config(**OPTIONS, fsd=2.0)))  # out of the range
    store.put(compute(Config(**OPTIONS, fsd=0.5, seed=1)))  # of another search
    trials = search.algorithm(store)._ot_study.trials
    assert sorted((trial.params["fsd"], trial.params["hidden"]) for trial in trials) == sorted(wanted)
    assert [trial.value for trial in trials] == [math.log(cell.loss) for cell in search.found(store)]
    assert search.left(store) == 3


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--over", "fsd"], "--over 'fsd' is not NAME=VALUE,VALUE,... nor NAME=LOW..HIGH"),
        (["--over", "colour=1,2"], "there is no option 'colour'; there are data, "),
        (["--over", "steps=1..9"], "steps is not a real number; list its values instead"),
        (["--over", "lr=0..1"], "a range must have 0 < LOW < HIGH"),
        (["--over", "lr=a,b"], "could not convert string to float"),
        (["--over", "rule=yes"], "rule=yes: it must be True or False"),
        (["--fsd", "1", "--over", "fsd=1,2"], "fsd is given twice"),
        (["--lr", "1", "--over", "lr=1,2"], "lr is given twice"),
        (["--fsd", "1,2", "--trials", "3"], "trials=3 has no effect where all values are listed"),
        (["--fsd", "1e-3..1", "--trials", "0"], "trials=0 is not allowed; it must be at least 1"),
        (["--method", "fixed", "--fsd", "1,2"], "fsd=1.0 is an option of --method apo"),
        (["--over", "method=fixed,pbt"], "--method pbt is a search on Ray Tune itself"),
    ],
)
def test_what_cannot_be_searched_is_refused(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    assert main(["sweep", *arguments, "--cells", str(tmp_path)]) == 2
    assert message in capsys.readouterr().err
