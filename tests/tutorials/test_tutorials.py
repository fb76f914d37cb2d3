"""The tutorials run top to bottom, and the notebooks beside them are theirs, executed."""

import runpy
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final, NamedTuple

import jupytext
import matplotlib
import matplotlib.pyplot as plt
import nbformat
import pytest

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


SHORT: Final[dict[str, Short]] = {}


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
    assert all(output.name == "stdout" for output in outputs if output.output_type == "stream")
    assert any("image/png" in output.get("data", {}) for output in outputs)
