"""The report of an experiment: a table, a figure in the layout of the source, and the numbers behind both."""

import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from statistics import fmean
from typing import Any, Final

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from baselines.cells import FLOOR, Cell
from baselines.display import number
from baselines.experiments.base import Budget, Experiment, Found, pace
from baselines.judge import compare, mean_loss, score
from baselines.plots import BLUE, GREEN, INK, VERMILION, tidy

COLOURS: Final = (BLUE, VERMILION, GREEN, "#CC79A7", "#E69F00", "#56B4E9", "#8C564B", INK, "#999933", "#882255")
HEAD: Final = (
    "",
    "won",
    "training loss",
    "spread",
    "log-loss area",
    "test",
    "against",
    "ratio",
    "verdict",
    "cost",
    "s a run",
    "s with its search",
)
Results = Mapping[str, Sequence[Found]]  # by panel


def _number(value: float) -> str:
    return number(value if math.isfinite(value) else None)


def _test(cells: Sequence[Cell], measure: str) -> str:
    """What the runs come to on the test set, the mean over seeds; empty where one diverged or was not measured."""
    name = "test_accuracy" if measure == "accuracy" else "test_loss"
    known = [value for cell in cells if (value := cell.outcome[name]) is not None]
    if len(known) < len(cells) or not all(cell.finished for cell in cells):
        return ""
    if measure == "accuracy":
        return f"{100 * fmean(known):.1f}"
    return _number(fmean(map(math.exp, known)) if measure == "perplexity" else fmean(known))


def _row(found: Found, reference: Found | None, measure: str) -> list[str]:
    cells = found.cells
    loss, scores = mean_loss(cells), [score(cell) for cell in cells]
    comparison = compare(cells, reference.cells) if reference else None
    ended = math.isfinite(loss)
    bound = "≤ " if loss <= FLOOR * (1 + 1e-9) else ""  # all seeds are at the floor
    return [
        found.curve.label,
        found.setting,
        f"{bound}{_number(loss)}" if ended else "diverged",
        f"×{math.exp(max(scores) - min(scores)):.2f}" if ended and len(scores) > 1 else "",
        _number(fmean(cell.area for cell in cells)),
        _test(cells, measure),
        reference.curve.label if reference else "",
        _number(comparison.ratio) if comparison else "",
        comparison.verdict if comparison else "",
        _number(pace(cells) / pace(reference.cells)) if reference else "",
        f"{found.seconds:.0f}",
        f"{found.search_seconds:.0f}",
    ]


def _with_references(founds: Sequence[Found]) -> list[tuple[Found, Found | None]]:
    """What was found of a panel's curves, each with that of the one that it is compared with, if it is there."""
    by_label = {found.curve.label: found for found in founds}
    return [(found, by_label.get(found.curve.against or "")) for found in founds]


def origin(cells: Iterable[Cell]) -> tuple[str, str]:
    """The devices and the commits that cells were computed on and at."""
    abouts = [cell.about for cell in cells]
    devices, commits = {each["device"] for each in abouts}, {str(each["commit"])[:7] for each in abouts}
    return ", ".join(sorted(devices)), ", ".join(sorted(commits))


def table(founds: Sequence[Found], measure: str = "accuracy") -> str:
    """One panel as a table in Markdown; `measure` is what it gives of the test set."""
    head = [f"test {measure}" if name == "test" else name for name in HEAD]
    lines = [f"| {' | '.join(head)} |", "| --- | --- |" + " ---: |" * (len(HEAD) - 2)]
    lines += [f"| {' | '.join(_row(*pair, measure))} |" for pair in _with_references(founds)]
    return "\n".join(lines)


def draw(axes: Axes, name: str, cell: Cell, along: str = "step", **style: Any) -> None:
    """A curve of a run, without the rows where it is empty."""
    curves = cell.curves
    scale = 100.0 if name == "test_accuracy" else 1.0
    if name not in curves:
        return
    points = [(at, scale * y) for at, y in zip(curves[along], curves[name], strict=True) if at and y is not None]
    axes.plot([at for at, _ in points], [y for _, y in points], **style)


def _bottom(cells: Sequence[Cell]) -> float | None:
    """Below the learning rates of all but the last twentieth of the runs: schedules that end at 0 dwarf the others."""
    pairs = [
        (at, lr, cell.steps) for cell in cells for at, lr in zip(cell.curves["step"], cell.curves["lr"], strict=True)
    ]
    kept = [lr for at, lr, steps in pairs if at and lr and lr > 0.0 and at <= 0.95 * steps]
    return 0.5 * min(kept) if kept else None


