"""The programs of the pages on real training that have no test of their own run as they stand."""

from pathlib import Path
from typing import Any

import pytest

from tests.documents import programs


def run(page: str) -> dict[str, Any]:
    """The names that the programs of a page leave behind, each run after those before it."""
    names: dict[str, Any] = {}
    for program in programs(f"docs/training/{page}.md"):
        exec(program, names)
    return names


def test_models() -> None:
    """Each by itself."""
    found = programs("docs/training/models.md")
    assert found
    for program in found:
        exec(program, {})


@pytest.mark.filterwarnings("ignore:`torch.jit.script_method` is deprecated")
def test_compile() -> None:
    assert "opt" in run("compile")


def test_schedulers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    names = run("schedulers")
    assert names["scheduler"].get_last_lr() == [names["opt"].record.rates[0][-1]]


@pytest.mark.filterwarnings("ignore:a gradient is not finite")
def test_several_optimizers() -> None:
    names = run("several_optimizers")
    assert names["opt_g"].record[0]["step"] == 0.0
    hypers = names["both"].hypers()
    assert hypers["lr/0"] == pytest.approx(20 * hypers["lr/1"])
    assert len(names["body"].record) == len(names["head"].record) == 2
