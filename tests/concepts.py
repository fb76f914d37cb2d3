"""Lines of code in docs/concepts.md: ``python -m tests.concepts`` mends the numbers of those that have moved."""

import re

from tests.documents import ROOT

PAGE = ROOT / "docs" / "concepts.md"
LINK = re.compile(r"\[`([^`]+)`\]\(([^)#]+)#L(\d+)\)")


def mended(text: str) -> str:
    """The page with every link to a line, [`quoted code`](file#L1), at the only line of the file with that code.

    Raises:
        ValueError: If a line with the code is not there, or is not the only one.
    """

    def at(link: re.Match[str]) -> str:
        code, path, _ = link.groups()
        lines = (PAGE.parent / path).read_text(encoding="utf-8").splitlines()
        found = [number for number, line in enumerate(lines, 1) if code in line]
        if len(found) != 1:
            raise ValueError(f"`{code}` is in lines {found} of {path}: quote another part of the line that is meant")
        return f"[`{code}`]({path}#L{found[0]})"

    return LINK.sub(at, text)


if __name__ == "__main__":
    PAGE.write_text(mended(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
