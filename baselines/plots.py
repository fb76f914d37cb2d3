"""Pictures of runs, in Okabe and Ito's colours, which all kinds of colour vision tell apart."""

import io
from collections.abc import Sequence
from pathlib import Path
from typing import Final, NamedTuple

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from baselines.run import Row
from baselines.storage import replace_file

BLUE, VERMILION, GREEN, INK, GREY = "#0072B2", "#D55E00", "#009E73", "#222222", "#8a8a8a"
COLOURS: Final = (BLUE, GREEN, VERMILION)


def save(figure: Figure, path: Path) -> None:
    """Write a figure as PNG, replacing the file whole."""
    buffer = io.BytesIO()
    FigureCanvasAgg(figure).print_png(buffer)
    replace_file(path, lambda file: file.write(buffer.getvalue()))


def _tidy(axes: Axes, xlabel: str, ylabel: str) -> None:
    axes.set_xlabel(xlabel, color=INK)
    axes.set_ylabel(ylabel, color=INK)
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color(GREY)
    axes.tick_params(colors=INK, which="both")
    axes.grid(True, which="major", color="#e6e6e6", linewidth=0.8)
    axes.set_axisbelow(True)


def column(history: Sequence[Row], name: str, x: str = "step") -> tuple[list[float], list[float]]:
    """A column of a history against another one, without the rows where it is empty."""
    pairs = [(row[x], row[name]) for row in history]
    kept = [(at, value) for at, value in pairs if at is not None and value is not None]
    return [at for at, _ in kept], [value for _, value in kept]


def _log_if_positive(axes: Axes, values: Sequence[float]) -> None:
    if any(value > 0 and np.isfinite(value) for value in values):
        axes.set_yscale("log")


def training_figure(history: Sequence[Row], title: str) -> Figure:
    """One run: batch and test loss, test accuracy, and the learning rate on a log axis, over the epochs."""
    figure = Figure(figsize=(12, 3.8), layout="constrained")
    figure.suptitle(title, color=INK, fontsize=11)
    losses, accuracy, rates = figure.subplots(1, 3)
    at, batch = column(history, "loss", "epoch")
    losses.plot(at, batch, color=BLUE, linewidth=1.2, label="training batches")
    at, test = column(history, "test_loss", "epoch")
    losses.plot(at, test, color=VERMILION, linewidth=1.8, label="test set")
    _log_if_positive(losses, batch + test)
    losses.legend(frameon=False, labelcolor=INK)
    _tidy(losses, "epoch", "loss (nats)")
    at, fractions = column(history, "test_accuracy", "epoch")
    accuracy.plot(at, [100 * fraction for fraction in fractions], color=VERMILION, linewidth=1.8)
    _tidy(accuracy, "epoch", "test accuracy (%)")
    at, lrs = column(history, "lr", "epoch")
    rates.plot(at, lrs, color=GREEN, linewidth=1.8)
    _log_if_positive(rates, lrs)
    _tidy(rates, "epoch", "learning rate")
    return figure


class Curve(NamedTuple):
    """One run of the demo: its method, initial learning rate, and history with a row a step."""

    method: str
    lr: float
    history: Sequence[Row]


def smoothed(values: Sequence[float], width: float = 0.02) -> list[float]:
    """An average of the past whose memory is a fraction of the values so far: short at first, longer later."""
    smooth: list[float] = []
    for place, value in enumerate(values):
        weight = 1.0 / (1.0 + width * place)
        smooth.append(value if not smooth else (1 - weight) * smooth[-1] + weight * value)
    return smooth


def _name(lr: float) -> str:
    return "1" if lr == 1 else f"$10^{{{round(np.log10(lr))}}}$"


def demo_figure(curves: Sequence[Curve], data: str) -> Figure:
    """The demo's picture: how the tuned learning rates meet (left), training loss with and without tuning (right)."""
    figure = Figure(figsize=(12, 4.8), layout="constrained", dpi=130)
    rates, losses = figure.subplots(1, 2)
    lrs = sorted({curve.lr for curve in curves})
    colours = dict(zip(lrs, COLOURS, strict=True))
    for curve in curves:
        colour, tuned = colours[curve.lr], curve.method == "apo"
        style = {"linestyle": "-" if tuned else (0, (4, 2)), "linewidth": 2.2 if tuned else 1.3, "color": colour}
        steps, values = column(curve.history, "lr")
        rates.plot([step + 1 for step in steps], values, **style)
        steps, values = column(curve.history, "loss")
        losses.plot(steps, smoothed(values), **style)
    return figure
