"""Plans: what to run next, given what came out. Many plans share the cores, the store, and each other's cells.

A plan is a generator that yields the configurations that it needs, is sent their cells, and returns what it found.
"""

import dataclasses
import math
import multiprocessing
import os
import threading
import time
from collections.abc import Callable, Generator, Hashable, Iterable, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from pathlib import Path
from statistics import median
from typing import Any, Final, NamedTuple, TypeVar, cast

import torch

from baselines.cells import Cell, Store, compute, missing
from baselines.config import Config
from baselines.data import Data
from baselines.judge import rank
from baselines.models import MODELS
from baselines.run import Run, load_task

Found = TypeVar("Found")
Key = TypeVar("Key", bound=Hashable)
Plan = Generator[list[Config], list[Cell], Found]

MANTISSAS: Final = (1.0, 3.0)
PLACES: Final = range(-24, 12)  # of the grid: 1e-12 to 3e5
STAND_IN: Final[dict[str, list[float | None]]] = {"step": [0, 1], "loss": [None, 1.0]}
PROBED: Final = 5  # steps that are timed where no cell tells the pace,
EVALUATED: Final = 500  # and examples of which the evaluation is


def grid(place: int) -> float:
    """The 1-3-10 grid: ..., 1e-3 (-6), 3e-3 (-5), 1e-2 (-4), ..., 1 (0), 3 (1), 10 (2), ..."""
    decade, third = divmod(place, 2)
    return float(f"{MANTISSAS[third]:g}e{decade}")


def place_of(value: float) -> int:
    """The place of the grid's value that is nearest to a number."""
    return min(PLACES, key=lambda place: abs(math.log(grid(place) / value)))


def walk(config: Config, *, name: str = "lr") -> Plan[list[Cell]]:
    """Walk the 1-3-10 grid from a configuration's own value of `name` until the best value has worse neighbours.

    Both neighbours are tried first; then the walk goes on beyond the end that is best so far.

    Args:
        config: Where to start.
        name: The field that is walked.

    Returns:
        The cells of all values tried, the best first.
    """
    middle = place_of(getattr(config, name))
    tried: dict[int, Cell] = {}
    wanted = [middle - 1, middle, middle + 1]
    while wanted:
        values: list[dict[str, Any]] = [{name: grid(place)} for place in wanted]
        cells = yield [dataclasses.replace(config, **value) for value in values]
        tried |= dict(zip(wanted, cells, strict=True))
        best = min(tried, key=lambda place: (rank(tried[place]), abs(place - middle)))
        if not math.isfinite(tried[best].loss):
            best = min(tried)  # nothing has ended yet: smaller values are safer
        wanted = [place for place in (best - 1, best + 1) if place not in tried and place in PLACES]
    return sorted(tried.values(), key=rank)


def search(configs: Sequence[Config]) -> Plan[list[Cell]]:
    """Run all configurations; their cells, the best first."""
    cells = yield list(configs)
    return sorted(cells, key=rank)


def repeat(cell: Cell, seeds: int) -> Plan[list[Cell]]:
    """The same configuration with as many seeds, the cell's own first."""
    others = [seed for seed in range(seeds) if seed != cell.config.seed][: seeds - 1]
    return [cell, *(yield [dataclasses.replace(cell.config, seed=seed) for seed in others])]


def best_of(plan: Plan[list[Cell]], seeds: int) -> Plan[tuple[list[Cell], list[Cell]]]:
    """Search with one seed, and give only the winner all of them.

    Returns:
        The winner's cells, one a seed, and all that was tried.
    """
    tried = yield from plan
    winners = yield from repeat(tried[0], seeds)
    return winners, tried


def located(plan: Plan[Found], data_dir: str | None) -> Plan[Found]:
    """A plan whose data sets are read from a folder, but for the one that comes with scikit-learn."""
    try:
        wanted = next(plan)
        while True:
            places = [None if config.data == "digits" else data_dir for config in wanted]
            cells = yield [dataclasses.replace(c, data_dir=place) for c, place in zip(wanted, places, strict=True)]
            wanted = plan.send(cells)
    except StopIteration as stop:
        return cast(Found, stop.value)


def _answer(plan: Plan[Any], give: Callable[[Config], Cell | None]) -> Generator[list[Config], None, Any]:
    """Drive a plan, yielding the configurations that it waits for whenever `give` has not got them all."""
    try:
        wanted = next(plan)
        while True:
            while absent := [config for config in wanted if give(config) is None]:
                yield absent
            cells = [cell for config in wanted if (cell := give(config)) is not None]
            wanted = plan.send(cells)
    except StopIteration as stop:
        return stop.value


