"""The command on a small problem: what it stores, draws and says."""

import json
import re
from pathlib import Path

import pytest

from baselines.cli import main
from baselines.horizon_report import text
from tests.documents import ROOT

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
    page = (folder / "README.md").read_text()
    pictures = re.findall(r"\]\((\w+\.png)\)", page)
    assert len(pictures) == 3 and all((folder / picture).stat().st_size > 10_000 for picture in pictures)
    assert "What it shows" not in page  # the words are about the paper's setting


EXACT = {
    "sgd": {"optimal": 2.609, "exponential": 3.823, "linear": 12.291, "fixed": 85.702},
    "apo": {
        "optimal": 5.600,
        "exponential": 6.937,
        "linear": 15.57,
        "linear_nonnegative": 41.99,
        "linear_clipped": 5.991,
        "fixed": 83.511,
    },
}
"""The optima that another solver found (adjoint gradients, many starts)."""


def test_the_stored_report_is_that_of_its_results_and_near_the_exact_optima() -> None:
    stored = ROOT / "docs" / "results" / "short_horizon"
    results = json.loads((stored / "results.json").read_text(encoding="utf-8"))
    page = (stored / "README.md").read_text(encoding="utf-8")
    assert page == text(results) and "Looking 1 step ahead ends at" in page
    assert results["setting"]["dimension"] == 1000 and results["seconds"]["table2"] < 120.0
    for kind, families in EXACT.items():
        assert results["table2"][kind] == pytest.approx(families, rel=1e-2)


def test_a_setting_out_of_range_is_explained(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert main(["short-horizon", "--dimension", "1", "--out", str(tmp_path)]) == 2
    assert "dimension=1 is below 2" in capsys.readouterr().err


@pytest.mark.parametrize("option", ["--sweep-steps=0", "--horizons=1,0", "--horizons=", "--runs=-1", "--runs=1"])
def test_options_out_of_range_are_refused_before_anything_is_computed(option: str, tmp_path: Path) -> None:
    assert main(["short-horizon", option, "--out", str(tmp_path / "out")]) == 2
    assert not (tmp_path / "out").exists()
