"""The report of the benchmarks: a table and a picture of every task, and the numbers behind them."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final, NamedTuple

from matplotlib.figure import Figure

from baselines.plots import BLUE, GREY, INK, VERMILION, save, tidy
from baselines.storage import write_json, write_text
from benchmarks.contestants import BARE, CONTESTANTS
from benchmarks.timing import Measured

HEAD: Final = (
    "",
    "ms a step",
    "of bare",
    "quartiles",
    "a meta-step, in bare steps",
    "peak bytes, of bare",
    "in weights",
)
MIB: Final = 2**20


class Outcome(NamedTuple):
    """What was measured on a task.

    Attributes:
        about: The task in words.
        weights: Bytes of the model's parameters.
        times: By contestant.
        peaks: Bytes at once, by contestant.
        seconds: The times of all rounds, by contestant.
    """

    about: str
    weights: int
    times: Mapping[str, Measured]
    peaks: Mapping[str, int]
    seconds: Mapping[str, list[float]]

    def row(self, name: str) -> list[str]:
        """A contestant's line of the table."""
        time, every = self.times[name], CONTESTANTS[name].every
        return [
            name,
            f"{1e3 * time.seconds:.2f}",
            f"{time.ratio:.2f}",
            f"{time.low:.2f}-{time.high:.2f}",
            f"{every * (time.ratio - 1):.1f}" if ", every " in name else "",
            f"{self.peaks[name] / self.peaks[BARE]:.2f}",
            f"{(self.peaks[name] - self.peaks[BARE]) / self.weights:+.2f}",
        ]

    def table(self) -> str:
        """In Markdown."""
        lines = [f"| {' | '.join(HEAD)} |", "|---|" + "---:|" * (len(HEAD) - 1)]
        return "\n".join(lines + [f"| {' | '.join(self.row(name))} |" for name in self.times])

    def numbers(self) -> dict[str, Any]:
        """Plain values."""
        return {
            "about": self.about,
            "weights": self.weights,
            "contestants": {
                name: {**time._asdict(), "peak": self.peaks[name], "rounds": self.seconds[name]}
                for name, time in self.times.items()
            },
        }


def figure(outcomes: Mapping[str, Outcome]) -> Figure:
    """Ratios to the bare optimizer, with their quartiles, one panel a task."""
    most = max(len(outcome.times) for outcome in outcomes.values())
    picture = Figure(figsize=(5.0 * len(outcomes) + 1.5, 0.26 * most + 1.2), layout="constrained", dpi=90)
    panels = picture.subplots(1, len(outcomes), squeeze=False, sharey=True)[0]
    for axes, (name, outcome) in zip(panels, outcomes.items(), strict=True):
        for place, (label, time) in enumerate(outcome.times.items()):
            colour = VERMILION if CONTESTANTS[label].peer else GREY if label == BARE else BLUE
            axes.plot([time.low, time.high], [place] * 2, color=colour, linewidth=3.0, alpha=0.4)
            axes.plot([time.ratio], [place], "o", color=colour, markersize=5)
        axes.axvline(1.0, color=GREY, linewidth=0.8)
        axes.set_xscale("log", base=2)
        axes.set_yticks(range(len(outcome.times)), list(outcome.times))
        axes.xaxis.set_major_formatter("{x:g}")
        axes.set_title(name, color=INK)
        tidy(axes, "time of a step, of bare Adam's", "")
    panels[0].invert_yaxis()
    return picture


def write(folder: Path, outcomes: Mapping[str, Outcome], about: Mapping[str, Any], command: str, rounds: int) -> None:
    """Write `README.md`, `figure.png` and `results.json`."""
    folder.mkdir(parents=True, exist_ok=True)
    clock = "GPU time by events" if about["device"].startswith("cuda") else "CPU time, one thread"
    parts = [
        "# What a training step costs",
        f"    {command}",
        f"Forward, backward and step, by {clock}, on {about['device']}, torch {about['versions']['torch']}. Every "
        f"contestant takes a block of steps in each of {rounds} rounds, in an order that turns; ratios are to bare "
        "Adam in the same round: medians and quartiles. All train by Adam. `every` is how often the learning rate is "
        "moved; λ is 0 unless it is given, and then the discrepancy is measured on a whole batch unless it says "
        "otherwise. Peak bytes are those of all tensors that live at once, from before the model is made; the last "
        "column is what they exceed the bare optimizer's by, in copies of the weights.",
    ]
    for name, outcome in outcomes.items():
        size = f"{outcome.weights / MIB:.1f} MiB of weights"
        parts += [f"## {name}", f"{outcome.about}, {size}.", outcome.table()]
    parts.append("![Ratios to the bare optimizer](figure.png)")
    write_text("\n\n".join(parts) + "\n", folder / "README.md")
    save(figure(outcomes), folder / "figure.png")
    numbers = {name: outcome.numbers() for name, outcome in outcomes.items()}
    write_json({**about, "rounds": rounds, "tasks": numbers}, folder / "results.json")
