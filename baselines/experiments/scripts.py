"""Experiments that train no network, and so have no cells: each is a script that writes a report of its own."""

import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Final, NamedTuple

from baselines.experiments.apo import PAPER
from baselines.experiments.base import Budget
from baselines.fingerprint import ROOT


class Script(NamedTuple):
    """A script that reproduces figures.

    Attributes:
        source: Where they are from.
        folder: Of the report.
        command: What Python is given, without --out.
        smoke: The arguments that make it short.
    """

    source: str
    folder: str
    command: tuple[str, ...]
    smoke: tuple[str, ...]

    def run(self, budget: Budget, out: Path) -> Path:
        """Run it in a process of its own; short is the whole of it.

        Returns:
            The folder that it wrote to.

        Raises:
            CalledProcessError: If it fails.
        """
        folder = out / self.folder
        arguments = self.smoke if budget == "smoke" else ()
        subprocess.run([sys.executable, *self.command, *arguments, "--out", str(folder)], cwd=ROOT, check=True)
        return folder


_ROSENBROCK: Final = ("examples/rosenbrock.py",)
_SMOKE_ROSENBROCK: Final = ("--steps", "20", "--every", "10", "--lrs", "1e-3", "--fixed-lrs", "1e-3")
_SMOKE_TABLE: Final = ("--steps", "6", "--sweep-steps", "8", "--horizons", "1,3", "--dimension", "8", "--runs", "3")
SCRIPTS: Final[Mapping[str, Script]] = {
    "apo-fig1": Script(f"{PAPER}, Fig. 1a and b, 9 and 10", "rosenbrock", _ROSENBROCK, _SMOKE_ROSENBROCK),
    "apo-fig1c": Script(
        f"{PAPER}, Fig. 1c and d",
        "ill_conditioned_regression",
        ("examples/ill_conditioned_regression.py",),
        ("--horizons", "20", "--every", "10", "--fixed-lrs", "1e-3"),
    ),
    "apo-table2": Script(
        f"{PAPER}, App. F: Table 2, Fig. 12 and 13",
        "short_horizon",
        ("-m", "baselines", "short-horizon"),
        (*_SMOKE_TABLE, "--conditions", "10", "--noises", "1"),
    ),
}
