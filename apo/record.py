"""What the tuning did: one row of floats for each meta-step, and the learning rates that came of it, step for step."""

import csv
import math
from array import array
from collections.abc import Iterator, Sequence
from os import PathLike, fspath

Row = dict[str, float]
RATE = "effective_lr/"
"""The columns of effective learning rates in a CSV file: this and the index of the group."""


class Record:
    """Rows of floats, one a meta-step.

    Columns, where they apply: ``step`` (steps taken before), ``objective`` (Q), ``loss`` (L_B at θ', or its change gᵀΔ
    where it is linearised), ``fsd`` and ``wsd`` (the penalties, weighted), ``slope`` and ``curvature`` (of Q along the
    step, at its start), ``hypergradient_norm`` (in unconstrained coordinates), ``scale`` (of the step that stayed
    committed, against the one that the initial learning rate gives), ``evaluations`` (forwards beyond the judgement
    itself), ``skipped`` (steps and meta-steps skipped so far because of numbers that are not finite),
    ``without_other`` (meta-steps so far that lacked B' for the FSD term), and every tuned hyperparameter as
    ``hypers()`` names it: its value for the next step.

    Attributes:
        rows: The rows.
        rates: The effective learning rate of every step, one array a group; NaN where parameters of a group differ.
        first: The number of steps taken before the first of these.
    """

    def __init__(self) -> None:
        """Start empty."""
        self.rows: list[Row] = []
        self.rates: list[array[float]] = []
        self.first = 0

    def __len__(self) -> int:
        """The number of meta-steps."""
        return len(self.rows)

    def __iter__(self) -> Iterator[Row]:
        """The rows in order."""
        return iter(self.rows)

    def __getitem__(self, position: int) -> Row:
        """One row."""
        return self.rows[position]

    def column(self, name: str) -> list[float]:
        """One column, NaN where a row has no entry."""
        return [row.get(name, math.nan) for row in self.rows]

    @property
    def columns(self) -> list[str]:
        """The names of all columns, in order of appearance."""
        return list(dict.fromkeys(name for row in self.rows for name in row))

    def note(self, step: int, rates: Sequence[float]) -> None:
        """Note the effective learning rate of each group in the step that was taken after a number of steps.

        After a return to an earlier step, what came after it is forgotten.
        """
        known = len(self.rates[0]) if self.rates else 0
        if not self.first <= step <= self.first + known:
            self.rates.clear()
        if not self.rates:
            self.first = step
        for group, rate in enumerate(rates):
            if group == len(self.rates):
                self.rates.append(array("d", [math.nan]) * (step - self.first))
            del self.rates[group][step - self.first :]
            self.rates[group].append(rate)

    def to_csv(self, path: str | PathLike[str]) -> None:
        """Write all rows as CSV, with a header, and the effective learning rates as columns "effective_lr/0", ...

        Steps between meta-steps have a row of their own where an effective learning rate changed, with nothing else in
        it.

        Args:
            path: The file to write.
        """
        rates = {self.first + at: array("d", row) for at, row in enumerate(zip(*self.rates, strict=True))}
        judged = {int(row["step"]) for row in self.rows}
        same = {step for step, row in rates.items() if step - 1 in rates and bytes(row) == bytes(rates[step - 1])}
        changed = sorted(rates.keys() - judged - same)
        rows = sorted([*self.rows, *({"step": float(step)} for step in changed)], key=lambda row: row["step"])
        names = [
            "step",
            *(name for name in self.columns if name != "step"),
            *(f"{RATE}{g}" for g in range(len(self.rates))),
        ]
        with open(fspath(path), "w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, names)
            writer.writeheader()
            for row in rows:
                writer.writerow(row | {f"{RATE}{g}": rate for g, rate in enumerate(rates.get(int(row["step"]), ()))})

    @classmethod
    def from_csv(cls, path: str | PathLike[str]) -> "Record":
        """Read what `to_csv` wrote.

        Args:
            path: The file to read.

        Returns:
            The record; an effective learning rate is taken to stay until the next row.

        Raises:
            ValueError: If it is no such file.
        """
        record = cls()
        with open(fspath(path), newline="", encoding="utf-8") as file:
            for cells in csv.DictReader(file):
                try:
                    row = {name: float(cell) for name, cell in cells.items() if cell}
                    step = int(row["step"])
                except (AttributeError, KeyError, TypeError, ValueError) as error:
                    raise ValueError(f"{path} is no file of record.to_csv: {error!r}") from error
                rates = [row.pop(name) for name in list(row) if name.startswith(RATE)]
                if len(row) > 1:
                    record.rows.append(row)
                if rates:
                    for between in range(record.first + len(record.rates[0]) if record.rates else step, step):
                        record.note(between, [column[-1] for column in record.rates])
                    record.note(step, rates)
        return record

    def plot(self, path: str | PathLike[str]) -> None:
        """Draw the objective and every hyperparameter against the step.

        Args:
            path: The picture to write; its ending says the format.

        Raises:
            ImportError: If matplotlib is not installed.
            ValueError: If there are no rows.
        """
        try:
            from matplotlib.figure import Figure
        except ImportError as error:
            raise ImportError("record.plot needs matplotlib; install it, or apo with the extra plot") from error
        if not self.rows:
            raise ValueError("the record is empty: no meta-step has been taken yet")
        hypers = [name for name in self.columns if name not in _QUANTITIES]
        names = list(dict.fromkeys(name.partition("/")[0] for name in hypers))
        figure = Figure(figsize=(7.0, 2.2 * (1 + len(names))), layout="constrained")
        axes = figure.subplots(1 + len(names), 1, sharex=True, squeeze=False)[:, 0]
        steps = self.column("step")
        axes[0].plot(steps, self.column("objective"), color="C0")
        axes[0].set_ylabel("objective Q")
        for axis, name in zip(axes[1:], names, strict=True):
            curves = [hyper for hyper in hypers if hyper.partition("/")[0] == name]
            for curve in curves:
                axis.plot(steps, self.column(curve), label=curve)
            axis.set_ylabel(name)
            axis.set_yscale("log")
            if 1 < len(curves) <= 12:
                axis.legend(fontsize="small")
        axes[-1].set_xlabel("steps taken")
        figure.savefig(fspath(path))


_QUANTITIES = frozenset(
    "step objective loss fsd wsd slope curvature hypergradient_norm scale evaluations skipped without_other".split()
)
