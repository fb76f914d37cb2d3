"""The page of concepts points at the lines that it quotes, and leaves out no equation."""

import re

import pytest

from tests.concepts import LINK, PAGE, mended

TEXT = PAGE.read_text(encoding="utf-8")


def test_every_line_is_where_the_page_says() -> None:
    assert len(LINK.findall(TEXT)) > 70
    assert mended(TEXT) == TEXT, "lines have moved: run python -m tests.concepts"


def test_every_equation_of_the_paper_has_a_row() -> None:
    of_the_paper = TEXT.partition("## Apollo")[0]
    rows = [row.split("|")[1] for row in of_the_paper.splitlines() if row.startswith("|")]
    found = {name for row in rows for name in re.findall(r"\((A?\d+)\)", row)}
    assert found == {*map(str, range(1, 27)), "A1", "A2", "A3"}


def test_a_line_that_has_moved_is_found_again_and_one_that_is_gone_is_named() -> None:
    assert mended("[`H = TypeVar(`](../apo/types.py#L1)") != "[`H = TypeVar(`](../apo/types.py#L1)"
    with pytest.raises(ValueError, match="quote another part"):
        mended("[`no such code`](../apo/types.py#L1)")
    with pytest.raises(ValueError, match=r"lines \[\d+, \d+"):
        mended("[`TypeVar(`](../apo/types.py#L1)")
