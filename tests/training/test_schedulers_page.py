"""The programs of the pages on schedulers and compiling run as they stand."""

from pathlib import Path

import pytest

from tests.documents import programs


@pytest.mark.filterwarnings("ignore:`torch.jit.script_method` is deprecated")
@pytest.mark.parametrize("page", ["schedulers", "compile"])
def test_the_programs_of_the_page(page: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    names: dict[str, object] = {}
    for program in programs(f"docs/training/{page}.md"):
        exec(program, names)
    if page == "schedulers":
        found = names["opt"].record.rates[0]  # type: ignore[attr-defined]
        assert names["scheduler"].get_last_lr() == [found[-1]]  # type: ignore[attr-defined]
