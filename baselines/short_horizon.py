"""`python -m baselines short-horizon`: the noisy quadratic in exact expectation, the paper's Table 2, and the bias.

Table 2 asks for the best schedule of a family after a given number of steps; the sweep asks what comes of looking only
so many steps ahead; and beside it stands what the methods do that choose for themselves.
"""

import multiprocessing
import time
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from itertools import product
from pathlib import Path
from typing import Any, Final, NamedTuple

import torch
from rich.console import Console
from rich.table import Table

import apo
from apo.checks import whole
from apo.problems import LEARNING_RATES, PENALTIES, Course, NoisyQuadratic, Policy, best, receding
from baselines.display import number
from baselines.horizon_report import bias_figure, schedules_figure, text
from baselines.plots import save
from baselines.storage import provenance, write_json, write_text

PAPER: Final = {
    "sgd": {"optimal": 3.3, "exponential": 4.6, "linear": 12.5, "fixed": 81.9},
    "apo": {"optimal": 4.69, "exponential": 6.73, "linear": 15.6, "fixed": 80.8},
}
"""Table 2 as printed (the paper, App. F)."""
UNIT: Final = 1e-100  # of length; a loss is in its square
FAMILIES: Final = {"sgd": LEARNING_RATES, "apo": PENALTIES}


class Setting(NamedTuple):
    """A noisy quadratic."""

    dimension: int
    condition: float
    noise: float

    def problem(self) -> NoisyQuadratic:
        """The problem in units of `UNIT`: in those of the paper, good schedules leave the range of float64."""
        return NoisyQuadratic(self.dimension, self.condition, self.noise * UNIT**2, 100.0 * UNIT)


def _digits(values: Sequence[float]) -> list[float]:
    return [float(f"{value:.6g}") for value in values]


def _losses(values: Sequence[float]) -> list[float]:
    """Losses in the units of the paper; infinite where float64 does not hold them."""
    return _digits([value / UNIT**2 for value in values])


def _course(course: Course, points: int | None = None) -> dict[str, list[float]]:
    """Losses after numbers of steps, and the learning rates of the steps to come: at all, or at some spaced evenly."""
    steps = course.rates.shape[-1]
    taken = range(steps + 1) if points is None else sorted({round(i * steps / points) for i in range(points + 1)})
    rates = [course.rates[min(step, steps - 1)].item() for step in taken]
    return {"steps": list(taken), "loss": _losses(course.loss[list(taken)].tolist()), "lr": _digits(rates)}


def best_of(setting: Setting, kind: str, family: str, steps: int, runs: int) -> dict[str, Any]:
    """The best schedule of a family: its loss, course and parameters, and what sampled runs say of it.

    Args:
        setting: the problem.
        kind: "sgd", whose learning rates are scheduled, or "apo", whose λ is.
        family: a key of `LEARNING_RATES` or `PENALTIES`.
        steps: of training.
        runs: sampled runs with the learning rates that came out; 0 leaves them out.
    """
    torch.set_num_threads(1)
    problem = setting.problem()
    policy = problem.scheduled if kind == "sgd" else problem.apo
    found = best(problem, policy, FAMILIES[kind][family], steps)
    course = problem.run(policy(found.sequence), steps)
    result = {
        "loss": found.loss / UNIT**2,
        "from_each_start": _losses(found.losses),
        "parameters": found.parameters.tolist() if len(found.parameters) <= 2 else None,
        "sequence": _digits(found.sequence.tolist()),
        "course": _course(course),
    }
    if runs:
        sampled = problem.simulate(apo.sgd(), course.rates, runs)[:, -1] / UNIT**2
        result["sampled"] = {"mean": sampled.mean().item(), "error": (sampled.std() / runs**0.5).item(), "runs": runs}
    return result


def methods(problem: NoisyQuadratic, steps: int) -> dict[str, Policy]:
    """Methods that choose the learning rate themselves, without a schedule made for the length of the run."""
    return {
        "greedy": problem.greedy(),
        "hypergradient descent": problem.hypergradient_descent(0.1, 0.3),
        "APO, same batch, λ = 0": problem.apo(0.0),
        "APO, fresh batch, λ = 0": problem.apo(0.0, fresh=True),
        "APO, fresh batch, λ = 1": problem.apo(1.0, fresh=True),
    }


