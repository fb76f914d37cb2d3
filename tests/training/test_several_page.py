"""The programs of the page on several optimizers, one after the other."""

from typing import Any

import pytest

from tests.documents import programs

PAGE = "docs/training/several_optimizers.md"


@pytest.mark.filterwarnings("ignore:a gradient is not finite")
def test_the_programs_run() -> None:
    names: dict[str, Any] = {}
    found = programs(PAGE)
    assert len(found) == 6
    for program in found:
        exec(compile(program, PAGE, "exec"), names)
    assert names["opt_g"].record[0]["step"] == 0.0
    hypers = names["both"].hypers()
    assert hypers["lr/0"] == pytest.approx(20 * hypers["lr/1"])
    assert len(names["body"].record) == len(names["head"].record) == 2
