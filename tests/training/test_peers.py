"""What apo and its peers do in the same situations is what the table of docs/robustness.md says: the page is parsed."""

import re
import warnings
from pathlib import Path

import pytest

from tests.documents import ROOT
from tests.training.peers import BY_BACKWARD, PEERS
from tests.training.situations import loops, numbers, objects, processes, slopes, traces
from tests.training.situations.registry import SITUATIONS, outcome

PAGE = ROOT / "docs/robustness.md"
TEXT = PAGE.read_text(encoding="utf-8")
MODULES = (traces, slopes, loops, objects, numbers, processes)
PINNED = re.compile(r"\[`(?:\w+::)?(\w+)`\]\(([^)]+)\)")
BACKWARD = "; `.backward()`: "


def cells(line: str) -> list[str]:
    return [cell.strip() for cell in line.strip().strip("|").split(" | ")]


LINES = [cells(line) for line in TEXT.splitlines() if line.startswith("| ")]
HEADER, ROWS = LINES[0], {PINNED.findall(row[1])[0][0]: row for row in LINES[1:]}


def verdict(said: str) -> str:
    """What decides: holds, fails, n/a, or raises with the type of the error."""
    return " ".join(said.replace(":", " ").split()[: 2 if said.startswith("raises") else 1])


def measured(name: str, peer: str) -> str:
    """What the table should say of a peer."""
    said = outcome(name, PEERS[peer])
    if peer not in BY_BACKWARD or SITUATIONS[name].__module__ != slopes.__name__:
        return said
    other = outcome(name, BY_BACKWARD[peer])
    return said if verdict(other) == verdict(said) else f"{said}{BACKWARD}{other}"


def test_the_table_has_a_row_for_each_situation() -> None:
    assert HEADER == ["situation", "pinned by", *PEERS]
    assert {len(row) for row in ROWS.values()} == {len(HEADER)}
    assert sorted(ROWS) == sorted(SITUATIONS)
    assert {function.__module__ for function in SITUATIONS.values()} == {module.__name__ for module in MODULES}


@pytest.mark.parametrize("name", SITUATIONS)
def test_the_table_says_what_happens(name: str) -> None:
    for peer, said in zip(PEERS, ROWS[name][2:], strict=True):
        with warnings.catch_warnings():
            if peer != "apo":
                warnings.simplefilter("ignore")
            warnings.filterwarnings("ignore", "the objective or its gradient is not finite|the momentum of Muon")
            found = measured(name, peer)
        assert [verdict(part) for part in said.split(BACKWARD)] == [verdict(part) for part in found.split(BACKWARD)], (
            f"{peer} {found!r}, and the table says {said!r}"
        )


def test_what_pins_a_row_is_there() -> None:
    for function, path in PINNED.findall(TEXT):
        source = (PAGE.parent / path).read_text(encoding="utf-8")
        assert re.search(rf"^def {function}\(", source, re.MULTILINE), f"no {function} in {path}"


def test_of_apo_every_row_holds_or_is_refused_by_name() -> None:
    assert {verdict(row[2]) for row in ROWS.values()} <= {"holds", "raises ValueError"}


@pytest.mark.parametrize(
    "package", ["gradient-descent-the-ultimate-optimizer", "higher", "prodigyopt", "torch", "torchopt"]
)
def test_the_page_names_the_versions(package: str) -> None:
    constraints = Path(ROOT, "constraints.txt").read_text(encoding="utf-8")
    (version,) = re.findall(rf"^{package}==(\S+)$", constraints, re.MULTILINE)
    assert re.search(rf"{package} {re.escape(version)}\b", TEXT)
