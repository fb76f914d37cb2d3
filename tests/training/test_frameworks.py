"""The programs of docs/training/frameworks.md; without its package, an integration names the extra to install."""

import importlib
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.documents import programs


@pytest.mark.parametrize(
    ("integration", "package"), [("lightning", "lightning.pytorch"), ("transformers", "transformers")]
)
def test_without_its_package_an_integration_names_the_extra(
    integration: str, package: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    monkeypatch.delitem(sys.modules, f"apo.integrations.{integration}", raising=False)
    with pytest.raises(ImportError, match=f"install it, or apo with the extra {integration}"):
        importlib.import_module(f"apo.integrations.{integration}")


@pytest.mark.filterwarnings("ignore:.*LeafSpec:FutureWarning")
@pytest.mark.filterwarnings("ignore:The .* does not have many workers")
@pytest.mark.parametrize("number", range(3), ids=["lightning", "transformers", "accelerate"])
def test_the_programs_of_the_page_find_a_learning_rate(
    number: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    found = programs("docs/training/frameworks.md")
    scope: dict[str, Any] = {"__name__": "program"}
    exec(compile(found[number], "program", "exec"), scope)
    trainer = scope.get("trainer")
    shown = [
        lambda: trainer.callback_metrics["apo/lr"].item(),
        lambda: [entry["apo/lr"] for entry in trainer.state.log_history if "loss" in entry][-1],
        lambda: scope["opt"].hypers()["lr"],
    ]
    assert len(found) == len(shown) and 1e-4 < shown[number]() < 1e-1  # all of them start at 1e-6
