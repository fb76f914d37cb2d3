"""Without its package, an integration names the extra to install."""

import importlib
import sys

import pytest


@pytest.mark.parametrize(
    ("integration", "package"), [("lightning", "lightning.pytorch"), ("transformers", "transformers")]
)
def test_without_its_package_an_integration_names_the_extra(
    integration: str, package: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    monkeypatch.delitem(sys.modules, f"apo.integrations.{integration}", raising=False)
    with pytest.raises(ImportError, match=rf"pip install 'apo\[{integration}\]'"):
        importlib.import_module(f"apo.integrations.{integration}")
