"""What the tuning did: one row of floats for each meta-step, to CSV and to a plot."""

import csv
import math
from collections.abc import Iterator
from os import PathLike

Row = dict[str, float]


class Record:
    """Rows of floats, one a meta-step.

    Columns, where they apply: ``step`` (steps taken before), ``objective`` (Q), ``loss`` (L_B at θ', or its change gᵀΔ
    where it is linearised), ``fsd`` and ``wsd`` (the penalties, weighted), ``slope`` and ``curvature`` (of Q along the
    step, at its start), ``hypergradient_norm`` (in unconstrained coordinates), ``scale`` (of the step that stayed
    committed, against the one that the initial learning rate gives), ``evaluations`` (forwards beyond the judgement
    itself), ``skipped`` (steps and meta-steps skipped so far because of numbers that are not finite),
    ``without_other`` (meta-steps so far that lacked B' for the FSD term), and every tuned hyperparameter as
    ``hypers()`` names it: its value for the next step.
    """

    def __init__(self) -> None:
        """Start empty."""
        self.rows: list[Row] = []

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

    def to_csv(self, path: str | PathLike[str]) -> None:
        """Write all rows as CSV, with a header.

        Args:
            path: The file to write.
        """
        with open(path, "w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, self.columns)
            writer.writeheader()
            writer.writerows(self.rows)

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
            raise ImportError("record.plot needs matplotlib: pip install 'apo[plot]'") from error
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
        figure.savefig(path)


_QUANTITIES = frozenset(
    "step objective loss fsd wsd slope curvature hypergradient_norm scale evaluations skipped without_other".split()
)
