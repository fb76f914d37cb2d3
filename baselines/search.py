"""`python -m baselines sweep`: a search over λ, or over anything else that a run is configured by, on Ray Tune.

Every trial is a cell of the store, so that the same command goes on where it was cut off. Values that are listed are
tried in all combinations; with a range among them, Optuna draws as many trials as are asked for. With APO every λ makes
a learning-rate schedule of its own: the report shows them beside their losses.
"""

import dataclasses
import itertools
import math
import typing
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import UnionType
from typing import Any, Final, NamedTuple

from rich.console import Console

from baselines.cells import CELLS, Cell, Store, compute, missing
from baselines.config import Config
from baselines.display import announce, counting
from baselines.experiments.commands import SCRATCH
from baselines.judge import score
from baselines.plans import estimate
from baselines.plans import search as try_all
from baselines.ray_session import session, tune_all
from baselines.search_report import label, write
from baselines.storage import commit

TRIALS: Final = 16
DIGITS: Final = 3  # of values that Optuna draws
DIVERGED: Final = 100.0  # what Optuna is told of a run that did not get to its end, a logarithm of a loss


class Over(NamedTuple):
    """What is searched over in one field of a configuration: listed values, or a range.

    Attributes:
        name: The field.
        texts: The values as they are written; of a range none.
        low: Of a range that is searched by its logarithm.
        high: Likewise.
    """

    name: str
    texts: tuple[str, ...] = ()
    low: float = 0.0
    high: float = 0.0

    @classmethod
    def parse(cls, text: str) -> "Over":
        """Read NAME=VALUE,VALUE,... or NAME=LOW..HIGH.

        Raises:
            ValueError: Neither of them, no field of that name, or a value that the field cannot have.
        """
        name, equals, values = text.partition("=")
        name = name.strip().replace("-", "_")
        if not equals or not values.strip():
            raise ValueError(f"--over {text!r} is not NAME=VALUE,VALUE,... nor NAME=LOW..HIGH")
        if name not in _types():
            raise ValueError(f"--over {text!r}: there is no option {name!r}; there are {', '.join(_types())}")
        low, dots, high = values.partition("..")
        if not dots:
            over = cls(name, tuple(value.strip() for value in values.split(",") if value.strip()))
            for value in over.texts:
                over.value(value)
            return over
        if _types()[name] is not float:
            raise ValueError(f"--over {text!r}: {name} is not a real number; list its values instead")
        over = cls(name, (), float(low), float(high))
        if not 0 < over.low < over.high < math.inf:
            raise ValueError(f"--over {text!r}: a range must have 0 < LOW < HIGH; it is searched by its logarithm")
        return over

    def value(self, of: str | float) -> Any:
        """The field's value, from its text or from a number in the range."""
        if not self.texts:
            return min(max(float(f"{of:.{DIGITS}g}"), self.low), self.high)
        kind, text = _types()[self.name], str(of)
        if typing.get_origin(kind) is tuple:
            return tuple(typing.get_args(kind)[0](part) for part in text.split("+"))
        if kind is bool and text not in ("True", "False"):
            raise ValueError(f"--over {self.name}={text}: it must be True or False")
        return text == "True" if kind is bool else kind(text)

    def written(self, value: Any) -> str | float:
        """The inverse of `value`."""
        return next(text for text in self.texts if self.value(text) == value) if self.texts else value

    def holds(self, value: Any) -> bool:
        """Whether it is one of the values searched over."""
        if self.texts:
            return value in [self.value(text) for text in self.texts]
        return isinstance(value, float) and self.low <= value <= self.high


def _types() -> dict[str, Any]:
    """The type of each field of a configuration, None apart."""

    def without_none(hint: Any) -> Any:
        return typing.get_args(hint)[0] if isinstance(hint, UnionType) else hint

    return {name: without_none(hint) for name, hint in typing.get_type_hints(Config).items()}