def bias(setting: Setting, steps: int, horizons: Sequence[int]) -> dict[str, Any]:
    """What comes of every horizon, of methods that choose for themselves, and of the best of small families."""
    torch.set_num_threads(1)
    problem = setting.problem()
    looking = {h: problem.run(receding(problem, h, steps), steps) for h in horizons}
    own = {name: problem.run(policy, steps) for name, policy in methods(problem, steps).items()}
    made = {
        "SGD, best fixed lr": ("sgd", "fixed"),
        "SGD, best exponential lr": ("sgd", "exponential"),
        "APO, same batch, best fixed λ": ("apo", "fixed"),
        "APO, same batch, best exponential λ": ("apo", "exponential"),
    }
    for name, (kind, family) in made.items():
        policy = problem.scheduled if kind == "sgd" else problem.apo
        own[name] = problem.run(policy(best(problem, policy, FAMILIES[kind][family], steps).sequence), steps)
    return {
        "condition": setting.condition,
        "noise": setting.noise,
        "horizons": {str(h): _course(course, 200) for h, course in looking.items()},
        "methods": {name: _course(course, 200) for name, course in own.items()},
    }


def _table(cells: dict[str, dict[str, Any]]) -> Table:
    table = Table(title="Final loss of the best schedule of each family")
    for name in ("", "family", "the paper", "exact", "sampled"):
        table.add_column(name, justify="left" if name in ("", "family") else "right")
    for kind, families in cells.items():
        for family, cell in families.items():
            sampled = cell.get("sampled")
            seen = f"{sampled['mean']:.3f} ± {sampled['error']:.3f}" if sampled else "-"
            table.add_row(kind, family, number(PAPER[kind].get(family)), f"{cell['loss']:.3f}", seen)
    return table


def short_horizon(
    console: Console,
    steps: int = 300,
    sweep_steps: int = 1000,
    horizons: Sequence[int] = (1, 10, 100, 300, 1000),
    dimension: int = 1000,
    conditions: Sequence[float] = (100.0, 1000.0),
    noises: Sequence[float] = (1.0, 0.01),
    runs: int = 100,
    workers: int = 2,
    out: Path | None = None,
) -> int:
    """Run the command.

    Args:
        console: where to show it.
        steps: of training, for Table 2.
        sweep_steps: of training, for the sweep over horizons.
        horizons: how many steps a look ahead reaches.
        dimension: of the problem.
        conditions: condition numbers of the sweep; the first is Table 2's.
        noises: noise levels of the sweep; the first is Table 2's.
        runs: sampled runs beside each cell of Table 2; 0: none.
        workers: processes.
        out: the folder of `results.json`, `README.md` and the pictures; None: runs/short-horizon.

    Returns:
        The exit status, 0.

    Raises:
        ValueError: An option is out of its range, said before anything is computed.
    """
    for name, value in (("steps", steps), ("sweep_steps", sweep_steps), *(("horizons", each) for each in horizons)):
        whole(name, value)
    if not horizons or runs < 0 or runs == 1:
        raise ValueError(f"horizons={horizons}, runs={runs}: give one horizon or more, and 0 runs or at least 2")
    folder = out or Path("runs/short-horizon")
    folder.mkdir(parents=True, exist_ok=True)
    first = Setting(dimension, conditions[0], noises[0])
    started = time.perf_counter()
    with ProcessPoolExecutor(workers, multiprocessing.get_context("spawn")) as pool:
        cells = [(kind, family) for kind, families in FAMILIES.items() for family in families]
        cells.sort(key=lambda cell: cell[1] != "optimal")  # the longest first
        solved = {cell: pool.submit(best_of, first, *cell, steps, runs) for cell in cells}
        found = {kind: {f: solved[kind, f].result() for f in families} for kind, families in FAMILIES.items()}
        seconds = time.perf_counter() - started
        console.print(_table(found))
        settings = [Setting(dimension, condition, noise) for condition, noise in product(conditions, noises)]
        swept = list(pool.map(bias, settings, [sweep_steps] * len(settings), [horizons] * len(settings)))
    results = {
        "setting": {**first._asdict(), "steps": steps, "sweep_steps": sweep_steps},
        "table2": {kind: {name: cell["loss"] for name, cell in families.items()} for kind, families in found.items()},
        "paper": PAPER if (first, steps) == (Setting(1000, 100.0, 1.0), 300) else {kind: {} for kind in PAPER},
        "seconds": {"table2": seconds, "all": time.perf_counter() - started},
        "schedules": found,
        "sweep": swept,
        **provenance(torch.device("cpu")),
    }
    write_json(results, folder / "results.json")
    for kind, name in (("sgd", "figure_12.png"), ("apo", "figure_13.png")):
        save(schedules_figure(found[kind], kind), folder / name)
    save(bias_figure(swept[0]), folder / "horizons.png")
    page = text(results)
    write_text(page, folder / "README.md")
    console.print(f"{results['seconds']['all']:.0f} s. Report: {folder / 'README.md'}", soft_wrap=True)
    return 0