def figure(results: Results, rows: Mapping[str, str], along: str = "step") -> Figure:
    """What a run shows in rows, over steps or seconds, the panels in columns; the first seed of every winner."""
    picture = Figure(figsize=(4.6 * len(results), 3.2 * len(rows)), layout="constrained", dpi=90)
    grid = picture.subplots(len(rows), len(results), squeeze=False)
    for place, (panel, founds) in enumerate(results.items()):
        for axes, (name, label) in zip(grid[:, place], rows.items(), strict=True):
            for found, colour in zip(founds, COLOURS * 3, strict=False):
                own = found.cells[0].config.method == "apo"
                style = {"color": colour, "linewidth": 2.0 if own else 1.3, "linestyle": "-" if own else "--"}
                draw(axes, name, found.cells[0], along, label=found.curve.label, **style)
            if name != "test_accuracy":
                axes.set_yscale("log")
            if name == "lr":
                axes.set_ylim(bottom=_bottom([found.cells[0] for found in founds]))
            tidy(axes, along, label if place == 0 else "")
        grid[0, place].set_title(panel, color=INK)
        below: dict[str, Any] = {"loc": "upper center", "bbox_to_anchor": (0.5, -0.2)}
        grid[-1, place].legend(frameon=False, labelcolor=INK, fontsize=8, **below)
    return picture


def numbers(results: Results) -> dict[str, Any]:
    """What the table and the figure are made of, by panel and label."""
    return {
        panel: {
            found.curve.label: {
                "won": found.setting,
                "train_loss": [cell.loss for cell in found.cells],
                "test_accuracy": [cell.outcome["test_accuracy"] for cell in found.cells],
                "test_loss": [cell.outcome["test_loss"] for cell in found.cells],
                "area": [cell.area for cell in found.cells],
                "seconds": [cell.outcome["seconds"] for cell in found.cells],
                "search_seconds": found.search_seconds,
                "tried": {found.tried_setting(cell): cell.loss for cell in found.tried},
            }
            for found in founds
        }
        for panel, founds in results.items()
    }


def summary(results: Results) -> list[str]:
    """What the verdicts come to: a line for each label that is compared with another one."""
    counted: dict[tuple[str, str], Counter[str]] = {}
    for founds in results.values():
        for found, reference in _with_references(founds):
            if reference is not None:
                verdict = compare(found.cells, reference.cells).verdict
                counted.setdefault((found.curve.label, reference.curve.label), Counter())[verdict] += 1
    return [
        f"- **{label}** against {other}: " + ", ".join(f"{verdict} in {n}" for verdict, n in counts.most_common())
        for (label, other), counts in counted.items()
    ]


def page(name: str, experiment: Experiment, budget: Budget, results: Results, lacking: Sequence[str]) -> str:
    """The report in Markdown; `lacking` are the curves that have not been run."""
    cells = [cell for founds in results.values() for found in founds for cell in (*found.cells, *found.tried)]
    devices, commits = origin(cells)
    parts = [
        f"# {experiment.title}",
        f"{experiment.source}.",
        f"    python -m baselines run {name} --budget {budget}",
        experiment.departs[budget],
    ]
    if lacking:
        parts.append(f"Not run yet: {', '.join(lacking)}.")
    if lines := summary(results):
        parts += ["By the verdicts of the panels below:", "\n".join(lines)]
    for panel, founds in results.items():
        parts += [f"## {panel}", table(founds, experiment.test)]
    perplexity = experiment.test == "perplexity"
    seeds = max(len(found.cells) for founds in results.values() for found in founds)
    parts += [
        f"![{', '.join(experiment.rows.values())}](figure.png)",
        f"Loss: on the whole training set in eval mode at the end, the geometric mean over up to {seeds} seeds; losses "
        f"under {FLOOR:g} count as {FLOOR:g}. Spread: the largest over the smallest. Area: the mean over the run of "
        "the logarithm of the batch loss. Ratio: of the losses; better or worse when its logarithm is beyond two "
        "standard errors. Cost: the time of a training step over that of the other's. Seconds: of CPU time in training "
        "steps, on one thread (on a GPU: of wall-clock time); a search is with one seed."
        + (" Perplexity: the exponential of the test loss, the mean over seeds." if perplexity else ""),
        f"Computed on {devices}, one thread a run, at {commits}.",
    ]
    return "\n\n".join(parts) + "\n"
