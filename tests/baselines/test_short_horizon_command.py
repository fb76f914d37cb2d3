"""The command on a small problem: what it stores, draws and says."""

import json
import re
from pathlib import Path

import pytest

from baselines.cli import main

SMALL = "--dimension 10 --steps 12 --sweep-steps 20 --horizons 1,20 --conditions 10 --noises 1 --runs 20 --workers 1"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("short-horizon")
    assert main(["short-horizon", *SMALL.split(), "--out", str(out)]) == 0
    return out


def test_results_hold_table_2_and_the_sweep(folder: Path) -> None:
    results = json.loads((folder / "results.json").read_text())
    assert list(results["table2"]["sgd"]) == ["optimal", "exponential", "linear", "fixed"]
    assert list(results["table2"]["apo"]) == [
        "optimal", "exponential", "linear", "linear_nonnegative", "linear_clipped", "fixed"
    ]  # fmt: skip
    for kind, families in results["table2"].items():
        assert families["optimal"] <= min(families["exponential"], families["fixed"]), kind
        for name, loss in families.items():
            sampled = results["schedules"][kind][name]["sampled"]
            assert abs(sampled["mean"] - loss) < 5.0 * sampled["error"]
    (sweep,) = results["sweep"]
    assert sweep["horizons"]["20"]["loss"][-1] < sweep["horizons"]["1"]["loss"][-1]
    assert sweep["horizons"]["1"]["loss"][-1] == pytest.approx(sweep["methods"]["greedy"]["loss"][-1], rel=1e-2)


def test_every_picture_of_the_report_is_there(folder: Path) -> None:
    text = (folder / "README.md").read_text()
    pictures = re.findall(r"\]\((\w+\.png)\)", text)
    assert len(pictures) == 3 and all((folder / picture).stat().st_size > 10_000 for picture in pictures)
    assert "Looking 1 step ahead ends at" in text


def test_a_setting_out_of_range_is_explained(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert main(["short-horizon", "--dimension", "1", "--out", str(tmp_path)]) == 2
    assert "dimension=1 is below 2" in capsys.readouterr().err


@pytest.mark.parametrize("option", ["--sweep-steps=0", "--horizons=1,0", "--horizons=", "--runs=-1", "--runs=1"])
def test_options_out_of_range_are_refused_before_anything_is_computed(option: str, tmp_path: Path) -> None:
    assert main(["short-horizon", option, "--out", str(tmp_path / "out")]) == 2
    assert not (tmp_path / "out").exists()
