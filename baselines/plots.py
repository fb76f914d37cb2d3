"""Pictures of runs, in Okabe and Ito's colours, which all kinds of colour vision tell apart."""

import io
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final, NamedTuple

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from baselines.run import COLUMNS, Row
from baselines.storage import replace_file

BLUE, VERMILION, GREEN, INK, GREY = "#0072B2", "#D55E00", "#009E73", "#222222", "#8a8a8a"
COLOURS: Final = (BLUE, GREEN, VERMILION)
WIDTHS: Final = {BLUE: 4.2, GREEN: 2.8, VERMILION: 1.5}  # drawn in this order, so that equal curves all show
DASHES: Final = (0, (4, 2))


def save(figure: Figure, path: Path) -> None:
    """Write a figure as PNG, replacing the file whole."""
    buffer = io.BytesIO()
    FigureCanvasAgg(figure).print_png(buffer)
    replace_file(path, lambda file: file.write(buffer.getvalue()))


def tidy(axes: Axes, xlabel: str, ylabel: str) -> None:
    """Label axes, and draw them thin."""
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


def training_figure(history: Sequence[Row], title: str, unit: str = "loss (nats)") -> Figure:
    """One run: batch and test loss, test accuracy if there is one, and what is tuned on log axes, over the epochs.

    Args:
        history: the run's rows.
        title: what was run.
        unit: what the loss is.
    """
    accuracy = [100 * fraction for fraction in column(history, "test_accuracy")[1]]
    tuned = ["lr", *(name for name in history[0] if name not in COLUMNS)]
    panels = 1 + bool(accuracy) + len(tuned)
    figure = Figure(figsize=(4 * panels, 3.8), layout="constrained")
    figure.suptitle(title, color=INK, fontsize=11)
    losses, *others = figure.subplots(1, panels)
    at, batch = column(history, "loss", "epoch")
    losses.plot(at, batch, color=BLUE, linewidth=1.2, label="training batches")
    at, test = column(history, "test_loss", "epoch")
    losses.plot(at, test, color=VERMILION, linewidth=1.8, label="test set")
    _log_if_positive(losses, batch + test)
    losses.legend(frameon=False, labelcolor=INK)
    tidy(losses, "epoch", unit)
    if accuracy:
        axes = others.pop(0)
        axes.plot(at, accuracy, color=VERMILION, linewidth=1.8)
        tidy(axes, "epoch", "test accuracy (%)")
    for name, axes in zip(tuned, others, strict=True):
        at, values = column(history, name, "epoch")
        axes.plot(at, values, color=GREEN, linewidth=1.8, drawstyle="steps-pre")
        _log_if_positive(axes, values)
        tidy(axes, "epoch", "learning rate" if name == "lr" else name)
    return figure


class Curve(NamedTuple):
    """One run of the demo: its method, initial learning rate, and history with a row a step."""

    method: str
    lr: float
    history: Sequence[Row]


def smoothed(values: Sequence[float], width: float = 0.05) -> list[float]:
    """A geometric average of the past whose memory is a fraction of the values so far: short at first, longer later.

    Geometric, as a loss is drawn on a log axis and one huge value should not hide those after it.
    """
    smooth: list[float] = []
    for place, value in enumerate(values):
        weight = 1.0 / (1.0 + width * place)
        logarithm = math.log(max(value, 1e-12)) if math.isfinite(value) else math.nan
        before = smooth[-1] if smooth and math.isfinite(smooth[-1]) else logarithm
        smooth.append((1 - weight) * before + weight * logarithm)
    return [math.exp(value) for value in smooth]


def _power(lr: float) -> str:
    """A learning rate as a label: 1, or a power of ten."""
    return "1" if lr == 1 else f"$10^{{{round(np.log10(lr))}}}$"


def _rates(axes: Axes, curves: Sequence[Curve], colours: dict[float, str]) -> None:
    """Learning rates on log axes: from each initial value, with tuning and without."""
    label: dict[str, Any] = {"textcoords": "offset points", "ha": "right", "fontsize": 11}
    ends = []
    for curve in curves:
        steps, lrs = column(curve.history, "lr")
        at = [step + 1 for step in steps]  # the rate that step number `at` starts from
        colour = colours[curve.lr]
        if curve.method == "apo":
            axes.plot(at, lrs, color=colour, linewidth=WIDTHS[colour], solid_capstyle="round")
            axes.plot(at[:1], lrs[:1], "o", color=colour, markersize=9)
            ends.append(lrs[-1])
        else:
            axes.plot(at, lrs, color=colour, linewidth=1.4, linestyle=DASHES)
            axes.annotate(f"alone: {_power(curve.lr)}", (at[-1], lrs[-1]), (0, -14), color=colour, **label)
    below = any(1 < lr / max(ends) < 20 for lr in colours)  # keep clear of the line just above
    text = " to ".join(dict.fromkeys(f"{end:.2g}" for end in (min(ends), max(ends))))
    axes.annotate(
        f"tuned by apo: {text}", (at[-1], max(ends)), (0, -24 if below else 24), color=INK, fontweight="bold", **label
    )
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.margins(y=0.08)
    axes.set_title("Learning rate", loc="left", color=INK, fontweight="bold")
    tidy(axes, "step", "learning rate")


def _losses(axes: Axes, curves: Sequence[Curve], colours: dict[float, str]) -> None:
    """Training losses on a log axis, smoothed."""
    lowest, first = np.inf, 1.0
    for curve in curves:
        epochs, batch = column(curve.history, "loss", "epoch")
        loss = smoothed(batch)
        finite = [value for value in loss if np.isfinite(value) and value > 0]
        lowest, first = min([lowest, *finite]), max(first, batch[0])
        tuned = curve.method == "apo"
        style: dict[str, Any] = (
            {"linewidth": WIDTHS[colours[curve.lr]]} if tuned else {"linewidth": 1.6, "linestyle": DASHES}
        )
        axes.plot(epochs, loss, color=colours[curve.lr], **style)
    axes.set_yscale("log")
    axes.set_ylim(lowest / 2, 5 * first)
    axes.set_title("Training loss", loc="left", color=INK, fontweight="bold")
    tidy(axes, "epoch", "loss of the batch, smoothed (nats)")


def demo_figure(curves: Sequence[Curve], title: str) -> Figure:
    """The demo's picture: how the tuned learning rates meet (left), training loss with and without tuning (right).

    Args:
        curves: runs of the methods "fixed" and "apo" from the same three initial learning rates.
        title: what was trained on what.
    """
    figure = Figure(figsize=(12, 5.2), layout="constrained", dpi=120)
    figure.suptitle(title, color=INK, fontsize=13)
    colours = dict(zip(sorted({curve.lr for curve in curves}), COLOURS, strict=True))
    rates, losses = figure.subplots(1, 2)
    _rates(rates, curves, colours)
    _losses(losses, curves, colours)
    handles = [Line2D([], [], color=INK, linewidth=3), Line2D([], [], color=INK, linewidth=1.5, linestyle=DASHES)]
    names = ["AdamW tuned by apo", "AdamW alone"]
    handles += [Line2D([], [], color=colour, linewidth=6) for colour in colours.values()]
    names += [f"initial LR {_power(lr)}" for lr in colours]
    figure.legend(handles, names, loc="outside lower center", ncols=5, frameon=False, labelcolor=INK)
    return figure