class Search:
    """A search: options that stay, and what is searched over.

    Args:
        options: Fields of the configuration that stay, by name.
        overs: What is searched over.
        trials: How many runs a search with a range is to have in all.

    Raises:
        ValueError: A configuration that is not possible, or `trials` where everything is listed.
    """

    def __init__(self, options: Mapping[str, Any], overs: Sequence[Over], trials: int | None) -> None:
        self.options, self.overs = dict(options), list(overs)
        self.names = [over.name for over in overs]
        if twice := [name for name in self.names if self.names.count(name) > 1 or name in options]:
            raise ValueError(f"{twice[0]} is given twice; give it once, by --over or by its own option")
        self.ranged = any(not over.texts for over in overs)
        if trials is not None and not self.ranged:
            raise ValueError(f"trials={trials} has no effect where all values are listed; leave out --trials")
        self.trials = TRIALS if trials is None else trials
        if self.trials < 1:
            raise ValueError(f"trials={trials} is not allowed; it must be at least 1")
        ends: list[tuple[str | float, ...]] = [over.texts or (over.low, over.high) for over in overs]
        self.listed = [self.config(values) for values in itertools.product(*ends)]  # of a range: its ends
        if "pbt" in {config.method for config in self.listed}:
            raise ValueError("--method pbt is a search on Ray Tune itself: python -m baselines run apo-fig15")

    def config(self, values: Sequence[str | float]) -> Config:
        """The configuration of one trial, from the values of what is searched over."""
        own = {over.name: over.value(value) for over, value in zip(self.overs, values, strict=True)}
        config = Config(**self.options | own)
        config.refuse_ignored([*self.options, *own])
        return config

    def found(self, store: Store) -> list[Cell]:
        """The cells of the search that the store has, with lower losses first."""
        configs = self.listed
        if self.ranged:
            configs = list(dict.fromkeys(cell.config for cell in store if self._covers(cell.config)))
        return sorted((cell for config in configs if (cell := store.get(config)) is not None), key=lambda c: c.loss)

    def _covers(self, config: Config) -> bool:
        """Whether a configuration may be one of the search's trials."""
        own = {over.name: getattr(config, over.name) for over in self.overs}
        if not all(over.holds(own[over.name]) for over in self.overs):
            return False
        return dataclasses.replace(config, data_dir=None) == Config(**self.options | {"data_dir": None} | own)

    def left(self, store: Store) -> int:
        """How many runs are still to do."""
        return max(0, self.trials - len(self.found(store))) if self.ranged else len(missing(self.listed, store))

    def algorithm(self, store: Store) -> Any:
        """Optuna's sampler, which knows the cells that are there."""
        from optuna.distributions import CategoricalDistribution, FloatDistribution
        from ray.tune.search.optuna import OptunaSearch

        known = self.found(store)
        points = [{over.name: over.written(getattr(cell.config, over.name)) for over in self.overs} for cell in known]
        return OptunaSearch(
            {
                over.name: CategoricalDistribution(over.texts)
                if over.texts
                else FloatDistribution(over.low, over.high, log=True)
                for over in self.overs
            },
            metric="score",
            mode="min",
            points_to_evaluate=points or None,
            evaluated_rewards=[told(cell) for cell in known] or None,
            seed=self.options.get("seed", 0) + len(known),  # else what it draws at first would be drawn again
        )

    def carry_out(
        self,
        store: Store,
        report: Callable[[Cell], None],
        *,
        workers: int | None = None,
        address: str | None = None,
    ) -> None:
        """Run what the store lacks, storing each cell as it is there.

        Args:
            store: Where cells come from and go to.
            report: Called with each new cell.
            workers: Processes of one thread each; None: one a core.
            address: Of a Ray cluster; None: this machine.
        """
        lacking, here = missing(self.listed, store), commit()  # a cluster's machines have no repository

        def keep(name: str, result: Mapping[str, Any]) -> None:
            cell = Cell.from_json(result["cell"])
            store.put(dataclasses.replace(cell, about=cell.about | {"commit": here}))
            report(cell)

        def trial(values: dict[str, Any]) -> dict[str, Any]:
            drawn = "place" not in values
            config = self.config([values[over.name] for over in self.overs]) if drawn else lacking[values["place"]]
            cell = compute(config, SCRATCH if address is None else None)
            return {"score": told(cell), "cell": cell.to_json()}

        with session(workers, address):
            from ray import tune

            if self.ranged:
                search = {"search_alg": self.algorithm(store), "num_samples": self.left(store)}
                tune_all(trial, {}, keep, max_concurrent_trials=workers, **search)
            else:
                tune_all(trial, {"place": tune.grid_search(list(range(len(lacking))))}, keep)


def told(cell: Cell) -> float:
    """What a search is told of a cell: the logarithm of its loss, floored, and finite."""
    return min(score(cell), DIVERGED)


def sweep(
    console: Console,
    options: Mapping[str, Any],
    over: Sequence[str] = (),
    trials: int | None = None,
    address: str | None = None,
    workers: int | None = None,
    older: bool = False,
    out: Path | None = None,
    cells: Path = CELLS,
) -> int:
    """Search; cells that are there are not run again.

    Args:
        console: For the estimate and the progress.
        options: Fields of the configuration that stay.
        over: What is searched over, as `Over.parse` reads it.
        trials: Of a search with a range: how many runs in all.
        address: Of a Ray cluster; None: this machine.
        workers: Processes; None: one a core.
        older: Whether cells of earlier code count.
        out: Where the report goes; None: runs/sweep- and what is searched.
        cells: The folder of the store.

    Returns:
        The exit status.
    """
    overs = [Over.parse(text) for text in over]
    search, store = Search(options, overs, trials), Store(cells, older=older)
    left, first = search.left(store), search.listed[0]
    if search.ranged:  # what will be drawn costs what the ends of the range would
        cost = estimate([try_all(search.listed)], Store(cells / "none")).seconds * left / len(search.listed)
    else:
        cost = estimate([try_all(search.listed)], store).seconds
    stored = f"{len(search.found(store))} runs are stored, {left} are to do"
    announce(console, stored, cost)
    show = counting(console, lambda cell: label(cell, search.names), of=f"/{left}")
    if left:
        search.carry_out(store, show, workers=workers, address=address)
    folder = out or Path("runs") / "-".join(["sweep", first.data, first.model, first.optimizer, *search.names])
    write(folder, search.names, search.found(store))
    console.print(f"{folder / 'README.md'}", soft_wrap=True)
    return 0
