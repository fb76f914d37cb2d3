"""The report of a search: a table by training loss, and the learning-rate schedule that every run made."""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

from matplotlib import colormaps
from matplotlib.figure import Figure

from baselines.cells import Cell
from baselines.display import number, percent, setting
from baselines.experiments.base import ROWS
from baselines.experiments.report import draw, origin
from baselines.plots import INK, save, tidy
from baselines.storage import write_json, write_text

PARTS: Final = {"start": 0.0, "¼": 0.25, "½": 0.5, "¾": 0.75, "end": 1.0}  # of a run
PANELS: Final = ("lr", "loss", "test_accuracy")


def _shown(value: Any) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)


def label(cell: Cell, names: Sequence[str]) -> str:
    """The searched values of a cell, each after its name."""
    return setting(cell.config, names) or cell.config.method


def rates(cell: Cell) -> list[float | None]:
    """The learning rate after each of `PARTS` of the steps that a run took."""
    curves = list(zip(cell.curves["step"], cell.curves["lr"], strict=True))
    return [next(lr for step, lr in curves if (step or 0.0) >= part * cell.steps) for part in PARTS.values()]


def table(cells: Sequence[Cell], names: Sequence[str]) -> str:
    """The cells as a table in Markdown, in their order."""
    head = [*names, "training loss", "log-loss area", "test accuracy", *(f"lr, {part}" for part in PARTS), "s a run"]
    lines = [f"| {' | '.join(head)} |", "|" + " ---: |" * len(head)]
    for cell in cells:
        ended = math.isfinite(cell.loss)
        row = [_shown(getattr(cell.config, name)) for name in names]
        row += [number(cell.loss), number(cell.area)] if ended else ["diverged", "-"]
        row += [percent(cell.outcome["test_accuracy"]), *map(number, rates(cell)), number(cell.outcome["seconds"])]
        lines.append(f"| {' | '.join(row)} |")
    return "\n".join(lines)


def figure(cells: Sequence[Cell], names: Sequence[str]) -> Figure:
    """Side by side: the schedule that each run made, the loss of its batches, and its test accuracy."""
    picture = Figure(figsize=(14, 4.4), layout="constrained", dpi=90)
    colours = colormaps["viridis"].resampled(len(cells) + 1)  # the last is too light
    for axes, name in zip(picture.subplots(1, len(PANELS)), PANELS, strict=True):
        for place, cell in enumerate(cells):
            draw(axes, name, cell, label=label(cell, names), color=colours(place), linewidth=1.6)
        if name != "test_accuracy":
            axes.set_yscale("log")
        tidy(axes, "step", ROWS[name])
    handles = picture.axes[0].get_legend_handles_labels()
    picture.legend(*handles, loc="outside right center", frameon=False, labelcolor=INK, fontsize=8)
    return picture


def write(folder: Path, names: Sequence[str], cells: Sequence[Cell]) -> None:
    """Write README.md, results.json and figure.png.

    Args:
        folder: Where.
        names: The fields that were searched.
        cells: With lower losses first.
    """
    folder.mkdir(parents=True, exist_ok=True)
    runs = [cell.to_json() | {"loss": cell.loss, "area": cell.area} for cell in cells]
    write_json({"over": list(names), "runs": runs}, folder / "results.json")
    in_order = sorted(cells, key=lambda cell: [getattr(cell.config, name) for name in names])
    save(figure(in_order, names), folder / "figure.png")
    config = cells[0].config
    devices, commits = origin(cells)
    parts = [
        f"# A search over {', '.join(names) or 'nothing'}",
        f"{config.model} on {config.data}, {config.optimizer} with {config.method}, {len(cells)} runs.",
        table(cells, names),
        "![The learning rates that the runs made, and their losses](figure.png)",
        "Training loss: on the whole training set in eval mode at the end. Area: the mean of the logarithm of the "
        "batch loss over the run. lr: the learning rate at the start, along the run and at its end; the figure shows "
        "the whole schedule of each run. Seconds: of training steps, on one thread.",
        f"Computed on {devices}, at {commits}.",
    ]
    write_text("\n\n".join(parts) + "\n", folder / "README.md")