def carry_out(
    plans: Mapping[Key, Plan[Any]],
    store: Store,
    *,
    workers: int | None = None,
    scratch: Path | None = None,
    report: Callable[[Cell], None] = lambda cell: None,
) -> dict[Key, Any]:
    """Carry out plans side by side, storing each cell as it is there.

    Args:
        plans: By name.
        store: Where cells come from and go to.
        workers: Processes of one thread each; None: one a core; 0: this process.
        scratch: Where runs that are under way leave checkpoints.
        report: Called with each new cell.

    Returns:
        What each plan returned.
    """
    driven = {name: _answer(plan, store.get) for name, plan in plans.items()}
    found: dict[Key, Any] = {}
    under_way: dict[Future[Cell], Config] = {}

    def advance(pool: ProcessPoolExecutor | None) -> None:
        """Let every plan ask for what it needs, and start what nobody has started."""
        for name in [name for name in driven if name not in found]:
            try:
                wanted = next(driven[name])
            except StopIteration as stop:
                found[name] = stop.value
                continue
            for config in missing(wanted, store):
                if pool is None:
                    keep(compute(config, scratch))
                elif config not in under_way.values():
                    under_way[pool.submit(compute, config, scratch)] = config

    def keep(cell: Cell) -> None:
        store.put(cell)
        report(cell)

    if workers == 0:
        while len(found) < len(driven):
            advance(None)
        return {name: found[name] for name in plans}
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(workers or os.cpu_count(), context, initializer=end_with_parent) as pool:
        advance(pool)
        while under_way:
            done, _ = wait(under_way, return_when=FIRST_COMPLETED)
            for future in done:
                del under_way[future]
                keep(future.result())
            advance(pool)
    return {name: found[name] for name in plans}


def end_with_parent() -> None:
    """End this process when the one that started it does, also if that is killed; checkpoints are what remains."""
    parent: Any = multiprocessing.parent_process()

    def watch() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def from_store(plan: Plan[Found], store: Store) -> Found | None:
    """What a plan finds in the cells that are stored; None if it needs others."""
    driven = _answer(plan, store.get)
    try:
        next(driven)
    except StopIteration as stop:
        return cast(Found, stop.value)
    return None


class Estimate(NamedTuple):
    """What carrying out plans will cost, at the least.

    Attributes:
        stored: Cells that are there already.
        missing: Cells that are not, if every walk finds its optimum where it starts.
        seconds: Of computing them, on one core.
    """

    stored: int
    missing: int
    seconds: float


def estimate(plans: Iterable[Plan[Any]], store: Store) -> Estimate:
    """The cost of plans, which are used up: from the pace of stored cells, or of a few steps where there are none."""
    asked: dict[Config, bool] = {}

    def give(config: Config) -> Cell:
        cell = store.get(config)
        asked[config] = cell is not None
        return cell or Cell(config, "", True, 1, 0, {"train_loss": 1.0, "seconds": None}, STAND_IN, {})

    for plan in plans:
        for _ in _answer(plan, give):
            raise AssertionError("every cell was given")
    paces: dict[tuple[Any, ...], float] = {}
    tasks: dict[tuple[Any, ...], Data] = {}
    seconds = 0.0
    for config in [config for config, stored in asked.items() if not stored]:
        kind = _kind(config)
        if kind not in paces:
            known = [cell.about["wall"] for cell in store if _kind(cell.config) == kind and cell.finished]
            if not known:
                task = (config.data, config.examples, config.label_noise, MODELS[config.model].reconstructs)
                tasks[task] = tasks.get(task) or load_task(config)
                known = [_probe(config, tasks[task])]
            paces[kind] = median(known)
        seconds += paces[kind]
    return Estimate(sum(asked.values()), len(asked) - sum(asked.values()), seconds)


def _kind(config: Config) -> tuple[Any, ...]:
    """What a run's duration depends on."""
    values = {field.name: getattr(config, field.name) for field in dataclasses.fields(config)}
    return tuple(
        value for name, value in values.items() if name not in ("lr", "seed", "fsd", "wsd", "damping", "data_dir")
    )


def _probe(config: Config, data: Data) -> float:
    """The seconds that a run will take, from a few of its steps and an evaluation; of all networks it trains."""
    torch.set_num_threads(1)
    run = Run(config, data)
    run.advance()
    started = time.perf_counter()
    timed = min(PROBED, run.steps // 4)
    for _ in range(timed):
        run.advance()
    step = (time.perf_counter() - started) / max(timed, 1)
    started = time.perf_counter()
    inputs, targets = (part[:EVALUATED] for part in run.data.test)
    run.evaluate((inputs, targets))
    evaluation = (time.perf_counter() - started) * len(run.data.test_targets) / len(targets)
    whole = evaluation * len(run.data.train_targets) / len(run.data.test_targets)
    networks = config.population if config.method == "pbt" else 1
    return networks * (step * run.steps + evaluation * run.steps / run.eval_every + whole)
