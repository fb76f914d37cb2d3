"""The tutorials run top to bottom, and the notebooks beside them are theirs, executed."""

import math
import runpy
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final, NamedTuple

import jupytext
import matplotlib
import matplotlib.pyplot as plt
import nbformat
import pytest
import torch

from apo import oracle
from tests.documents import ROOT

TUTORIALS: Final = sorted(ROOT.glob("tutorials/[0-9]_*.py"))
HEADER: Final = "# ---\n# jupyter:\n#   jupytext:\n"
Globals = dict[str, Any]


class Short(NamedTuple):
    """A tutorial, as it is run here.

    Attributes:
        scale: The fraction of its steps.
        shows: Asserts on its globals that it showed what it says.
    """

    scale: float
    shows: Callable[[Globals], None]


def rosenbrock(shown: Globals) -> None:
    """Tuned, a learning rate finds the range that fixed ones miss, from any start; rho falls."""
    losses = {name: run["loss"][-1].item() for name, run in shown["runs"].items()}
    assert losses["APO, every=1"] < 0.5 * losses["fixed 1e-02"]
    assert losses["APO, every=10"] < 0.01 * losses["fixed 1e-03"] < losses["fixed 1e-04"]
    assert 0.05 < shown["runs"]["APO, every=1"]["lr"][-1] < 0.5
    assert shown["spread"][0] > 5e3
    assert shown["spread"][-1] < 4.0
    assert shown["both"]["rho"][-1] < 0.3


def noisy_quadratic(shown: Globals) -> None:
    """Greedy is behind longer looks and schedules, a fresh batch is greedy, and sampling agrees."""
    finals = {
        name: run.loss[-1].item() for kind in ("looking", "scheduled", "judged") for name, run in shown[kind].items()
    }
    greedy = finals["look 1 ahead (greedy)"]
    assert greedy > 1.3 * finals["look 10 ahead"]
    assert greedy > finals["best fixed lr"] > 2.0 * finals["best exponential lr"] > 4.0 * finals["best optimal lr"]
    assert finals["fresh batch, λ = 0"] == greedy
    assert finals["fresh batch, λ = 1"] > 2.0 * greedy
    assert finals["same batch, λ = 0"] >= finals["same batch, best fixed λ"] > finals["same batch, best exponential λ"]
    assert abs(shown["mean"] - shown["course"].loss[-1]) < 4.0 * shown["error"]
    assert shown["ratios"][1.0, 1.0] < 1.0 < 1.2 < shown["ratios"][100.0, 1.0]


def wrapped(shown: Globals) -> None:
    """Far-off starts meet, the ratio in a list stays, and a run that is resumed or replayed is the same."""
    found = [opt.hypers()["lr"] for opt, *_ in shown["adamw"].values()]
    assert max(found) < 8.0 * min(found)
    for opt, *_ in shown["lists"].values():
        assert opt.hypers()["lr/0"] == pytest.approx(20.0 * opt.hypers()["lr/1"], rel=1e-9)
    assert shown["same"] and shown["opt"].hypers() == shown["opt_2"].hypers()
    assert shown["replayed"] == shown["adamw"][1e-6][1:]


def written(shown: Globals) -> None:
    """The rule is Lion and pure, its slopes are those of differences, and both hyperparameters move."""
    assert shown["pure"] and shown["distance"] < 1e-15
    for slopes, differences in (shown["hard"], shown["soft"]):
        assert {name: slope.item() for name, slope in slopes.items()} == pytest.approx(differences, rel=1e-6, abs=1e-9)
    assert shown["hard"][0]["beta1"] == 0.0 != shown["soft"][0]["beta1"]
    assert shown["refusal"].startswith("beta1 shows its effect over many steps")
    for runs, names in ((shown["tuned"][0.01], ["lr"]), (shown["soft_tuned"], ["lr", "eps"])):
        for run in runs.values():
            columns = [run["opt"].record.column(name) for name in names]
            assert all(len(set(column)) > 1 for column in columns)
    losses = [run["loss"] for run in shown["tuned"][0.01].values()]
    assert max(losses) < shown["fixed"][1e-4]["loss"] / 2.0


def kfac(shown: Globals) -> None:
    """A fixed pair over the cliff diverges, and tuned from the same damping it does not; damping moves."""
    dampings = shown["dampings"]
    assert math.isinf(shown["runs"][1e-2, 1e-5][1])
    for run in (shown["tens"], shown["twos"]):
        assert all(run[damping][1] < 1.1 * run[damping][0][0] for damping in dampings)
        assert run[1e-1][1] < 0.9 * run[1e-1][0][0]
        assert all(len(set(run[damping][3].record.column("damping"))) > 1 for damping in dampings)
    assert shown["tens"][1e-5][3].hypers()["lr"] < shown["tens"][1e-1][3].hypers()["lr"]


def idealised_apo(shown: Globals) -> None:
    """The printed theorem fails, the corrected one holds, Newton is quadratic, and the oracle is ahead of rules."""
    stays = shown["swings"][0.25]
    assert stays.effective.min() ** 2 > 2.0 * oracle.bound(0.25, stays.losses[0].item(), len(stays.losses) - 1)
    assert shown["swings"][0.5].losses[-1] == 0.0
    for bounds, least in shown["measured"].values():
        assert bool((least <= bounds * (1.0 + 1e-9)).all())
    for name, ratios in shown["ratios"].items():
        assert 0.0 <= max(ratios) < shown["limits"][name] and shown["errors"][name][-1] < 1e-10
    ends = shown["losses"]
    assert ends["oracle"][-1] < min(ends["SGD, lr tuned"][-1], ends["K-FAC, lr tuned"][-1]) < ends["oracle"][0]


SHORT: Final[dict[str, Short]] = {
    "1_rosenbrock": Short(0.03, rosenbrock),
    "2_noisy_quadratic": Short(0.1, noisy_quadratic),
    "3_wrap_your_optimizer": Short(0.03, wrapped),
    "4_write_a_rule": Short(0.03, written),
    "5_kfac": Short(0.05, kfac),
    "6_idealised_apo": Short(0.03, idealised_apo),
}


def test_every_tutorial_is_run() -> None:
    assert sorted(SHORT) == [path.stem for path in TUTORIALS]


@pytest.mark.parametrize("name", SHORT)
def test_a_tutorial_runs_top_to_bottom(name: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("APO_TUTORIAL_SCALE", str(SHORT[name].scale))
    monkeypatch.chdir(tmp_path)
    matplotlib.use("Agg")
    try:
        SHORT[name].shows(runpy.run_path(str(ROOT / "tutorials" / f"{name}.py")))
        assert plt.get_fignums()
    finally:
        plt.close("all")
        torch.set_default_dtype(torch.float32)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("path", TUTORIALS, ids=lambda path: path.stem)
def test_a_notebook_is_its_tutorial_executed(path: Path) -> None:
    source = jupytext.read(path)
    notebook = nbformat.read(path.with_suffix(".ipynb"), as_version=4)
    assert path.read_text(encoding="utf-8").startswith(HEADER)
    assert [(cell.cell_type, cell.source) for cell in notebook.cells] == [
        (cell.cell_type, cell.source) for cell in source.cells
    ], "run `make notebooks`"
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in code] == list(range(1, len(code) + 1))
    outputs = [output for cell in code for output in cell.outputs]
    assert {output.output_type for output in outputs} <= {"stream", "display_data", "execute_result"}
    for cell in code:  # what is printed is one stream: several are several boxes on the page
        assert [output.name for output in cell.outputs if output.output_type == "stream"] in ([], ["stdout"])
    assert any("image/png" in output.get("data", {}) for output in outputs)
