"""Programs in the documents, and the examples."""

import importlib
import re
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).parents[1]


def programs(page: str) -> list[str]:
    """The ```python blocks of a page, in order; the page's path counts from the root of the project."""
    return re.findall(r"```python\n(.*?)```", (ROOT / page).read_text(encoding="utf-8"), re.DOTALL)


def example(name: str, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """A script of examples/ as a module; scripts there import each other by name."""
    monkeypatch.syspath_prepend(str(ROOT / "examples"))
    return importlib.import_module(name)
