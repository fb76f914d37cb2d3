"""Run tutorials and store them as notebooks with their outputs: `python tutorials/execute.py 1_rosenbrock`, or all.

The same outputs give the same file: no times are kept, and a cell's id is its place.
"""

import sys
import time
from collections.abc import Sequence
from pathlib import Path

import jupytext
import nbformat
from nbclient import NotebookClient

HERE = Path(__file__).parent


def execute(path: Path) -> float:
    """Write the notebook of a tutorial beside it, and return the seconds that it took.

    Raises:
        CellExecutionError: A cell raised; the notebook is left as it was.
    """
    notebook = jupytext.read(path)
    started = time.perf_counter()
    NotebookClient(
        notebook, timeout=None, record_timing=False, coalesce_streams=True, resources={"metadata": {"path": HERE}}
    ).execute()
    for place, cell in enumerate(notebook.cells):
        cell.id = str(place)
    nbformat.write(notebook, path.with_suffix(".ipynb"))
    return time.perf_counter() - started


def main(names: Sequence[str]) -> None:
    """Run the tutorials of these names, or all."""
    for path in sorted(HERE.glob("[0-9]_*.py")):
        if not names or path.stem in names:
            print(f"{path.stem}: {execute(path):.0f} s", flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
