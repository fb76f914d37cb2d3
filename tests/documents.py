"""Programs in the documents."""

import re
from pathlib import Path

ROOT = Path(__file__).parents[1]


def programs(page: str) -> list[str]:
    """The ```python blocks of a page, in order; the page's path counts from the root of the project."""
    return re.findall(r"```python\n(.*?)```", (ROOT / page).read_text(encoding="utf-8"), re.DOTALL)
