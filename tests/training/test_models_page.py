"""The programs of the page on models run."""

import pytest

from tests.documents import programs

PAGE = "docs/training/models.md"


@pytest.mark.parametrize("number", range(4))
def test_runs(number: int) -> None:
    found = programs(PAGE)
    assert len(found) == 4
    exec(found[number], {})
