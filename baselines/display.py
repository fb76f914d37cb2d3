"""What a command shows while it trains: a live progress bar in a terminal, plain lines elsewhere."""

import itertools
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from types import FrameType

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from baselines.cells import Cell
from baselines.config import Config
from baselines.run import Row


def make_console() -> Console:
    """The console of a command: as wide as the terminal, and wide enough for a whole line where there is none."""
    return Console(width=None if sys.stdout.isatty() or "COLUMNS" in os.environ else 120, highlight=False, markup=False)


def number(value: float | None) -> str:
    """A loss or a learning rate with three digits; a dash where there is none."""
    return "-" if value is None else f"{value:.3g}"


def percent(value: float | None) -> str:
    """A fraction as a percentage with one decimal; a dash where there is none."""
    return "-" if value is None else f"{100 * value:.1f}%"


def setting(config: Config, names: Iterable[str]) -> str:
    """Some values of a configuration, each after its name."""
    values = ((name, getattr(config, name)) for name in names)
    return ", ".join(f"{name} {value:g}" if isinstance(value, float) else f"{name} {value}" for name, value in values)


def announce(console: Console, runs: str, seconds: float) -> None:
    """Say what is stored and what is to do, and what that will cost."""
    console.print(f"{runs}: about {seconds / 60:.0f} minutes of one core")


def counting(console: Console, describe: Callable[[Cell], str], of: str = "") -> Callable[[Cell], None]:
    """What shows cells as they are there, one a line.

    Args:
        console: Where.
        describe: What a cell is.
        of: What follows its number.
    """
    places = itertools.count(1)

    def show(cell: Cell) -> None:
        end = f"loss {number(cell.loss)}, {cell.about['wall']:.0f} s"
        console.print(f"{next(places)}{of}: {describe(cell)}: {end}", soft_wrap=True)

    return show


class Stage:
    """One run on show. Feed it every step's row."""

    def __init__(
        self, progress: Progress | None, console: Console, name: str, steps: int, done: int, lines: int
    ) -> None:
        """Begin at `done` of `steps` steps."""
        self.progress, self.console, self.name, self.steps = progress, console, name, steps
        self.between = max(1, steps // lines)  # steps from one plain line to the next
        self.test = ""
        self.evaluations = 0
        self.next_line = done
        if progress is not None:
            self.task = progress.add_task(name, total=steps, completed=done, values="")

    def update(self, step: int, row: Row | None) -> None:
        """Show that `step` steps are done, and the row if there is a new one."""
        evaluated = row is not None and row["test_loss"] is not None
        if row is not None and evaluated:
            classes = row["test_accuracy"] is not None
            self.test = f"accuracy {percent(row['test_accuracy'])}" if classes else f"test {number(row['test_loss'])}"
        if self.progress is not None:
            if row is not None:
                values = f"loss {number(row['loss']):<8} {self.test:<14}  lr {number(row['lr']):<8}"
                self.progress.update(self.task, completed=step, values=values)
        elif row is not None and evaluated and (step >= self.next_line or step == self.steps):
            self.next_line = step + self.between
            values = f"loss {number(row['loss'])}  {self.test}  lr {number(row['lr'])}"
            self.console.print(f"{self.name}: step {step}/{self.steps}  {values}", soft_wrap=True)


class Display:
    """Shows the runs of a command, one `Stage` each."""

    def __init__(self, console: Console, progress: Progress | None, lines: int) -> None:
        self.console, self.progress, self.lines = console, progress, lines

    def stage(self, name: str, steps: int, done: int = 0) -> Stage:
        """Begin to show a run of `steps` steps, `done` of which lie behind."""
        return Stage(self.progress, self.console, name, steps, done, self.lines)


@contextmanager
def display(console: Console, lines: int = 20) -> Iterator[Display]:
    """A display for the duration of the context: live in a terminal, elsewhere about so many lines a run."""
    if not console.is_terminal:
        yield Display(console, None, lines)
        return
    columns = (
        TextColumn("{task.description}"),
        BarColumn(bar_width=None),
        MofNCompleteColumn(),
        TextColumn("{task.fields[values]}"),
        TimeRemainingColumn(compact=True),
    )
    with Progress(*columns, console=console, expand=True) as progress:
        yield Display(console, progress, lines)


class Interrupt:
    """Turns the first SIGINT (Ctrl-C) or SIGTERM into a flag, so that the step in hand is finished and saved.

    A second one interrupts at once. Outside the main thread, where Python allows no handlers, it does nothing.
    """

    def __init__(self) -> None:
        self.asked = False

    def _handle(self, signum: int, frame: FrameType | None) -> None:
        if self.asked:
            raise KeyboardInterrupt
        self.asked = True

    def __enter__(self) -> "Interrupt":
        """Install the handlers."""
        if threading.current_thread() is threading.main_thread():
            self._before = {name: signal.signal(name, self._handle) for name in (signal.SIGINT, signal.SIGTERM)}
        else:
            self._before = {}
        return self

    def __exit__(self, *exception: object) -> None:
        """Put the handlers back that were there before."""
        for name, handler in self._before.items():
            signal.signal(name, handler)
