"""What the documents promise is there: files that are linked to, names that are exported."""

import re
from pathlib import Path

import pytest

import apo
from tests.documents import ROOT

DOCUMENTS = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md")])
LINK = re.compile(r"\]\(([^)#\s]+)")


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_every_relative_link_leads_to_a_file(document: Path) -> None:
    links = [link for link in LINK.findall(document.read_text(encoding="utf-8")) if "://" not in link]
    missing = [link for link in links if not (document.parent / link).exists()]
    assert not missing


def test_every_public_name_is_documented() -> None:
    names = [name for name in apo.__all__ if name not in ("Params",)]  # an alias, documented beside its definition
    assert all((getattr(apo, name).__doc__ or "").strip() for name in names)


def test_the_changelog_names_what_is_public() -> None:
    text = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    assert all(f"apo.{name}" in text for name in ("APO", "Newton", "Gradient", "Proximal", "sgd", "rmsprop", "adamw"))


def test_no_file_of_the_library_is_long() -> None:
    lengths = {path: len(path.read_text(encoding="utf-8").splitlines()) for path in ROOT.glob("apo/**/*.py")}
    assert {str(path): count for path, count in lengths.items() if count > 300} == {}


def test_the_index_of_results_names_every_page() -> None:
    index = (ROOT / "docs/results/README.md").read_text(encoding="utf-8")
    pages = [path.parent.name for path in ROOT.glob("docs/results/*/README.md")]
    assert pages and [name for name in pages if f"({name}/README.md)" not in index] == []
