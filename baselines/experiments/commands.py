"""`python -m baselines run ...` and `report`: carry experiments out, and write what the cells say."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Final

from rich.console import Console

from baselines.cells import CELLS, Cell, Store
from baselines.display import announce, counting
from baselines.experiments import EXPERIMENTS
from baselines.experiments.base import Budget, Found
from baselines.experiments.report import figure, numbers, page
from baselines.experiments.scripts import SCRIPTS
from baselines.fingerprint import ROOT
from baselines.plans import Plan, carry_out, estimate, from_store, located
from baselines.plots import save
from baselines.storage import write_json, write_text

RESULTS: Final = ROOT / "docs" / "results"
SMOKE: Final = ROOT / "runs" / "smoke"
SCRATCH: Final = ROOT / "runs" / "cells"


def _where(budget: Budget, out: Path | None, cells: Path | None) -> tuple[Path, Path]:
    """Where reports and cells go: a smoke run leaves those of the project alone."""
    smoke = budget == "smoke"
    return out or (SMOKE if smoke else RESULTS), cells or (SMOKE / "cells" if smoke else CELLS)


def _write(console: Console, name: str, budget: Budget, found: Mapping[tuple[str, str], Found], out: Path) -> None:
    """Write an experiment's report, figure and numbers, from what was found by panel and label."""
    results: dict[str, list[Found]] = {}
    for (panel, _), each in found.items():
        results.setdefault(panel, []).append(each)
    experiment, folder = EXPERIMENTS[name], out / name
    lacking = [f"{label} ({panel})" for panel, label in experiment.plans(budget) if (panel, label) not in found]
    folder.mkdir(parents=True, exist_ok=True)
    write_json({"experiment": name, "budget": budget, "panels": numbers(results)}, folder / "results.json")
    save(figure(results, experiment.rows, experiment.along), folder / "figure.png")
    write_text(page(name, experiment, budget, results, lacking), folder / "README.md")
    console.print(f"{name}: {folder / 'README.md'}", soft_wrap=True)


def _what(cell: Cell) -> str:
    c = cell.config
    return f"{c.data} {c.model} {c.optimizer} {c.method} lr {c.lr:g} λ {c.fsd:g} seed {c.seed}"


def run(
    console: Console,
    names: Sequence[str],
    budget: Budget = "short",
    workers: int | None = None,
    older: bool = False,
    out: Path | None = None,
    cells: Path | None = None,
    data_dir: str | None = None,
) -> int:
    """Carry out experiments; cells that are there are not run again.

    Args:
        console: For the estimate and the progress.
        names: Of experiments.
        budget: smoke, short or full.
        workers: Processes; None: one a core; 0: this one.
        older: Whether cells of earlier code count.
        out: Where the reports go; None: docs/results, of a smoke run runs/smoke.
        cells: The folder of the store; None: results/cells, of a smoke run runs/smoke/cells.
        data_dir: Where the data sets are, if not in the usual places.

    Returns:
        The exit status.
    """
    out, cells = _where(budget, out, cells)
    for name in names:
        if name in SCRIPTS:
            console.print(f"{name}: {SCRIPTS[name].run(budget, out)}", soft_wrap=True)
    names = [name for name in names if name in EXPERIMENTS]
    if not names:
        return 0
    store = Store(cells, older=older)

    def make() -> dict[tuple[str, str, str], Plan[Found]]:
        """The plans of all curves, by experiment, panel and label."""
        named = [(name, key, plan) for name in names for key, plan in EXPERIMENTS[name].plans(budget).items()]
        return {(name, *key): located(plan, data_dir) for name, key, plan in named}

    plans = make()
    cost = estimate(make().values(), store)
    stored = f"{cost.stored} runs are stored, at least {cost.missing} are to do"
    announce(console, stored, cost.seconds)
    found = carry_out(plans, store, workers=workers, scratch=SCRATCH, report=counting(console, _what))
    for name in names:
        own = {(panel, label): found[of, panel, label] for of, panel, label in plans if of == name}
        _write(console, name, budget, own, out)
    return 0


def report(
    console: Console,
    names: Sequence[str] = (),
    budget: Budget = "short",
    older: bool = True,
    out: Path | None = None,
    cells: Path | None = None,
) -> int:
    """Write the reports of experiments from the cells that are stored, running nothing.

    What lacks cells is left out, and said so.

    Args:
        console: For what was written and what is lacking.
        names: Of experiments; none: all.
        budget: smoke, short or full.
        older: Whether cells of earlier code count.
        out: Where the reports go; None: docs/results, of a smoke run runs/smoke.
        cells: The folder of the store; None: results/cells, of a smoke run runs/smoke/cells.

    Returns:
        The exit status: 1 if one that was named lacks cells.

    Raises:
        ValueError: A name that no experiment with cells has.
    """
    if unknown := [name for name in names if name not in EXPERIMENTS]:
        raise ValueError(f"no experiment with cells is called {', '.join(unknown)}; there are {', '.join(EXPERIMENTS)}")
    out, cells = _where(budget, out, cells)
    store, status = Store(cells, older=older), 0
    for name in names or EXPERIMENTS:
        plans = EXPERIMENTS[name].plans(budget)
        found = {key: each for key, plan in plans.items() if (each := from_store(plan, store)) is not None}
        if found:
            _write(console, name, budget, found, out)
        if len(found) < len(plans):
            status = 1 if names else 0
            lack = f"{len(plans) - len(found)} of {len(plans)} curves lack cells"
            console.print(f"{name}: {lack}; python -m baselines run {name} --budget {budget}", soft_wrap=True)
    return status
